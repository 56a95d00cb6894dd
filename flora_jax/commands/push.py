"""flora_jax --push_to_hub=owner/name --workdir=RUN: upload of an export to the hub."""

from etils import epath

from flora_jax.errors import InputError, MissingFileError
from flora_jax.io.files import matching
from flora_jax.io.paths import is_url, user_path
from flora_jax.report.card import CARD_FILE
from flora_jax.runs.workdir import EXPORT
from flora_jax.weights.hub import uploaded
from flora_jax.weights.metadata.preprocessing import PREPROCESSING_FILE


def push(repository: str, folder: epath.PathLike | None) -> None:
    """Uploads an exported model with its card, and prints the address.

    Args:
      repository: owner/name.
      folder: of the export, or of a run that has exported one model.

    Raises:
      MissingFileError: there is no export.
      InputError: no folder, several exports, or as `uploaded`; StorageError, MissingPackageError
        too.
    """
    if folder is None or is_url(folder):
        raise InputError("--push_to_hub needs --workdir, a run or an export in a folder on disk")
    place = user_path(folder)
    # A README without what a model wants of pictures is no card.
    places = [place, *(path.parent for path in matching(place, f"{EXPORT}/*/{CARD_FILE}"))]
    files = CARD_FILE, PREPROCESSING_FILE
    exports = [path for path in places if all((path / name).exists() for name in files)]
    if not exports:
        raise MissingFileError(
            f"{place} has no export; --config.export=onnx --workdir=RUN makes one of a run"
        )
    if len(exports) > 1:
        names = ", ".join(map(str, exports))
        raise InputError(f"{place} has several exports: give one as --workdir, of {names}")
    print(f"{exports[0]} is at {uploaded(exports[0], repository)}")
