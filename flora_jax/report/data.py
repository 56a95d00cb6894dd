"""Report data: the numbers behind the plots and the page of a run, read from its folder."""

import dataclasses
import datetime
import importlib.metadata
import logging
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import numpy as safetensors

from flora_jax.errors import UserError, differences
from flora_jax.evaluation.comparison import kind_of
from flora_jax.evaluation.outputs import outputs_title, quality_of
from flora_jax.evaluation.quality import TOP1, Metric
from flora_jax.flora.evolution import read_history
from flora_jax.io.files import matching, read_json
from flora_jax.io.json_lines import read_lines, read_records
from flora_jax.io.paths import as_text
from flora_jax.models.spec import Spec
from flora_jax.report import table
from flora_jax.report.classes import Confusion, class_rows, confusions
from flora_jax.runs.budgets import (
    LATENCY_FILE,
    finished_models,
    load_base,
    load_budgets,
    load_uniform_ranks,
)
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings
from flora_jax.runs.workdir import (
    BENCHMARK_FILE,
    TEST_IMAGES_FILE,
    Run,
    done_stages,
    read_stages,
)
from flora_jax.slim.threshold import DECISION_FILE, Masks, read_decision
from flora_jax.timing import describe_device
from flora_jax.training.metrics import METRICS_FILE
from flora_jax.weights.folder import SPEC_FILE, load_spec

Curve = tuple[Sequence[int], Sequence[float]]  # steps [T], values [T]
Rows = Sequence[Sequence[str]]  # titles first
_HISTORY_FILE = "search/history.jsonl"
log = logging.getLogger(__name__)


RANKED = ("qkv", "fc1", "fc2")


@dataclasses.dataclass(frozen=True)
class Slimming:
    """Gates as `Gated.gates()` returns them, what they leave, and an image [H, W, C] or None."""

    gates: Mapping[str, Sequence[np.ndarray]]
    masks: Masks
    image: np.ndarray | None = None
    num_prefix_tokens: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """The numbers and texts of a report; what is empty is left out of it."""

    name: str = ""
    about: str = ""  # its network, weights and data
    savings: str = ""  # the subnets' multiply-adds of the dense model's
    unfinished: str = ""  # the stages that are done and those that are not
    conclusions: Sequence[str] = ()
    models: Rows = ()  # the table of models
    timed_in: str = ""  # what its milliseconds are of
    metric: Metric = TOP1  # that models are shown by
    cost: str = "macs"  # of budgets; or "ms", milliseconds
    # {model: (cost, quality on the test images)}, top-1 in 0..1.
    points: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    # {cost: [P], name of the metric: [P] on held-out images, "generation": [P]} of the search.
    candidates: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    windows: Sequence[tuple[float, float]] = ()  # the cost (low, high) of each budget
    # {subnet: [L] ranks, block by block}; None is a dense layer.
    ranks: Mapping[str, Sequence[int | None]] = dataclasses.field(default_factory=dict)
    full_ranks: Sequence[int] = ()  # [L] the ranks at which nothing is lost
    parts: Sequence[str] = RANKED  # of a block, that have these ranks, or sizes
    # Of each subnet, the share of full rank that every layer would get at the same budget.
    uniform_ratios: Sequence[float] | None = None
    # {stage: steps, training loss}
    curves: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    # {stage: {subnet: steps and held-out quality}}, under "" of a plain model.
    accuracies: Mapping[str, Mapping[str, Curve]] = dataclasses.field(default_factory=dict)
    slimming: Slimming | None = None
    # As in benchmark.json: {"machine": str, "rows": [{"engine", "model": str, "batch": int,
    # "ms", "ratio", "low", "high": float}]}, ratio to the dense model with its quartiles.
    benchmark: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    classes: Rows = ()  # the table of accuracies by class
    confused: str = ""  # the model that confusions are of
    confusions: Sequence[Confusion] = ()
    # {setting: value} of those that the command line has set
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)
    recipe: Rows = ()  # (setting, its default, its value here) of the others
    stages: Mapping[str, float] = dataclasses.field(default_factory=dict)  # {stage: seconds}
    images: Mapping[str, object] = dataclasses.field(default_factory=dict)  # {what: value}
    skipped_images: int = 0  # of the test images, those that could not be decoded
    # Of what made the report.
    versions: Mapping[str, object] = dataclasses.field(default_factory=dict)


