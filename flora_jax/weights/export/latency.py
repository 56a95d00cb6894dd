"""Milliseconds of a smaller network in the engine that will run it, predicted from a table.

The table is measured on whole networks, as the engine runs them: all groups of a kind (layers of
one shape in the same place, say) take one of their choices, everything else stays at its largest.
What that changes, divided by the groups, is what the choice changes in one of them; between the
measured choices time is linear in multiply-adds. Choices meet in a network, where they share
caches and what starting a layer takes: a last network, with a middle choice everywhere, says by
how much the sum of all changes is off, and all are scaled by that.
"""

import dataclasses
import logging
from collections.abc import Mapping

import numpy as np

from flora_jax.flora.cost import Cost, Variants
from flora_jax.models.factory import create
from flora_jax.models.spec import Spec
from flora_jax.progress import Progress
from flora_jax.timing import describe_device, median_ratio
from flora_jax.weights.export.engines import Engine
from flora_jax.weights.export.speed import time_networks

log = logging.getLogger(__name__)

_MEASURED = (0, 0.5, 1)  # of the way through the choices that cost less than the largest
ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Latency of one batch in one engine, measured on one machine.

    Attributes:
      engine, device: what ran it.
      batch_size: images.
      dense_ms: of the uncompressed network.
      full_ms: of the network in which something is chosen, all at its largest.
      change_ms: what each choice of each group changes about `full_ms`; mostly negative.
    """

    engine: str
    device: str
    batch_size: int
    dense_ms: float
    full_ms: float
    change_ms: tuple[tuple[float, ...], ...]

    @property
    def cost(self) -> Cost:
        """The table as a cost, in whole nanoseconds."""
        groups = (np.array([_nanoseconds(ms) for ms in choices]) for choices in self.change_ms)
        return Cost("ns", _nanoseconds(self.full_ms), tuple(groups))

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> "LatencyTable":
        return cls(**value | {"change_ms": tuple(map(tuple, value["change_ms"]))})


def _nanoseconds(milliseconds: float) -> int:
    return round(1e6 * milliseconds)


def measure(
    variants: Variants,
    engine: Engine,
    batch_size: int,
    *,
    dense: Spec | None = None,
    rounds: int = ROUNDS,
) -> LatencyTable:
    """The latency of every choice in an engine. It takes three networks a kind of group, and one.

    Args:
      variants: the network and what can be chosen in it.
      batch_size: images.
      dense: the uncompressed network; by default the one with all choices at their largest.
      rounds: of the networks in turn.
    """
    costs, largest = variants.macs.layers, variants.largest
    kinds: dict[int, list[int]] = {}
    for group, kind in enumerate(variants.kinds):
        kinds.setdefault(kind, []).append(group)
    measured = {kind: _measured(costs[groups[0]]) for kind, groups in kinds.items()}
    kinds = {kind: groups for kind, groups in kinds.items() if measured[kind]}
    full = variants.spec_of(largest)
    changes: list[np.ndarray] = [np.zeros(len(cost)) for cost in costs]
    log.info("latency: %d kinds of choices, %d images in %s", len(kinds), batch_size, engine)
    with Progress("latency", len(kinds) + 1, unit="kind") as progress:
        for kind, groups in kinds.items():
            specs = {"full": full}
            for choice in measured[kind]:
                picks = largest.copy()
                picks[groups] = choice
                specs[str(choice)] = variants.spec_of(picks)
            whole, *others = time_specs(specs, engine, batch_size, rounds).values()
            ratios = np.array([*(median_ratio(ms, whole) for ms in others), 1.0])
            for group in groups:
                cost = costs[group]
                known = cost[[*measured[kind], -1]]
                changes[group] = np.interp(cost, known, ratios - 1) / len(groups)
            progress.update(1)
        middle = largest.copy()
        for kind, groups in kinds.items():
            middle[groups] = measured[kind][len(measured[kind]) // 2]
        specs = {"full": full, "dense": dense or full, "middle": variants.spec_of(middle)}
        times = time_specs(specs, engine, batch_size, rounds)
        progress.update(1)
    summed = sum(change[choice] for change, choice in zip(changes, middle, strict=True))
    scale = (median_ratio(times["middle"], times["full"]) - 1) / summed if summed else 1.0
    full_ms = float(np.median(times["full"]))
    return LatencyTable(
        engine=engine.key,
        device=describe_device(),
        batch_size=batch_size,
        dense_ms=_rounded(full_ms * median_ratio(times["dense"], times["full"])),
        full_ms=_rounded(full_ms),
        change_ms=tuple(tuple(map(_rounded, scale * full_ms * each)) for each in changes),
    )


def _measured(cost: np.ndarray) -> list[int]:
    """The choices of a group that are measured, ascending, of those cheaper than the last."""
    cheaper = np.flatnonzero(cost < cost[-1])
    if not cheaper.size:
        return []
    return sorted({int(cheaper[round(share * (len(cheaper) - 1))]) for share in _MEASURED})


def _rounded(milliseconds: float) -> float:
    return round(float(milliseconds), 6)


def time_specs(
    specs: Mapping[str, Spec], engine: Engine, batch_size: int, rounds: int = ROUNDS
) -> dict[str, np.ndarray]:
    """As `time_networks`, of networks of these specs with random weights."""
    models = {name: create(spec) for name, spec in specs.items()}
    return time_networks(models, engine, batch_size, rounds)


def check_prediction(
    table: LatencyTable, engine: Engine, dense: Spec, subnet: Spec, predicted_ns: int
) -> dict[str, float]:
    """Times a subnet as a whole beside the dense model, and compares with the table."""
    ms = time_specs({"dense": dense, "subnet": subnet}, engine, table.batch_size)
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
