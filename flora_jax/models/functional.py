"""Models as pure functions: a structure (static) and a flat dict of parameters.

Parameter names are dotted paths such as "blocks.0.attn.qkv.kernel". A flat dict is what the
optimiser, the checkpoints, the safetensors files and the weight surgery all work on.

Beside its parameters a network may have slots: integers that are set anew whenever it is put
together and are never trained. They are the ranks that a supernet takes (`flora_jax.flora`).
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flora_jax.errors import InputError

Parameters = dict[str, jax.Array]
_Path = tuple[Any, ...]  # of names, and of numbers in lists
_Model = TypeVar("_Model", bound=nnx.Module)


class Undecayed(nnx.Param):
    """A parameter that weight decay leaves alone, whatever its shape."""


class Slot(nnx.Variable):
    """int32 []: which of several ways a layer works in, 0..last. Set by `merge`."""

    def __init__(self, last: int):
        super().__init__(jnp.int32(last), last=last)


@dataclasses.dataclass(frozen=True)
class Structure:
    """A model without its values. Hashable, so a compiled function can be made for it.

    Attributes:
      graphdef: the modules.
      undecayed: names of the parameters of kind `Undecayed`.
      slots: (path, last choice) of each `Slot`, block by block.
    """

    graphdef: nnx.GraphDef
    undecayed: frozenset[str]
    slots: tuple[tuple[_Path, int], ...]


def split(model: nnx.Module) -> tuple[Structure, Parameters]:
    """The model's static structure and its parameters."""
    graphdef, state = nnx.split(model)
    parameters: Parameters = {}
    undecayed, slots = set(), []
    for path, variable in nnx.to_flat_state(state):
        if isinstance(variable, Slot):
            slots.append((path, variable.get_metadata("last")))
            continue
        parameters[name := _name(path)] = variable.get_value()
        if isinstance(variable, Undecayed):
            undecayed.add(name)
    return Structure(graphdef, frozenset(undecayed), tuple(slots)), parameters


def merge(structure: Structure, parameters: Parameters, choices: jax.Array | None = None) -> Any:
    """The model again, an nnx.Module; works inside jit, where the values are tracers.

    Args:
      choices: int32 [slots], block by block; None for the last choice of each.
    """
    flat: dict[_Path, jax.Array] = {_path(name): value for name, value in parameters.items()}
    for i, (path, last) in enumerate(structure.slots):
        flat[path] = jnp.int32(last) if choices is None else choices[i]
    return nnx.merge(structure.graphdef, nnx.from_flat_state(flat))


def named_variables(model: nnx.Module, kind: type[nnx.Variable]) -> Iterator[tuple[str, jax.Array]]:
    """The names and values of the model's variables of one kind, in order."""
    for path, variable in nnx.to_flat_state(nnx.state(model, kind)):
        yield _name(path), variable.get_value()


def checksum(parameters: Parameters, start: bytes = b"") -> str:
    """The sha256 of names, dtypes, shapes and values, behind the bytes that it starts with."""
    digest = hashlib.sha256(start)
    for name, value in sorted(parameters.items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(np.asarray(value).tobytes())
    return digest.hexdigest()


def with_parameters(model: _Model, parameters: Mapping[str, jax.Array | np.ndarray]) -> _Model:
    """A copy of the model that holds these parameters; `model` may be abstract.

    Raises:
      InputError: a name or a shape differs from the model's own.
    """
    structure, own = split(model)
    missing, unexpected = own.keys() - parameters.keys(), parameters.keys() - own.keys()
    if missing or unexpected:
        raise InputError(
            f"parameters do not fit the model: missing {sorted(missing) or 'none'}, "
            f"unexpected {sorted(unexpected) or 'none'}"
        )
    for name, value in parameters.items():
        if value.shape != own[name].shape:
            raise InputError(
                f"parameter {name} has shape {tuple(value.shape)}, expected {own[name].shape}"
            )
    return merge(structure, {name: jnp.asarray(value) for name, value in parameters.items()})


def _name(path: _Path) -> str:
    return ".".join(map(str, path))


def _path(name: str) -> _Path:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
