"""What no export can write."""

from typing import Any

from etils import epath

from flora_jax.errors import InputError
from flora_jax.flora.supernet import Supernet
from flora_jax.io.paths import user_path
from flora_jax.models.network import Network

# protobuf (ONNX) and flatbuffers (jax.export) end at 2 GiB; what is not weights needs some of it.
LARGEST_FILE = 2**31 - 2**24


def check_is_one_network(model: Any) -> None:
    """Raises InputError of a supernet, and of what is no network at all."""
    if isinstance(model, Supernet):
        raise InputError("a supernet holds many networks: extract one first, then export it")
    if not isinstance(model, Network):
        raise InputError(
            f"a {type(model).__name__} cannot be exported; a network can, such as flora.extract "
            f"and flora.slim.extract give"
        )


def check_fits_in_a_file(num_bytes: int, path: epath.Path, instead: str = "") -> None:
    """Raises InputError of more weights than one such file can hold."""
    if num_bytes > LARGEST_FILE:
        raise InputError(
            f"{num_bytes / 2**30:.2f} GiB of weights are too many for {path.name}: a "
            f"{path.suffix} file holds 2 GiB at most{instead}"
        )


def file_named(path: epath.PathLike, ending: str) -> epath.Path:
    """The path that the user means. Raises InputError unless it ends so and is no folder."""
    path = user_path(path)
    if path.suffix != ending:
        raise InputError(f"{path.name} must end in {ending}")
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file, such as {path / f'model{ending}'}")
    return path
