"""flora_jax --check_predictions: stored predictions beside a fresh pass of their teacher."""

from collections.abc import Iterator

from flora_jax.errors import InputError, MissingFileError
from flora_jax.io.files import matching
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings
from flora_jax.runs.workdir import Run
from flora_jax.training.settings import Recipe
from flora_jax.training.stored_predictions import StoredTeacher
from flora_jax.training.train import PREDICTIONS, stored_teacher
from flora_jax.weights.folder import load_model

TOLERANCE = 1e-3  # float16 rounds a probability by 2.5e-4


def check_predictions(run: Run) -> None:
    """Prints how far each training's stored predictions are from a fresh pass of its teacher.

    Raises:
      MissingFileError: the run has stored none.
      InputError: they are damaged, of other images or another teacher, or too far away.
    """
    found = False
    for name, stored in _stored_teachers(run):
        found, difference = True, stored.check()
        print(
            f"{name}: {stored.description.steps} steps stored, the largest difference of a "
            f"probability is {difference.largest:.1e}, the mean {difference.mean:.1e}"
        )
        if difference.largest > TOLERANCE:
            raise InputError(
                f"{stored.folder} holds other probabilities than the teacher gives: they differ by "
                f"{difference.largest:.2g}, at most {TOLERANCE} is rounding; delete the folder"
            )
    if not found:
        raise MissingFileError(f"{run.folder} has stored no predictions")


def _stored_teachers(run: Run) -> Iterator[tuple[str, StoredTeacher]]:
    settings, images = run.settings, Images(run.settings)
    base = "slim" if "slim" in settings.stages else "dense"
    for pattern in (f"*/{PREDICTIONS}", f"*/*/{PREDICTIONS}"):
        for folder in matching(run.folder, pattern):
            name = str(folder.parent.relative_to(run.folder))
            stage, _, training = name.partition("/")
            used = images.train_set
            if stage == "filter":
                used = images.part_of_train_set(settings.filter.train_fraction)
            teacher = load_model(run.folder / ("dense" if stage == "slim" else base))
            recipe = _recipe_of(settings, stage, training)
            yield name, stored_teacher(teacher, used, recipe, name, folder.parent, settings.seed)


def _recipe_of(settings: Settings, stage: str, training: str) -> Recipe:
    if training.endswith("_alone"):  # trained as the supernet was
        return settings.supernet
    section = getattr(settings, stage)
    if isinstance(section, Recipe):
        return section
    return section.train if stage == "filter" else getattr(section, training)
