"""Models as pure functions: a graph definition (static) and a flat dict of parameters.

Parameter names are dotted paths such as "blocks.0.attn.qkv.kernel". A flat dict is what the
optimiser, the checkpoints, the safetensors files and the weight surgery all work on.
"""

import jax
import jax.numpy as jnp
from flax import nnx

Parameters = dict[str, jax.Array]


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Parameters]:
    """The model's static structure (hashable) and its parameters."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(nnx.as_pure(state))
    return graphdef, {".".join(map(str, path)): value for path, value in flat}


def merge(graphdef: nnx.GraphDef, parameters: Parameters) -> nnx.Module:
    """The model again; works inside jit, where the parameters are tracers."""
    flat = {_path(name): value for name, value in parameters.items()}
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def with_parameters(model: nnx.Module, parameters: Parameters) -> nnx.Module:
    """A copy of the model that holds these parameters; `model` may be abstract.

    Raises:
      ValueError: a name or a shape differs from the model's own.
    """
    graphdef, own = split(model)
    missing, unexpected = own.keys() - parameters.keys(), parameters.keys() - own.keys()
    if missing or unexpected:
        raise ValueError(
            f"parameters do not fit the model: missing {sorted(missing) or 'none'}, "
            f"unexpected {sorted(unexpected) or 'none'}"
        )
    for name, value in parameters.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"parameter {name} has shape {tuple(value.shape)}, expected {own[name].shape}"
            )
    return merge(graphdef, {name: jnp.asarray(value) for name, value in parameters.items()})


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
