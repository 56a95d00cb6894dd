"""What no export can write."""

from typing import Any

from etils import epath

from flora_jax.errors import InputError
from flora_jax.io.paths import user_path
from flora_jax.lowrank.supernet import Supernet


def check_is_one_network(model: Any) -> None:
    """Raises InputError of a supernet."""
    if isinstance(model, Supernet):
        raise InputError("a supernet holds many networks: extract one first, then export it")


def file_named(path: epath.PathLike, ending: str) -> epath.Path:
    """The path that the user means. Raises InputError unless it ends so."""
    path = user_path(path)
    if path.suffix != ending:
        raise InputError(f"{path.name} must end in {ending}")
    return path
