"""What a run's subnets may cost, in multiply-adds or in nanoseconds of this device."""

import dataclasses
from collections.abc import Collection, Iterator
from typing import NamedTuple

from flora_jax.cluster.processes import wait_for_all
from flora_jax.errors import InputError
from flora_jax.evaluation.comparison import budget_name
from flora_jax.flora.cost import Cost
from flora_jax.flora.extras.latency import LatencyTable, measure
from flora_jax.flora.space import RankSpace
from flora_jax.io.files import read_json, write_json_once
from flora_jax.models.spec import Spec
from flora_jax.runs.sections import Window
from flora_jax.runs.settings import Settings
from flora_jax.stages.run import Run, load_space

LATENCY_FILE = "search/latency.json"


@dataclasses.dataclass(frozen=True)
class Budget:
    """One window of cost, from which a subnet is taken.

    Attributes:
      shares: its ends as shares of the dense model's cost.
      window: the same in the unit of `budget_cost`.
      is_only: whether the run has no other.
    """

    shares: Window
    window: tuple[int, int]
    is_only: bool

    def name(self, kind: str) -> str:
        """What a model of this budget is called: "subnet", or "subnet 0.55" beside others."""
        return kind if self.is_only else budget_name(kind, self.shares)

    def folder(self, kind: str) -> str:
        """The name of a model's folder: "subnet" or "subnet_0.55"."""
        return self.name(kind).replace(" ", "_")


def load_budgets(run: Run) -> list[Budget]:
    """The budgets of a run, cheapest first; those of latency once the table is measured."""
    settings = run.settings
    if settings.spends_latency:
        return _budgets(settings, "latency", 1e6 * load_latency_table(run).dense_ms)
    return macs_budgets(settings, run.spec)


def macs_budgets(settings: Settings, dense: Spec) -> list[Budget]:
    """The budgets of multiply-adds, cheapest first."""
    return _budgets(settings, "macs", dense.macs())


def _budgets(settings: Settings, name: str, dense: float) -> list[Budget]:
    shares = settings.budget.windows(name)
    return [
        Budget(window, (round(window[0] * dense), round(window[1] * dense)), len(shares) == 1)
        for window in shares
    ]


def budget_cost(run: Run, space: RankSpace) -> Cost:
    """What the budgets are of; a table of latencies is measured once, when it is first needed."""
    if not run.settings.spends_latency:
        return space.macs_cost
    wait_for_all("latency.json is looked for")
    if not (run.folder / LATENCY_FILE).exists():
        batch_size, dtype = run.settings.search.latency_batch, run.settings.finetune.compute_dtype
        table = measure(space, batch_size, dtype, dense=run.spec)
        write_json_once(run.folder / LATENCY_FILE, table.to_json())
    table = load_latency_table(run)
    dense = f"{table.dense_ms:.2f} ms on {table.device}"
    for budget in load_budgets(run):
        _check("latency", budget, table.cost, space, 1e6 * table.dense_ms, dense)
    return table.cost


def load_latency_table(run: Run) -> LatencyTable:
    """Reads the table that was measured when ranks were first looked for."""
    return LatencyTable.from_json(read_json(run.folder / LATENCY_FILE))


SEARCHED, ALLOCATED = "searched", "allocated"


@dataclasses.dataclass(frozen=True)
class Found:
    """The subnet of one budget.

    Attributes:
      genes, ranks: L of them.
      chosen: of the search's file, whether the subnet is the search's or the allocation's.
    """

    genes: list[int]
    macs: int
    ranks: list[int]
    chosen: str = SEARCHED


ALLOCATION_FILE, WINNERS_FILE = "allocate/genes.json", "search/best.json"


def load_found(run: Run, file: str) -> list[Found]:
    """What `allocate` or `search` found for each budget."""
    found = read_json(run.folder / file)
    names = {field.name for field in dataclasses.fields(Found)}
    entries = found if isinstance(found, list) else [found]
    return [Found(**{name: entry[name] for name in names & set(entry)}) for entry in entries]


def load_ranks(run: Run, file: str) -> list[tuple[int, ...]]:
    """The ranks of what was found for each budget, L a budget."""
    return [tuple(found.ranks) for found in load_found(run, file)]


def winners_file(settings: Settings) -> str:
    """Where the subnets are: those of the search, or without one those of the allocation."""
    return WINNERS_FILE if "search" in settings.stages else ALLOCATION_FILE


