"""The spec of the network in a folder: of our own, of transformers or of timm."""

from typing import Any

from etils import epath

from flora_jax.errors import MissingFileError
from flora_jax.models.spec import Spec
from flora_jax.weights.folder import SPEC_FILE, inside, load_spec
from flora_jax.weights.hub import local_folder
from flora_jax.weights.metadata import hugging_face, timm
from flora_jax.weights.metadata.fields import Fields, read_named

CONFIG_FILE = "config.json"


def read_spec(folder: epath.PathLike) -> Spec:
    """Reads the spec of the network in a folder: one of our own, of transformers or of timm.

    The folder may be `hf:owner/name` of the hub, as for `from_pretrained`.

    Raises:
      MissingFileError: neither a spec.json nor a config.json is there.
      InputError: a network that this library cannot build; says why.
    """
    folder = local_folder(folder)
    if (folder / SPEC_FILE).exists():
        return load_spec(folder)
    if not (folder / CONFIG_FILE).exists():
        hint = inside(folder, SPEC_FILE, CONFIG_FILE)
        raise MissingFileError(f"{folder} has no {SPEC_FILE} and no {CONFIG_FILE}{hint}")
    return read_config(folder / CONFIG_FILE)


def read_config(path: epath.Path) -> Spec:
    """The spec of a config.json. Raises as `spec_of_config`, with the file's name."""
    return read_named(path, spec_of_config)


def describes_itself(path: epath.PathLike) -> bool:
    """Whether this is a folder, or a repository of the hub, that `read_spec` can read."""
    path = local_folder(path)
    return any((path / name).exists() for name in (SPEC_FILE, CONFIG_FILE))


def spec_of_config(config: Any) -> Spec:
    """The spec of a config.json's content.

    Raises:
      InputError: it names a kind of network that is not known here, or asks what it cannot be.
    """
    fields = Fields(config)
    return (timm if "architecture" in fields else hugging_face).spec_of_config(fields)
