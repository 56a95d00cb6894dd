"""What goes with a run's models: names of their classes, what they want of pictures, accuracy."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from flora_jax.cluster.processes import by_the_first
from flora_jax.errors import differences, listed
from flora_jax.io.files import matching, read_json, write_json
from flora_jax.stages.changes import outputs
from flora_jax.stages.run import Run
from flora_jax.weights.folder import SPEC_FILE, load_spec
from flora_jax.weights.metadata.class_names import CLASSES_FILE
from flora_jax.weights.metadata.preprocessing import save_preprocessing

EVALUATION_FILE = "evaluation.json"

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
def describe_models_once(run: Run, stage: str, names: Sequence[str]) -> None:
    """Writes names and preprocessing beside each model that this stage has left."""
    for path in _models(run.folder, stage):
        describe_model(run, path, names, load_spec(path).image_size)


def describe_model(run: Run, path: epath.Path, names: Sequence[str], image_size: int) -> None:
    """Writes names of classes, where there are any, and what a model of this size wants."""
    if names:
        write_json(path / CLASSES_FILE, list(names))
    save_preprocessing(path, run.settings.data.preprocessing(image_size))


def _models(folder: epath.Path, stage: str) -> Iterator[epath.Path]:
    for path in outputs(folder, [stage]):
        pattern = f"*/{SPEC_FILE}" if stage == "extract" else SPEC_FILE
        yield from (file.parent for file in matching(path, pattern))


@by_the_first
def report_models_once(
    run: Run, entries: Mapping[str, Mapping], folders: Mapping[str, str], about: Mapping
) -> None:
    """Writes how each finished model did on the test images beside it.

    Args:
      entries: what was measured, by the name of the model; its numbers are written.
      folders: of these models, inside the run's.
      about: what is the same for all of them.
    """
    for name, entry in entries.items():
        numbers = {key: value for key, value in entry.items() if isinstance(value, int | float)}
        path = run.folder / folders[name] / EVALUATION_FILE
        write_json(path, numbers | {"dataset": run.settings.data.name} | dict(about))
