"""Export: the models that a run is made for, as files that other programs read."""

import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from etils import epath

from flora_jax.cluster.processes import by_the_first
from flora_jax.data import pictures
from flora_jax.errors import InputError
from flora_jax.io.files import making_folder, matching
from flora_jax.models.network import Network
from flora_jax.report.card import CARD_FILE, card_of
from flora_jax.runs.budgets import models_to_hand_out
from flora_jax.runs.model_files import describe_model
from flora_jax.runs.workdir import EXPORT, Run, Step
from flora_jax.weights import folder
from flora_jax.weights.export import EXPORTS
from flora_jax.weights.export.checks import cosines, exactly
from flora_jax.weights.export.onnx import in_onnx_runtime, installed_runtimes
from flora_jax.weights.export.pytorch import PREPROCESS_FILE

log = logging.getLogger(__name__)
Labelled = Iterator[tuple[np.ndarray, np.ndarray]]
_COMPARED = 8  # images


def export(step: Step, models: None, kinds: Sequence[str]) -> None:
    """hands out the models as files with a card: --config.export=onnx, torch, ...

    Each in a folder of its own in `export`, compared with it on test images.
    """
    run, images = step.run, step.images
    normalise = images.train_set.normalization
    batch, compared = next(images.of_test(_COMPARED, "export"), None), None
    if batch is not None:
        compared = np.asarray(normalise(jnp.asarray(batch)))

    def tested() -> Labelled:
        for batch, labels in images.labelled_test():
            yield np.asarray(normalise(jnp.asarray(batch))), labels

    can_be_tested = (images.are_labelled or not run.spec.classifies) and len(images.splits.test)
    export_once(run, kinds, compared, images.class_names, tested if can_be_tested else None)


@by_the_first
def export_once(
    run: Run,
    kinds: Sequence[str],
    compared: np.ndarray | None,
    class_names: Sequence[str],
    tested: Callable[[], Labelled] | None = None,
) -> None:
    """Writes the models to hand out; a folder is there whole, with its card, or not at all.

    Args:
      compared: normalised images float32 [B, H, W, C]; None: random ones.
      tested: gives those that files of lower precision are measured on, with labels int32 [B],
        of which a network without exclusive classes needs none.

    Raises:
      InputError: a file would compute something else than its model; names both.
    """
    for left in matching(run.folder, f"{EXPORT}/.*"):  # by an export that was killed
        left.rmtree()
    for found in models_to_hand_out(run):
        target = run.folder / EXPORT / found.folder.rpartition("/")[2]
        if target.exists():  # by an export that was interrupted after it
            continue
        model = folder.load_model(run.folder / found.folder)
        with making_folder(target) as partial:
            for kind in kinds:
                _write(found.name, model, kind, partial, compared)
            for place in (partial, *(path for path in partial.iterdir() if path.is_dir())):
                describe_model(place, class_names, model.spec, run.settings.data)
            code = pathlib.Path(pictures.__file__).read_bytes()
            (partial / PREPROCESS_FILE).write_bytes(code)
            coarse = _measured(kinds, partial, model, tested) if tested else {}
            card = card_of(run, found, model.spec, class_names, coarse)
            (partial / CARD_FILE).write_bytes(card.encode())
        log.info("%s as %s: %s", found.name, ", ".join(kinds), target)
        if any(kind.startswith("onnx") for kind in kinds):
            log.info("  ONNX gives the same in %s", " and ".join(installed_runtimes()))


def _measured(
    kinds: Sequence[str], place: epath.Path, model: Network, tested: Callable[[], Labelled]
) -> dict[str, float]:
    """The top-1 of each file whose precision may cost some, by its kind; of other outputs
    their cosine to the model's."""
    found = {}
    for kind in (kind for kind in kinds if EXPORTS[kind].is_coarse):
        file = in_onnx_runtime((place / EXPORTS[kind].path).read_bytes())
        if model.spec.classifies:
            of_images = [file(images).argmax(axis=1) == labels for images, labels in tested()]
        else:
            forward = exactly(model)
            of_images = [cosines(file(images), forward(images)) for images, _ in tested()]
        found[kind] = float(np.concatenate(of_images).mean())
        name = "top-1" if model.spec.classifies else "cosine to the model's outputs"
        log.info("%s: %s %.4f", EXPORTS[kind].path, name, found[kind])
    return found


def _write(
    name: str, model: Network, kind: str, place: epath.Path, compared: np.ndarray | None
) -> None:
    try:
        EXPORTS[kind].write(model, place / EXPORTS[kind].path, images=compared)
    except InputError as error:
        raise InputError(f"export of {name} as {kind!r}: {error}") from error
