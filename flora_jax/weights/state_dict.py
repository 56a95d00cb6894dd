"""State dicts as files: arrays by name, from safetensors or PyTorch."""

import pickle
import zipfile

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file

from flora_jax.errors import InputError, MissingFileError, MissingPackageError
from flora_jax.io.files import on_disk

PYTORCH_SUFFIXES = (".pth", ".pt", ".bin")
_WRAPPERS = ("model", "state_dict")


def read_state_dict(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a `.safetensors` file, or of a `.pth`, `.pt` or `.bin` file of PyTorch.

    Half precision, bfloat16 too, becomes float32. A PyTorch file may hold its state dict under
    "model" or "state_dict". It needs torch, and nothing but tensors is ever unpickled.

    Raises:
      MissingFileError: no such file.
      InputError: another kind of file, a damaged one, or one that holds other objects.
      MissingPackageError: a PyTorch file, and torch is not installed.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise MissingFileError(f"no file {path}")
    suffixes = (".safetensors", *PYTORCH_SUFFIXES)
    if path.suffix not in suffixes:
        raise InputError(
            f"{path.name} is no file of weights: its name must end in {', '.join(suffixes)}"
        )
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pytorch
    with on_disk(path) as file:
        arrays = read(file)
    for name, array in arrays.items():
        if array.dtype.itemsize == 2 and array.dtype.kind in "fV":  # V: ml_dtypes' bfloat16
            arrays[name] = array.astype(np.float32)
    return arrays


def _read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is not a readable .safetensors file: {error}") from error


def _read_pytorch(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError(
            f"reading {path.name} needs PyTorch: pip install 'flora_jax[torch]'"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors (or is damaged), and nothing else is unpickled: "
            f"save the state dict alone, torch.save(model.state_dict(), ...). {_first_line(error)}"
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a readable PyTorch file: {_first_line(error)}") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        found = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else content
        raise InputError(
            f"{path} holds no state dict, flat or under {' or '.join(_WRAPPERS)}; found {found}"
        )
    return {name: _to_numpy(tensor) for name, tensor in content.items()}


def _to_numpy(tensor) -> np.ndarray:
    """A numpy array that shares the tensor's memory, except for bfloat16, which becomes float32."""
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
