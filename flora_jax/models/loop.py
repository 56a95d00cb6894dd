"""Blocks of one shape as a loop over their stacked parameters.

The program is then as many times smaller as there are blocks, and compiles in less time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.block import run_blocks
from flora_jax.models.layers import LAYER_OUTPUT

_PERIODS = (1, 2)  # Swin shifts the windows of every other block


@dataclasses.dataclass(frozen=True)
class Loop:
    """Computes the same as `run_blocks`, with a loop wherever like blocks repeat.

    The backward pass computes again what is between the layers' products, for a loop would keep
    all of it; with `rematerialize`, all but the blocks' outputs.
    """

    rematerialize: bool = False

    def __call__(self, blocks: nnx.List, x: jax.Array, genes: jax.Array | None) -> jax.Array:
        """Tokens through all blocks; genes int32 [L], three a block."""
        parts = [nnx.split(block) for block in blocks]
        shapes = [(graphdef, jax.tree.map(jnp.shape, state)) for graphdef, state in parts]
        start = 0
        while start < len(blocks):
            repeats = {period: _repeats(shapes[start:], period) for period in _PERIODS}
            period = max(repeats, key=repeats.get)
            end = start + repeats[period] * period
            own_genes = None if genes is None else genes[3 * start : 3 * end]
            if repeats[period] == 1:
                x = run_blocks(blocks[start:end], x, own_genes)
            else:
                x = self._run(parts[start:end], period, x, own_genes)
            start = end
        return x

    def _run(self, parts: list, period: int, x: jax.Array, genes: jax.Array | None) -> jax.Array:
        graphdefs, states = zip(*parts, strict=True)
        states = [states[i : i + period] for i in range(0, len(states), period)]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)
        if genes is not None:
            genes = genes.reshape(len(states), 3 * period)
        kept = () if self.rematerialize else (LAYER_OUTPUT,)

        @functools.partial(
            jax.checkpoint,
            prevent_cse=False,  # a loop is no place where XLA would merge the two computations
            policy=jax.checkpoint_policies.save_only_these_names(*kept),
        )
        def one_period(x, each):
            states, genes = each
            blocks = map(nnx.merge, graphdefs[:period], states)
            return run_blocks(blocks, x, genes), None

        return jax.lax.scan(one_period, x, (stacked, genes))[0]


def _repeats(shapes: list, period: int) -> int:
    """How often the first `period` of them come in a row, at least once."""
    times = 1
    while shapes[:period] == shapes[times * period : (times + 1) * period]:
        times += 1
    return times
