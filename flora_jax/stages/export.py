"""The export stage: the models that a run is made for, as files that other programs read."""

import logging
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from etils import epath

from flora_jax.cluster.processes import by_the_first
from flora_jax.errors import InputError
from flora_jax.io.files import making_folder
from flora_jax.models.network import Network
from flora_jax.report.card import CARD_FILE
from flora_jax.stages.budget import models_to_hand_out
from flora_jax.stages.card import card_of
from flora_jax.stages.changes import put_aside
from flora_jax.stages.companions import describe_model
from flora_jax.stages.images import Images
from flora_jax.stages.run import EXPORT, Run
from flora_jax.weights import folder
from flora_jax.weights.export.kinds import EXPORTS

log = logging.getLogger(__name__)
_COMPARED = 8  # images


def export(run: Run, images: Images) -> None:
    """Writes each model to a folder of its own in `export`, compared with it on test images."""
    batch, compared = next(images.of_test(_COMPARED, "export"), None), None
    if batch is not None:
        compared = np.asarray(run.settings.data.normalization(jnp.asarray(batch)))
    export_once(run, compared, images.class_names)


@by_the_first
def export_once(run: Run, compared: np.ndarray | None, class_names: Sequence[str]) -> None:
    """A folder is there whole, with its card, or not at all.

    Args:
      compared: normalised images float32 [B, H, W, C]; None: random ones.

    Raises:
      InputError: a file would compute something else than its model; names both.
    """
    put_aside(run.folder, [EXPORT])  # what an export that was interrupted has left
    for found in models_to_hand_out(run):
        target = run.folder / EXPORT / found.folder.rpartition("/")[2]
        model = folder.load_model(run.folder / found.folder)
        with making_folder(target) as partial:
            for kind in run.settings.export:
                _write(found.name, model, kind, partial, compared)
            for place in (partial, *(path for path in partial.iterdir() if path.is_dir())):
                describe_model(run, place, class_names, model.spec.image_size)
            card = card_of(run, found, model.spec, class_names)
            (partial / CARD_FILE).write_bytes(card.encode())
        log.info("%s as %s: %s", found.name, ", ".join(run.settings.export), target)


def _write(
    name: str, model: Network, kind: str, place: epath.Path, compared: np.ndarray | None
) -> None:
    try:
        EXPORTS[kind].write(model, place / EXPORTS[kind].path, images=compared)
    except InputError as error:
        raise InputError(f"export of {name} as {kind!r}: {error}") from error