def read_report_data(run: Run, images: Images | None) -> ReportData:
    """Report data of a run, however far it has come.

    Args:
      images: of the run; None where they cannot be read.
    """
    path, benchmark = run.folder / "result.json", run.folder / BENCHMARK_FILE
    result = read_json(path) if path.exists() else {}
    tested, done = result.get(table.DATA, {}), done_stages(run)
    given = dict(each.split(" = ", 1) for each in run.settings.given)
    changed = [  # "-" for what is not there
        ["-" if cell is None else str(cell) or '""' for cell in row]
        for row in differences(Settings().to_config(), run.settings.to_config())
    ]
    return ReportData(
        name=as_text(run.folder.name),
        about=" ".join(filter(None, (_about(run), run.settings.note))),
        unfinished=_unfinished(run.settings.stages, done),
        conclusions=table.conclusions(result) if result else (),
        models=table.comparison_rows(result) if result else _costs(run),
        timed_in=tested.get("timed_in", ""),
        **_trade_off(run, result),
        **_curves(run),
        slimming=_slimming(run, images),
        benchmark=read_json(benchmark) if benchmark.exists() else {},
        **_classes(run, images, tested.get("classes", ())),
        given=given,
        recipe=[row for row in changed if row[0] not in (*given, "given")],
        stages={name: of["seconds"] for name, of in done.items()},
        images=_images(run, images, tested),
        skipped_images=tested.get("skipped_test_images", 0),
        versions={
            "flora_jax": importlib.metadata.version("flora_jax"),
            "Python": platform.python_version(),
            "device": describe_device(),
            "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        },
    )


def _about(run: Run) -> str:
    spec, settings = run.spec, run.settings
    height, width, _ = spec.image_shape
    start = f"from {settings.pretrained}" if settings.pretrained else "trained from scratch"
    return (
        f"{spec.title} of {len(spec.blocks)} blocks for images of {height} x {width} pixels, "
        f"{outputs_title(spec)}, {start}, on {settings.data.name}"
    )


def _unfinished(stages: Sequence[str], done: Mapping) -> str:
    stages = [name for name in stages if name != "report"]
    there = ", ".join(name for name in stages if name in done) or "nothing"
    missing = ", ".join(name for name in stages if name not in done)
    text = f"This run is not finished. Done: {there}. To come: {missing}. "
    return text + "Curves of a stage that goes on end where it is." if missing else ""


def _is_budget_known(run: Run) -> bool:
    """Whether the budgets can be read: those of latency are measured while the run goes on."""
    return not run.settings.spends_latency or (run.folder / LATENCY_FILE).exists()


def _costs(run: Run) -> Rows:
    """Costs of the models that are there already, though nothing is evaluated."""
    if run.settings.cuts_by and not _is_budget_known(run):
        return ()
    rows = []
    for _, name, path, _ in finished_models(run):
        folders = (
            run.folder / path,
            run.folder / run.settings.cuts_by / path,
        )  # the latter before training
        if found := next((folder for folder in folders if (folder / SPEC_FILE).exists()), None):
            spec = load_spec(found)
            rows.append([name, *map(table.human_count, (spec.macs(), spec.num_params()))])
    return [["model", "MACs", "params"], *rows] if rows else ()


def _trade_off(run: Run, result: Mapping) -> dict[str, Any]:
    cost, unit = ("ms", 1e6) if run.settings.spends_latency else ("macs", 1)
    shown, history = quality_of(run.spec).shown, run.folder / _HISTORY_FILE
    found = [c for c in (read_history(history) if read_lines(history) else []) if c.has_seen_all]
    budgets = load_budgets(run) if run.settings.cuts_by and _is_budget_known(run) else []
    data: dict[str, Any] = {
        "metric": shown,
        "cost": cost,
        "points": {
            name: (row[cost], row[shown.name])
            for name, row in table.named_entries(result).items()
            if {cost, shown.name} <= set(row)
        },
        "windows": [(b.window[0] / unit, b.window[1] / unit) for b in budgets],
    }
    if found:
        data["candidates"] = {
            cost: [candidate.cost / unit for candidate in found],
            shown.name: [candidate.metrics[shown.name] for candidate in found],
            "generation": [candidate.generation for candidate in found],
        }
    cut = run.folder / run.settings.cuts_by
    places = {b.name("subnet"): cut / b.folder("subnet") for b in budgets}
    if not places or not all((place / SPEC_FILE).exists() for place in places.values()):
        return data
    specs = {name: load_spec(place) for name, place in places.items()}
    macs = ", ".join(table.human_count(spec.macs()) for spec in specs.values())
    data["savings"] = f"{macs} of {table.human_count(run.spec.macs())} multiply-adds"
    if run.settings.cuts_by == "compress":
        data["ranks"] = {name: _widths(spec) for name, spec in specs.items()}
        data["full_ranks"], data["parts"] = _widths(load_base(run)), ("heads", "MLP")
        return data
    data["ranks"] = {name: spec.ranks for name, spec in specs.items()}
    full_ranks = data["full_ranks"] = [layer.full_rank for layer in load_base(run).layers]
    if run.settings.has_uniform_baseline:
        ranks = load_uniform_ranks(run)
        data["uniform_ratios"] = [of_budget[0] / full_ranks[0] for of_budget in ranks]
    return data


def _widths(spec: Spec) -> list[int]:
    """Dimensions of a head, and units of the MLP, of each block."""
    return [width for block in spec.blocks for width in (block.head_dim, block.mlp_dim)]


def _curves(run: Run) -> dict[str, Any]:
    """Loss and held-out quality of the long trainings, in the order of the stages."""
    stages = [stage for stage in read_stages(run.folder) if stage != "filter"]
    patterns = [f"{stage}/{inside}" for stage in stages for inside in ("", "*/")]
    files = [f for p in patterns for f in matching(run.folder, f"{p}{METRICS_FILE}")]
    found = {str(file.parent.relative_to(run.folder)): read_records(file) for file in files}
    found = {stage: records for stage, records in found.items() if records}
    prefix = f"heldout_{quality_of(run.spec).shown.name}"
    return {
        "curves": {stage: _loss(records) for stage, records in found.items()},
        "accuracies": {stage: _looks(records, prefix) for stage, records in found.items()},
    }


def _loss(records: Sequence[Mapping]) -> Curve:
    """Loss by step, averaged over about 1 % of the stage."""
    parts = np.array_split([record["loss"] for record in records], min(100, len(records)))
    steps = np.cumsum([len(part) for part in parts])
    return steps.tolist(), [float(part.mean()) for part in parts]


def _looks(records: Sequence[Mapping], prefix: str) -> dict[str, Curve]:
    """A held-out metric by step, of a plain model under "" and of a supernet by subnet."""
    looks = [record for record in records if prefix in record]
    steps = [record["step"] + 1 for record in looks]
    return {
        key.removeprefix(prefix).removeprefix("_"): (steps, [record[key] for record in looks])
        for key in (looks[0] if looks else ())
        if key.startswith(prefix)
    }


def _slimming(run: Run, images: Images | None) -> Slimming | None:
    path = run.folder / DECISION_FILE
    if not path.exists():
        return None
    some = None if images is None else next(images.unseen(8, "report/image"), None)
    image = None if some is None else some[0]
    return Slimming(*read_decision(path), image, run.spec.num_prefix_tokens)


def _classes(run: Run, images: Images | None, names: Sequence[str]) -> dict[str, Any]:
    """What the models make of each class, where images have labels and all are evaluated.

    Shown are, beside the dense model, those that a run was made for: its subnets, cheapest first,
    or what it has of others.
    """
    path = run.folder / TEST_IMAGES_FILE
    arrays = safetensors.load(path.read_bytes()) if names and path.exists() else {}
    models = sorted(key.removesuffix("/predicted") for key in arrays if key.endswith("/predicted"))
    kinds = ("subnet", "slim", "transfer")
    of_kinds = ([m for m in models if kind_of(m) == kind] for kind in kinds)
    smaller = next(filter(None, of_kinds), [])
    shown = {m: arrays[f"{m}/predicted"] for m in ("dense", *smaller) if m in models}
    if not shown:
        return {}
    found: dict[str, Any] = {"classes": class_rows(arrays["label"], shown, names)}
    if smaller:
        pairs = confusions(arrays["label"], shown[smaller[0]], shown.get("dense"), names)
        found["confused"] = smaller[0]
        found["confusions"] = _with_examples(pairs, arrays["label"], images)
    return found


def _with_examples(
    pairs: list[Confusion], labels: np.ndarray, images: Images | None
) -> list[Confusion]:
    """Adds an example of each pair, where the images are those that were evaluated."""
    if images is None or len(images.splits.test) != len(labels):
        return pairs
    try:
        examples = [images.splits.test[pair.example] for pair in pairs]
    except (UserError, OSError) as error:
        log.warning("no pictures of what is confused: %s", error)
        return pairs
    both = list(zip(pairs, examples, strict=True))
    if any(example["label"] != labels[pair.example] for pair, example in both):
        return pairs
    return [dataclasses.replace(pair, image=example["image"]) for pair, example in both]


def _images(run: Run, images: Images | None, tested: Mapping) -> dict[str, object]:
    data: dict[str, object] = {"source": run.settings.data.name}
    if images is not None:
        named = ("to train with", "held out, to choose by", "to report on")
        splits = images.splits
        for name, part in zip(named, (splits.train, splits.heldout, splits.test), strict=True):
            data[name] = f"{len(part):,}"
    elif tested:
        data["to report on"] = f"{tested['test_images']:,}"
    if names := tested.get("classes"):
        data["classes"] = f"{len(names):,}: {', '.join(names[:20])}{', ...' * (len(names) > 20)}"
    for split, kinds in tested.get("left_out", {}).items():
        for kind, number in kinds.items():
            data[f"left out of {split}"] = f"{number:,} {kind}"
    if share := tested.get("commonest_class"):
        data["of the commonest class"] = f"{100 * share:.2f} % of those to report on"
    if copies := tested.get("test_copies"):
        data["copies of others to train with"] = f"{copies:,} of those to report on"
    if skipped := tested.get("skipped_test_images"):
        data["could not be decoded"] = f"{skipped:,} test images"
    return data
