"""Weights under timm's DeiT names: one table of source name, target name and layout change."""

from collections.abc import Callable, Mapping

import numpy as np
from etils import epath
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from flora_jax.models import create_abstract
from flora_jax.models.functional import with_parameters
from flora_jax.models.spec import ViTSpec


def _transpose(array: np.ndarray) -> np.ndarray:
    return array.T


def _patch_kernel(array: np.ndarray) -> np.ndarray:
    """[D, C, p, p] -> [p*p*C, D]"""
    return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])


def _only(array: np.ndarray) -> np.ndarray:
    """[1, ...] -> [...]"""
    (only,) = array
    return only


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _table(spec: ViTSpec) -> dict[str, tuple[str, Callable]]:
    """timm name -> (our name, layout change)."""
    table = {
        "cls_token": ("cls_token", _only),
        "pos_embed": ("pos_embed", _only),
        "patch_embed.proj.weight": ("patch_embed.proj.kernel", _patch_kernel),
        "patch_embed.proj.bias": ("patch_embed.proj.bias", _same),
    }
    linears = ["head"]
    norms = ["norm"]
    for i in range(spec.depth):
        linears += [
            f"blocks.{i}.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        ]
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
    for name in linears:
        table[f"{name}.weight"] = (f"{name}.kernel", _transpose)
        table[f"{name}.bias"] = (f"{name}.bias", _same)
    for name in norms:
        table[f"{name}.weight"] = (f"{name}.scale", _same)
        table[f"{name}.bias"] = (f"{name}.bias", _same)
    return table


def from_state_dict(arrays: Mapping[str, np.ndarray], spec: ViTSpec) -> nnx.Module:
    """A dense model with these weights.

    Args:
      arrays: numpy arrays under timm's names, float32.
      spec: a dense spec that fits them.

    Raises:
      ValueError: keys are missing or unexpected, or a shape differs from the spec's.
    """
    table = _table(spec)
    missing, unexpected = table.keys() - arrays.keys(), arrays.keys() - table.keys()
    if missing or unexpected:
        raise ValueError(
            f"the weights do not fit the spec: missing {_few(missing)}, "
            f"unexpected {_few(unexpected)}"
        )
    parameters = {}
    for source, (target, change) in table.items():
        array = np.asarray(arrays[source], np.float32)
        try:
            parameters[target] = np.ascontiguousarray(change(array))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source} has an unexpected shape {array.shape}") from error
    return with_parameters(create_abstract(spec), parameters)


def _few(names: set[str], limit: int = 6) -> str:
    shown = ", ".join(sorted(names)[:limit]) or "none"
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def from_pretrained(path: epath.PathLike, spec: ViTSpec) -> nnx.Module:
    """A dense model from a `.safetensors` file under timm's DeiT names.

    Raises:
      FileNotFoundError, ValueError: no such file, another format, or weights of another shape.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name} is not a .safetensors file")
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable .safetensors file: {error}") from error
    return from_state_dict(arrays, spec)