def load_uniform_ranks(run: Run, space: RankSpace) -> list[tuple[int, ...]]:
    """Ranks of the baseline of each budget, at most at the MAC window's end, or at the MACs of the
    subnet where the budget is latency."""
    if run.settings.spends_latency:
        most = [found.macs for found in load_found(run, winners_file(run.settings))]
    else:
        most = [budget.window[1] for budget in load_budgets(run)]
    return [space.uniform_ranks_within(macs) for macs in most]


class Finished(NamedTuple):
    """A finished model: kind, such as "subnet", name, folder inside the run's, budget if any."""

    kind: str
    name: str
    folder: str
    budget: Budget | None


def finished_models(run: Run) -> Iterator[Finished]:
    """Every finished model of the configured stages."""
    settings, stages = run.settings, run.settings.stages
    for stage, kind in (("pretrain", "dense"), ("slim", "slim"), ("transfer", "transfer")):
        if stage in stages:
            yield Finished(kind, kind, kind, None)
    if "extract" in stages:
        for budget in load_budgets(run):
            for kind in extracted_kinds(settings):
                folder = budget.folder(kind)
                if "finetune" not in stages:
                    folder = f"extract/{folder}"
                yield Finished(kind, budget.name(kind), folder, budget)


def models_to_hand_out(run: Run) -> list[Finished]:
    """The compressed models, without their baselines; what there is, where none is compressed."""
    models = list(finished_models(run))
    return [model for model in models if model.kind in ("slim", "subnet")] or models


def extracted_kinds(settings: Settings) -> list[str]:
    """The models that are cut out for each budget: the subnet and what it has to beat."""
    kinds = ["subnet"]
    if {"allocate", "search"} <= set(settings.stages):
        kinds.append("allocated")
    if settings.uniform_baseline != "none":
        kinds.append("uniform")
    return kinds


def check_macs_budget(settings: Settings, dense: Spec, base: Spec) -> None:
    """Checks that FLORA, where it will run, can reach its MAC windows from a model of spec `base`.

    Raises:
      InputError: it cannot; names the window and what can be reached.
    """
    if settings.finds_ranks:
        _check_macs(settings, dense, settings.space.of(base), is_filtered=False)


def check_with_results(run: Run, to_redo: Collection[str]) -> None:
    """Checks the MAC windows with what the run has found already: slimmed model, kept triples.

    Args:
      to_redo: stages whose results do not count.

    Raises:
      InputError: as `check_macs_budget`.
    """
    stages = run.settings.stages
    found = {"slim": run.folder / "slim/spec.json", "filter": run.folder / "filter/space.json"}
    deciding = [stage for stage in found if stage in stages]
    is_known = deciding and all(found[s].exists() and s not in to_redo for s in deciding)
    if not is_known or not run.settings.finds_ranks or run.settings.spends_latency:
        return
    is_filtered = "filter" in deciding
    _check_macs(run.settings, run.spec, load_space(run), is_filtered)


def _check_macs(settings: Settings, dense: Spec, space: RankSpace, is_filtered: bool) -> None:
    for budget in macs_budgets(settings, dense):
        try:
            _check("macs", budget, space.macs_cost, space, dense.macs(), "MACs")
        except InputError as error:
            hint = ""
            if is_filtered:
                hint = "; --stage=filter --redo keeps other triples for it"
            elif budget.window[1] < space.macs_range()[0]:
                hint = _ratio_to_add(space, budget.window[1])
            raise InputError(f"{error}{hint}") from error


def _check(
    name: str, budget: Budget, cost: Cost, space: RankSpace, dense: float, dense_cost: str
) -> None:
    (least, most), (low, high) = cost.range_over(space.kept), budget.window
    if high < least or low > most:
        raise InputError(
            f"budget.{name} {budget.shares} cannot be reached: the space spans "
            f"{least / dense:.3f}..{most / dense:.3f} of the dense model's {dense_cost}"
        )


def _ratio_to_add(space: RankSpace, macs: int) -> str:
    """Which ratio of full rank brings a budget below the space into reach, for its message."""
    for denominator in (8, 12, 16, 24, 32, 48, 64):
        smaller = RankSpace.regular(space.spec, (1 / denominator, 1.0))
        if smaller.macs_range()[0] <= macs:
            return f"; with a ratio of 1/{denominator} in space.ratios it would be"
    return "; no rank of this network is low enough"
