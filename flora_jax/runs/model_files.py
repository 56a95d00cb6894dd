"""Model files: class names, preprocessing and evaluation, beside the weights of a run's models."""

import itertools
import logging
from collections.abc import Mapping, Sequence

from etils import epath

from flora_jax.cluster.processes import by_the_first
from flora_jax.errors import differences, listed
from flora_jax.io.files import matching, read_json, write_json
from flora_jax.models.spec import Spec
from flora_jax.runs.settings import DataSettings
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
def describe_models_once(
    folder: epath.Path, patterns: Sequence[str], names: Sequence[str], data: DataSettings
) -> None:
    """Writes names and preprocessing beside each model at these patterns in a run's folder."""
    for pattern in (each for path in patterns for each in (path, f"{path}/*")):
        for file in matching(folder, f"{pattern}/{SPEC_FILE}"):
            describe_model(file.parent, names, load_spec(file.parent), data)


def describe_model(path: epath.Path, names: Sequence[str], spec: Spec, data: DataSettings) -> None:
    """Writes the names of the classes, where there are any, and the preprocessing of pictures."""
    if names:
        write_json(path / CLASSES_FILE, list(names))
    save_preprocessing(path, data.preprocessing(spec.image_size), spec.kind, spec.in_channels)


@by_the_first
def report_models_once(
    folder: epath.Path, entries: Mapping[str, Mapping], folders: Mapping[str, str], about: Mapping
) -> None:
    """Writes how each finished model did on the test images beside it.

    Args:
      entries: what was measured, by the name of the model; its numbers are written.
      folders: of these models, inside the run's.
      about: what is the same for all of them.
    """
    for name, entry in entries.items():
        numbers = {key: value for key, value in entry.items() if isinstance(value, int | float)}
        write_json(folder / folders[name] / EVALUATION_FILE, numbers | dict(about))
