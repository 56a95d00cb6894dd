"""The spec of the network in a folder: of our own, of transformers or of timm."""

from typing import Any

from etils import epath

from flora_jax.errors import MissingFileError, UnknownNetworkError
from flora_jax.io.files import read_json
from flora_jax.models.spec import Spec
from flora_jax.weights.folder import SPEC_FILE, load_spec
from flora_jax.weights.hub import local_folder
from flora_jax.weights.metadata import hugging_face, timm
from flora_jax.weights.metadata.fields import Fields, naming

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
    path = folder / CONFIG_FILE
    if not path.exists():
        raise MissingFileError(f"{folder} has no {SPEC_FILE} and no {CONFIG_FILE}")
    config = read_json(path)
    with naming(path):
        return spec_of_config(config)


def describes_itself(path: epath.PathLike) -> bool:
    """Whether this is a folder, or a repository of the hub, that `read_spec` can read."""
    path = local_folder(path)
    return any((path / name).exists() for name in (SPEC_FILE, CONFIG_FILE))


def spec_of_config(config: Any) -> Spec:
    """The spec of a config.json's content.

    Raises:
      UnknownNetworkError: it names a kind of network that is not known here.
      InputError: it asks what that kind of network cannot be here.
    """
    if not isinstance(config, dict):
        raise UnknownNetworkError("expected an object with fields")
    fields = Fields(config)
    return (timm if "architecture" in fields else hugging_face).spec_of_config(fields)


def says(config: dict, field: str) -> bool:
    """Whether a config.json itself says a field of its spec: timm's do, by the architecture."""
    fields = Fields(config)
    return "architecture" in fields or hugging_face.says(fields, field)
