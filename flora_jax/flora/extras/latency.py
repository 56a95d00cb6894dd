"""Milliseconds of the extracted network on this device, predicted from a table of its layers.

The table is measured in place: each half of a block with one layer at a lower rank, beside the
same half with all layers at full rank. Their difference is what that choice saves, with all that
surrounds it (GELU, norms, memory traffic). Everything is timed in turn, round after round, so that
a machine that is busy for a while slows everything alike. The quickest round is what counts, and
the halves are scaled to add up to the network: a short program meets other work less often.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.flora.cost import Cost
from flora_jax.flora.space import RankSpace
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.network import Block, Network
from flora_jax.models.spec import LAYERS_PER_BLOCK, Spec, by_block
from flora_jax.timing import describe_device, median_ratio, time_in_turn

log = logging.getLogger(__name__)

_SHORTEST_MS = 5  # of work, below which starting it would be much of what is measured
_HALVES = (Block.attention_half, Block.mlp_half, Block.mlp_half)  # of qkv, fc1 and fc2


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Latency of one batch, measured on one machine.

    Attributes:
      device: what ran it.
      batch_size: images.
      dtype: of weights and activations.
      dense_ms: of the uncompressed network.
      full_rank_ms: of the network whose layers are searched, all at full rank.
      change_ms: what each choice of each layer changes about `full_rank_ms`; mostly negative.
    """

    device: str
    batch_size: int
    dtype: str
    dense_ms: float
    full_rank_ms: float
    change_ms: tuple[tuple[float, ...], ...]

    @property
    def cost(self) -> Cost:
        """The table as a cost, in whole nanoseconds."""
        layers = (np.array([_nanoseconds(ms) for ms in choices]) for choices in self.change_ms)
        return Cost("ns", _nanoseconds(self.full_rank_ms), tuple(layers))

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> "LatencyTable":
        return cls(**value | {"change_ms": tuple(map(tuple, value["change_ms"]))})


def _nanoseconds(milliseconds: float) -> int:
    return round(1e6 * milliseconds)


def _rounded(milliseconds: float) -> float:
    return round(float(milliseconds), 6)


def measure(
    space: RankSpace,
    batch_size: int,
    dtype: str = "float32",
    *,
    dense: Spec | None = None,
    rounds: int = 24,
) -> LatencyTable:
    """The latency of every layer's choices, on this process' first device.

    Layers of the same shape in the same place are measured once: DeiT takes about 20 programs.

    Args:
      space: whose layers are measured.
      batch_size: images.
      dtype: of weights and activations.
      dense: the uncompressed network; by default the space's own.
      rounds: of everything in turn.
    """
    measured_as = list(_measured_as(space))
    work, copies = _compile(space, set(measured_as), batch_size, dtype)
    if dense not in (None, space.spec):
        work["dense"] = _network(dense, batch_size, dtype)
    log.info("latency: %d programs, %d images each, %d rounds", len(work), batch_size, rounds)
    times = time_in_turn(work, rounds)

    whole = times["full rank"]
    full_rank_ms = float(np.median(whole))
    quickest = {name: ms.min() / copies.get(name, 1) for name, ms in times.items()}
    full_rank = zip(measured_as, space.full_rank_genes.tolist(), strict=True)
    halves = [quickest[name] for name in full_rank]
    in_blocks = sum(qkv + fc1 for qkv, fc1, _ in by_block(halves))  # fc2's half is that of fc1
    scale = full_rank_ms / (in_blocks + quickest["around"])
    changes = (
        (scale * (quickest.get((layer, choice), half) - half) for choice in range(len(choices)))
        for choices, layer, half in zip(space.choices, measured_as, halves, strict=True)
    )
    return LatencyTable(
        device=describe_device(),
        batch_size=batch_size,
        dtype=dtype,
        dense_ms=_rounded(full_rank_ms * median_ratio(times.get("dense", whole), whole)),
        full_rank_ms=_rounded(full_rank_ms),
        change_ms=tuple(tuple(map(_rounded, each)) for each in changes),
    )


