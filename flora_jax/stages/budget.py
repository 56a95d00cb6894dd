"""What a run's subnet may cost, in multiply-adds or in nanoseconds of this device."""

from flora_jax.errors import InputError
from flora_jax.io.files import read_json
from flora_jax.lowrank.cost import Cost
from flora_jax.lowrank.space import RankSpace
from flora_jax.models.spec import Spec
from flora_jax.search.latency import LatencyTable
from flora_jax.stages.run import Run
from flora_jax.stages.settings import Settings

LATENCY_FILE = "search/latency.json"


def macs_window(settings: Settings, dense: Spec) -> tuple[int, int]:
    """MACs of the subnet (lo, hi); the settings give them as shares of the dense model's."""
    low, high = settings.budget.macs
    return round(low * dense.macs()), round(high * dense.macs())


def latency_window(settings: Settings, table: LatencyTable) -> tuple[int, int]:
    """Nanoseconds of the subnet (lo, hi); the settings give them as shares of the dense model's."""
    (low, high), dense = settings.budget.latency, 1e6 * table.dense_ms
    return round(low * dense), round(high * dense)


def load_latency_table(run: Run) -> LatencyTable:
    """Reads the table that was measured when the search began."""
    return LatencyTable.from_json(read_json(run.folder / LATENCY_FILE))


def load_window(run: Run) -> tuple[int, int]:
    """Reads what the search may spend (lo, hi), in its own unit."""
    if run.settings.searches_by_latency:
        return latency_window(run.settings, load_latency_table(run))
    return macs_window(run.settings, run.spec)


def load_uniform_ranks(run: Run, space: RankSpace) -> tuple[int, ...]:
    """Ranks of the baseline, at most at the MAC window's end, or at the MACs of a subnet found by
    latency."""
    most = macs_window(run.settings, run.spec)[1]
    if run.settings.searches_by_latency:
        most = read_json(run.folder / "search/best.json")["macs"]
    return space.uniform_ranks_within(most)


def check_macs_budget(settings: Settings, dense: Spec, base: Spec) -> None:
    """Checks that FLORA, where it will run, can reach its MAC window from a model of spec `base`.

    Raises:
      InputError: it cannot; names the window and what can be reached.
    """
    if "search" in settings.stages:
        space, shares = settings.space.of(base), settings.budget.macs
        window = macs_window(settings, dense)
        _check("macs", shares, window, space.macs_cost, space, dense.macs(), "MACs")


def check_latency_budget(settings: Settings, table: LatencyTable, space: RankSpace) -> None:
    """Checks that the search can reach its latency window. Raises as `check_macs_budget`."""
    shares, window = settings.budget.latency, latency_window(settings, table)
    dense = f"{table.dense_ms:.2f} ms on {table.device}"
    _check("latency", shares, window, table.cost, space, 1e6 * table.dense_ms, dense)


def _check(
    name: str,
    shares: tuple[float, float],
    window: tuple[int, int],
    cost: Cost,
    space: RankSpace,
    dense: float,
    dense_cost: str,
) -> None:
    least, most = cost.range_over(space.kept)
    if window[1] < least or window[0] > most:
        raise InputError(
            f"budget.{name} {shares} cannot be reached: the space spans "
            f"{least / dense:.3f}..{most / dense:.3f} of the dense model's {dense_cost}"
        )
