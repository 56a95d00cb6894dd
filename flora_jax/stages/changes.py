"""A run whose config has changed: which of its stages must be done anew, and what goes aside."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

from etils import epath

from flora_jax.cluster.processes import by_the_first
from flora_jax.errors import differences
from flora_jax.io.checkpoint import has_saved_parameters
from flora_jax.io.files import matching
from flora_jax.stages.names import STAGES
from flora_jax.stages.training import PREDICTIONS
from flora_jax.training.watch import WANDB_FILE
from flora_jax.weights.folder import CHECKPOINTS, PARAMETERS

log = logging.getLogger(__name__)

EARLIER = "earlier"
Difference = tuple[str, object, object]  # dotted name, value there, value here

# The stages that read a section or a field of the config; what stands in neither, all of them.
# The filter reads the budgets, too, but what it kept serves others that it can reach.
_READERS = {
    "pretrained": ("pretrain", "transfer"),
    "train_pretrained": ("pretrain",),
    "pretrain": ("pretrain",),
    "slim": ("slim",),
    "calibration": ("calibrate",),
    "space": ("calibrate", "filter", "supernet", "allocate", "search"),
    "filter": ("filter",),
    "metric": ("filter", "search"),
    "supernet": ("supernet", "finetune"),
    "supernet_law": ("supernet",),
    "allocation": ("allocate",),
    "budget": ("allocate", "search"),
    "search": ("search",),
    "search.budget": ("allocate", "search"),
    "search.latency_batch": ("allocate", "search"),
    "uniform_baseline": ("extract",),
    "finetune": ("transfer", "finetune"),
    "export": ("export",),
}
# Fields that change how a result is come by, but not the result, beyond rounding.
_WITHOUT_EFFECT = {
    "fsdp",
    "keep_checkpoints",
    "profile_step",
    "num_threads",
    "num_workers",
    "eval_batch_size",
    "accumulate",
    "rematerialize",
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_every",
    "evaluate_epochs",
    "keep_best",
    "watch",
}
_OUTPUTS = {  # of each stage, in the folder of the run
    "pretrain": ("pretrain", "dense"),
    "transfer": ("transfer",),
    "slim": ("slim",),
    "calibrate": ("calibrate", "inherited"),
    "filter": ("filter",),
    "supernet": ("supernet",),
    "allocate": ("allocate",),
    "search": ("search",),
    "extract": ("extract",),
    "finetune": ("finetune", "subnet*", "allocated*", "uniform*"),
    "evaluate": ("result.json", "test_images.safetensors", "benchmark.json"),
    "export": ("export",),
    "report": ("report.html", "report.png", "slim.png"),
}
_READ_BY_NO_OTHER = "export"


def changes_between(there: Mapping, here: Mapping) -> list[Difference]:
    """What two configs differ in that changes a result."""
    return [
        (name, old, new)
        for name, old, new in differences(there, here)
        if name != "stages" and name.rpartition(".")[2] not in _WITHOUT_EFFECT
    ]


def stages_to_redo(there: Mapping, here: Mapping) -> list[str]:
    """The stages of `here` whose results a run of the config `there` does not have.

    The first one that reads another value, or that follows a stage which was put in or left out,
    and all after it; what is exported, no other stage reads.
    """
    order, stages = list(STAGES), list(here["stages"])
    changed = {name for name, _, _ in changes_between(there, here)}
    readers = {stage for name in changed for stage in _readers(name, stages)}
    put_in_or_left_out = (set(stages) ^ set(there["stages"])) - {_READ_BY_NO_OTHER}
    firsts = [order.index(stage) for stage in readers - {_READ_BY_NO_OTHER}]
    firsts += [order.index(stage) + 1 for stage in put_in_or_left_out]
    first = min(firsts, default=len(order))
    return [stage for stage in stages if order.index(stage) >= first or stage in readers]


def stages_from(stage: str, stages: Iterable[str]) -> list[str]:
    """A stage and those after it, which read what it leaves."""
    if stage == _READ_BY_NO_OTHER:
        return [stage]
    stages = list(stages)
    return stages[stages.index(stage) :]


def _readers(name: str, stages: Iterable[str]) -> list[str]:
    """Those of the stages that read this field, given by its dotted name."""
    readers = _READERS.get(name, _READERS.get(name.partition(".")[0], tuple(STAGES)))
    return [stage for stage in stages if stage in readers]


def has_results(folder: epath.Path, stages: Iterable[str]) -> bool:
    """Whether any of these stages has left something in the folder of a run."""
    return any(True for _ in outputs(folder, stages))


def put_aside(folder: epath.Path, stages: Sequence[str]) -> None:
    """Moves what these stages have left to the next free folder earlier/N, if there is anything."""
    made = list(outputs(folder, stages))
    if not made:
        return
    if {*_TRAININGS, "search"} & set(stages):
        made += matching(folder, WANDB_FILE)  # where nothing can be taken back, another run begins
    numbers = itertools.count(1)
    aside = next(p for n in numbers if not (p := folder / EARLIER / str(n)).exists())
    aside.mkdir(parents=True)
    # In a bucket a folder is there once a file is, and nothing can be moved to it before.
    (aside / "stages.txt").write_text("\n".join(stages) + "\n")
    for path in made:
        path.rename(aside / path.name)
    log.info("what %s had made is in %s", ", ".join(stages), aside)


def outputs(folder: epath.Path, stages: Iterable[str]) -> Iterator[epath.Path]:
    """What these stages have left in the folder of a run."""
    for stage in stages:
        for pattern in _OUTPUTS[stage]:
            yield from matching(folder, pattern)


_TRAININGS = {  # of each stage, by the folders that they keep their checkpoints in
    "pretrain": ("pretrain",),
    "transfer": ("transfer/training",),
    "slim": ("slim/gates", "slim/retrain"),
    "filter": ("filter/block_*",),
    "supernet": ("supernet",),
    "finetune": ("finetune/*",),
}


@by_the_first
def tidy_once(folder: epath.Path, stage: str) -> None:
    """Deletes what only the training of a finished stage needed: checkpoints and predictions."""
    if stage == "supernet" and not has_saved_parameters(folder / stage / PARAMETERS):
        return  # an earlier version trained it: its checkpoints are the supernet
    for training in _TRAININGS.get(stage, ()):
        for name in (CHECKPOINTS, PREDICTIONS):
            for path in matching(folder, f"{training}/{name}"):
                path.rmtree()
