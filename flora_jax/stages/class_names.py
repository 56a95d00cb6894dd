"""The names of the classes, in a run and beside its models: they say which logit is which."""

import itertools
import logging
from collections.abc import Sequence

from etils import epath

from flora_jax.cluster.processes import by_the_first
from flora_jax.errors import differences, listed
from flora_jax.io.files import read_json, write_json
from flora_jax.stages.changes import outputs
from flora_jax.weights.folder import SPEC_FILE

CLASSES_FILE = "classes.json"

log = logging.getLogger(__name__)


@by_the_first
def name_run_once(folder: epath.Path, names: Sequence[str]) -> None:
    """Writes the names in the order of their labels, and warns where a run began with others."""
    path = folder / CLASSES_FILE
    if not names:
        return
    if path.exists() and (before := read_json(path)) != list(names):
        there, here = ({str(i): name for i, name in enumerate(own)} for own in (before, names))
        log.warning(
            "the classes of the images have changed since this run began:%s",
            listed(itertools.islice(differences(there, here), 5)),
        )
    else:
        write_json(path, list(names))


@by_the_first
def name_models_once(folder: epath.Path, stage: str, names: Sequence[str]) -> None:
    """Writes the names beside each model that this stage has left in the folder of a run."""
    for path in outputs(folder, [stage]) if names else ():
        if (path / SPEC_FILE).exists():
            write_json(path / CLASSES_FILE, list(names))
