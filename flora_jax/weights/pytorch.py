"""State dicts in files of PyTorch, which is imported when one is read."""

import argparse
import contextlib
import pickle
import re
import zipfile

import numpy as np
from etils import epath

from flora_jax.errors import InputError, MissingPackageError
from flora_jax.weights.detect import pick
from flora_jax.weights.metadata.fields import naming

_WRAPPERS = ("model", "state_dict")


def read_pytorch(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of a state dict, flat or in a training checkpoint; bfloat16 becomes float32.

    Of several state dicts in a checkpoint the moving average is read (`detect.pick`). Nothing but
    tensors and plain values, argparse's Namespace among them, is unpickled.

    Raises:
      MissingPackageError: torch is not installed.
      InputError: damaged, no state dict, other objects in it, or a tensor that is quantised,
        sparse or without values.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError(
            f"reading {path.name} needs PyTorch: pip install 'flora_jax[torch]'"
        ) from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors (or is damaged), and nothing else is unpickled: "
            f"save the state dict alone, torch.save(model.state_dict(), ...). {_reason(error)}"
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a readable PyTorch file: {_reason(error)}") from error
    tensors = _state_dict_in(content, path)
    return {name: _to_numpy(tensor, name, path) for name, tensor in tensors.items()}


def _state_dict_in(content, path: epath.Path) -> dict:
    found = _state_dicts(content)
    if not found:
        what = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else content
        raise InputError(
            f"{path} holds no state dict, flat or under a key such as "
            f"{' or '.join(_WRAPPERS)}; found {what}"
        )
    with naming(path):
        return found[pick(found, usual=_WRAPPERS)]


def _state_dicts(content) -> dict[str, dict]:
    """The state dicts in nested ones by their dotted keys, as far up as there are any."""
    if _is_state_dict(content):
        return {"": content}
    inner = content if isinstance(content, dict) else {}
    found = {name: value for name, value in inner.items() if _is_state_dict(value)}
    return found or {
        f"{name}.{key}": state_dict
        for name, value in inner.items()
        for key, state_dict in _state_dicts(value).items()
    }


def _is_state_dict(value) -> bool:
    import torch

    return isinstance(value, dict) and bool(value) and all(map(torch.is_tensor, value.values()))


def _to_numpy(tensor, name: str, path: epath.Path) -> np.ndarray:
    """A numpy array that shares the tensor's memory, except for bfloat16, which becomes float32."""
    import torch

    is_float8 = tensor.is_floating_point() and tensor.itemsize == 1
    if not (tensor.is_meta or tensor.is_quantized or is_float8) and tensor.layout == torch.strided:
        with contextlib.suppress(TypeError, RuntimeError):  # a kind of number that numpy lacks
            tensor = tensor.detach()
            return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    raise InputError(
        f"{path}: {name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; weights must be "
        f"dense and float16, bfloat16, float32 or float64"
    )


def _reason(error: Exception) -> str:
    """The line of torch's message that says what was found, or its first."""
    lines = str(error).strip().splitlines() or [""]
    return next((line.strip() for line in lines if re.search("Unsupported", line)), lines[0])
