"""Blocks of one shape as a loop over their stacked parameters.

The program is then as many times smaller as there are blocks, and compiles in less time.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.block import Block, run_blocks
from flora_jax.models.layers import LAYER_OUTPUT

_PERIODS = (1, 2)  # Swin shifts the windows of every other block


@dataclasses.dataclass(frozen=True)
class Loop:
    """Computes the same as `run_blocks`, with a loop wherever like blocks repeat.

    The backward pass computes again what is between the layers' products, for a loop would keep
    all of it; with `rematerialize`, all but the blocks' outputs.
    """

    rematerialize: bool = False

    def __call__(self, blocks: Sequence[Block], x: jax.Array) -> jax.Array:
        """Takes tokens [B*N, D] through all blocks."""
        parts = [nnx.split(block) for block in blocks]
        shapes = [(graphdef, jax.tree.map(jnp.shape, state)) for graphdef, state in parts]
        start = 0
        while start < len(blocks):
            repeats = {period: _repeats(shapes[start:], period) for period in _PERIODS}
            period = max(repeats, key=repeats.__getitem__)
            end = start + repeats[period] * period
            if repeats[period] == 1:
                x = run_blocks(blocks[start:end], x)
            else:
                x = self._run(parts[start:end], period, x)
            start = end
        return x

    def _run(self, parts: list, period: int, x: jax.Array) -> jax.Array:
        graphdefs, states = zip(*parts, strict=True)
        periods = [states[i : i + period] for i in range(0, len(states), period)]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *periods)
        kept = () if self.rematerialize else (LAYER_OUTPUT,)

        @functools.partial(
            jax.checkpoint,
            prevent_cse=False,  # a loop is no place where XLA would merge the two computations
            policy=jax.checkpoint_policies.save_only_these_names(*kept),
        )
        def one_period(x, states):
            return run_blocks(map(nnx.merge, graphdefs[:period], states), x), None

        return jax.lax.scan(one_period, x, stacked)[0]


def _repeats(shapes: list, period: int) -> int:
    """How often the first `period` of them come in a row, at least once."""
    times = 1
    while shapes[:period] == shapes[times * period : (times + 1) * period]:
        times += 1
    return times
