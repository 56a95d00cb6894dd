"""The names of the classes, in the run and beside its models: which logit is which."""

import logging
from collections.abc import Iterable

from etils import epath

from flora_jax.cluster.processes import by_the_first
from flora_jax.io.files import read_json, write_json
from flora_jax.stages.changes import outputs
from flora_jax.weights.folder import SPEC_FILE

CLASSES_FILE = "classes.json"

log = logging.getLogger(__name__)


@by_the_first
def name_run_once(folder: epath.Path, names: Iterable[str]) -> None:
    """Writes the names in the order of their labels; warns where the run began with others."""
    names, path = list(names), folder / CLASSES_FILE
    if path.exists() and (before := read_json(path)) != names:
        changed = [f"{i}: {old!r}, now {new!r}" for i, (old, new) in _changes(before, names)]
        log.warning(
            "the classes of this dataset have changed since the run began, so that its models may "
            "mean others: %s%s",
            *(", ".join(changed[:5]), ", ..." if len(changed) > 5 else ""),
        )
    write_json(path, names)


def _changes(before: list[str], now: list[str]):
    return [
        (i, pair) for i, pair in enumerate(zip(before, now, strict=False)) if len(set(pair)) > 1
    ]


@by_the_first
def name_models_once(folder: epath.Path, stage: str, names: Iterable[str]) -> None:
    """Writes the names beside each model that this stage has left in the folder of a run."""
    for path in outputs(folder, [stage]):
        if (path / SPEC_FILE).exists():
            write_json(path / CLASSES_FILE, list(names))