def _compile(
    space: RankSpace, layers: set[int], batch_size: int, dtype: str
) -> tuple[dict[Hashable, Callable], dict[Hashable, int]]:
    """Programs by name: of the network, what is around its blocks, and (layer, choice).

    The second dict has how often the last do their work in one run.
    """
    work: dict[Hashable, Callable] = {
        "full rank": _network(space.spec, batch_size, dtype),
        "around": _network(space.spec, batch_size, dtype, forward=_around_blocks),
    }
    copies: dict[Hashable, int] = {}
    compile_half = functools.cache(functools.partial(_half, batch_size=batch_size, dtype=dtype))
    for layer in sorted(layers):
        block, place = divmod(layer, LAYERS_PER_BLOCK)
        half = _HALVES[place]
        once = time_in_turn({"": compile_half(space.spec, block, half, 1)}, rounds=3)[""].min()
        enough = min(len(space.spec.blocks), math.ceil(_SHORTEST_MS / once))
        for choice, spec in _distinct_specs(space, layer).items():
            work[layer, choice] = compile_half(spec, block, half, enough)
            copies[layer, choice] = enough
    return work, copies


def measure_networks(
    specs: Mapping[str, Spec], batch_size: int, dtype: str = "float32", *, rounds: int = 12
) -> dict[str, np.ndarray]:
    """Milliseconds of whole networks for a batch, in each round, float64 [rounds]."""
    work = {name: _network(spec, batch_size, dtype) for name, spec in specs.items()}
    return time_in_turn(work, rounds)


def _measured_as(space: RankSpace) -> Iterator[int]:
    """Names for each layer the first one of the same block shape, place and choices."""
    first: dict[tuple, int] = {}
    blocks = zip(space.spec.blocks, space.spec.block_inputs, by_block(space.choices), strict=True)
    for number, block in enumerate(blocks):
        for place in range(LAYERS_PER_BLOCK):
            yield first.setdefault((*block, place), LAYERS_PER_BLOCK * number + place)


def _distinct_specs(space: RankSpace, layer: int) -> dict[int, Spec]:
    """A spec for each choice of a layer, others at full rank; none that is extracted alike."""
    shape, full_rank = space.spec.layers[layer], space.full_rank_genes
    specs = {int(full_rank[layer]): space.spec}
    for choice, rank in enumerate(space.choices[layer]):
        if not shape.is_cheaper_dense(rank):
            genes = full_rank.copy()
            genes[layer] = choice
            specs[choice] = space.extracted_spec(genes)
    return specs


def _network(
    spec: Spec, batch_size: int, dtype: str, forward: Callable = lambda model, images: model(images)
) -> Callable[[], None]:
    structure, parameters = functional.split(create_abstract(spec))

    def run(parameters, images):
        return forward(functional.merge(structure, parameters), images)

    images = jax.ShapeDtypeStruct((batch_size, *spec.image_shape), dtype)
    return _compiled(run, dtype, parameters, images)


def _around_blocks(model: Network, images: jax.Array) -> jax.Array:
    """All of the network but the halves of its blocks."""
    x = model.embed(images)
    for block in model.blocks:
        x = x if block.downsample is None else block.downsample(x)
    return model.classify(x)


def _half(
    spec: Spec, block: int, half: Callable, copies: int, batch_size: int, dtype: str
) -> Callable[[], None]:
    """Half of a block, a few times over with weights of its own."""
    module = create_abstract(spec).blocks[block]
    module.downsample = None  # it costs the same at every choice
    structure, parameters = functional.split(module)

    def chain(all_parameters, x):
        for parameters in all_parameters:
            x = half(functional.merge(structure, parameters), x)
        return x

    into = spec.block_inputs[block]
    x = jax.ShapeDtypeStruct((batch_size * into.tokens, into.width), dtype)
    return _compiled(chain, dtype, [parameters] * copies, x)


def _compiled(function: Callable, dtype: str, *shapes) -> Callable[[], None]:
    """The function on random arrays of these shapes, to be run again and again."""
    rng = np.random.default_rng(0)

    def small(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.02 * rng.standard_normal(shape.shape, np.float32), dtype)

    arguments = jax.tree.map(small, shapes)
    program = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments))


def check_prediction(
    table: LatencyTable, dense: Spec, subnet: Spec, predicted_ns: int
) -> dict[str, float]:
    """Times a subnet as a whole beside the dense model, and compares with the table."""
    ms = measure_networks({"dense": dense, "subnet": subnet}, table.batch_size, table.dtype)
    predicted = predicted_ns / 1e6 / table.dense_ms
    measured = median_ratio(ms["subnet"], ms["dense"])
    found = {
        "dense_ms": float(np.median(ms["dense"])),
        "subnet_ms": float(np.median(ms["subnet"])),
        "predicted_share": predicted,
        "measured_share": measured,
        "error": predicted / measured - 1,
    }
    log.info(
        "latency of the subnet: predicted %.3f of the dense model's, measured %.3f (%+.1f %%)",
        *(predicted, measured, 100 * found["error"]),
    )
    return found
