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
    if folder is None:
        raise InputError("--push_to_hub needs --workdir, the folder of a run or of an export")
    exported = export_in(user_path(folder))
    print(f"{exported} is at {uploaded(exported, repository)}")


def export_in(folder: epath.Path) -> epath.Path:
    """The export that a folder is or holds. Raises as `push`."""
    if is_url(folder):
        raise InputError(f"{folder} is on no disk: copy the folder of the export to one first")
    if _is_export(folder):
        return folder
    places = [path.parent for path in matching(folder, f"{EXPORT}/*/{CARD_FILE}")]
    match [place for place in places if _is_export(place)]:
        case [only]:
            return only
        case []:
            raise MissingFileError(
                f"{folder} has no export; --config.export=onnx --workdir=RUN makes one of a run"
            )
        case several:
            names = ", ".join(str(place) for place in several)
            raise InputError(f"{folder} has several exports: give one as --workdir, of {names}")


def _is_export(folder: epath.Path) -> bool:
    """True where a card is; a README without what a model wants of pictures is none."""
    return all((folder / name).exists() for name in (CARD_FILE, PREPROCESSING_FILE))
