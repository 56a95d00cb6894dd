"""What network a folder holds, whoever wrote it."""

from etils import epath

from flora_jax.errors import InputError, MissingFileError
from flora_jax.io.files import read_json
from flora_jax.models.spec import Spec
from flora_jax.weights import hugging_face_config, timm_config
from flora_jax.weights.folder import SPEC_FILE, load_spec

CONFIG_FILE = "config.json"


def read_spec(folder: epath.PathLike) -> Spec:
    """Reads what network a folder holds: one of our own, of transformers or of timm.

    Raises:
      MissingFileError: neither a spec.json nor a config.json is there.
      InputError: a network that this library cannot build; says why.
    """
    folder = epath.Path(folder)
    if (folder / SPEC_FILE).exists():
        return load_spec(folder)
    path = folder / CONFIG_FILE
    if not path.exists():
        raise MissingFileError(f"{folder} has no {SPEC_FILE} and no {CONFIG_FILE}")
    config = read_json(path)
    try:
        return spec_of_config(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def spec_of_config(config: dict) -> Spec:
    """The spec of a config.json's content. Raises InputError for one that is not known."""
    is_timm = "architecture" in config
    return (timm_config if is_timm else hugging_face_config).spec_of_config(config)
