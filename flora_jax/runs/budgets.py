"""Budgets of a run, and the models that come of them."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from flora_jax.evaluation.comparison import budget_name
from flora_jax.flora.space import RankSpace
from flora_jax.io.files import read_json
from flora_jax.models.spec import Spec
from flora_jax.runs.settings import Settings, Spending, Window
from flora_jax.runs.workdir import Run
from flora_jax.weights.export.latency import LatencyTable
from flora_jax.weights.folder import load_spec

LATENCY_FILE = "latency/table.json"


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
        """The name of a model of this budget: "subnet", or "subnet 0.55" beside others."""
        return kind if self.is_only else budget_name(kind, self.shares)

    def folder(self, kind: str) -> str:
        """The name of a model's folder: "subnet" or "subnet_0.55"."""
        return self.name(kind).replace(" ", "_")


def budgets_of(spending: Spending, dense: Spec, table: LatencyTable | None = None) -> list[Budget]:
    """The budgets of a run, cheapest first.

    Args:
      dense: spec of the uncompressed model.
      table: of latencies, where these are spent.
    """
    whole = dense.macs() if table is None else 1e6 * table.dense_ms
    return [
        Budget(each, (round(each[0] * whole), round(each[1] * whole)), len(spending.ranges) == 1)
        for each in spending.ranges
    ]


def load_budgets(run: Run) -> list[Budget]:
    """The budgets of a run, cheapest first; those of latency once the table is measured."""
    table = load_latency_table(run) if run.settings.spends_latency else None
    return budgets_of(run.settings.spending, run.spec, table)


def load_latency_table(run: Run) -> LatencyTable:
    """The table that was measured before ranks were looked for."""
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


PROBE = "pretrain/probe"  # the dense model before it was trained, where its classifier is new
ALLOCATION_FILE, WINNERS_FILE = "allocate/genes.json", "search/best.json"


def read_found(content) -> list[Found]:
    """Subnets out of the JSON of `allocate` or `search`, one a budget."""
    names = {field.name for field in dataclasses.fields(Found)}
    entries = content if isinstance(content, list) else [content]
    return [Found(**{name: entry[name] for name in names & set(entry)}) for entry in entries]


def load_found(run: Run, file: str) -> list[Found]:
    """The subnets that `allocate` or `search` found, one a budget."""
    return read_found(read_json(run.folder / file))


def winners_file(settings: Settings) -> str:
    """The file of the subnets: of the search, or without one of the allocation."""
    return WINNERS_FILE if "search" in settings.stages else ALLOCATION_FILE


def uniform_ranks(
    budgets: list[Budget], found: list[Found], space: RankSpace, is_latency: bool
) -> list[tuple[int, ...]]:
    """Ranks of the baseline of each budget, at most at the MAC range's end, or at the MACs of the
    subnet where the budget is latency."""
    most = [each.macs for each in found] if is_latency else [each.window[1] for each in budgets]
    return [space.uniform_ranks_within(macs) for macs in most]


def load_uniform_ranks(run: Run) -> list[tuple[int, ...]]:
    """The same of a run that has found its subnets."""
    found = load_found(run, winners_file(run.settings))
    space = run.settings.space.of(load_base(run))
    return uniform_ranks(load_budgets(run), found, space, run.settings.spends_latency)


def load_base(run: Run) -> Spec:
    """The spec of the model that is compressed."""
    base = "slim" if "slim" in run.settings.stages else "dense"
    return load_spec(run.folder / base)


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
    if settings.cuts_by:
        for budget in load_budgets(run):
            for kind in extracted_kinds(settings):
                folder = budget.folder(kind)
                if "finetune" not in stages:
                    folder = f"{settings.cuts_by}/{folder}"
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
    if settings.has_uniform_baseline:
        kinds.append("uniform")
    return kinds
