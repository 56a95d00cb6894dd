"""State dicts as files: arrays by name, from safetensors or PyTorch, in one file or several.

PyTorch is imported when a file of it is read.
"""

import argparse
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from flora_jax.errors import InputError, MissingFileError, MissingPackageError, few
from flora_jax.io.files import on_disk, read_json
from flora_jax.io.paths import user_path
from flora_jax.weights.detect import pick
from flora_jax.weights.metadata.fields import naming

_SAFETENSORS, _PYTORCH = ".safetensors", (".pth", ".pt", ".bin", ".pth.tar")
_WRAPPERS = ("model", "state_dict")
_LFS_POINTER = b"version https://git-lfs"
# What trainings leave beside the weights, and none of which executes anything; numpy and pathlib
# have moved some of it, and a file may name the old place or the new one.
_PLAIN: list[Any] = [argparse.Namespace, np.dtype, np.ndarray]
_PLAIN += [type(np.dtype(kind)) for kind in "?bhilqBHILQefd"]
_PATHS, _RECONSTRUCT = (pathlib.PosixPath, pathlib.PurePosixPath), np.zeros(0).__reduce__()[0]
_PLAIN += [(path, f"pathlib{at}.{path.__name__}") for path in _PATHS for at in ("", "._local")]
for _place in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _PLAIN += [(np.float64(0).__reduce__()[0], f"{_place}.scalar")]
    _PLAIN += [(_RECONSTRUCT, f"{_place}._reconstruct")]
_INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}$")


def read_state_dict(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a `.safetensors` file, or a `.pth`, `.pt`, `.bin` or `.pth.tar` of PyTorch.

    Half precision, bfloat16 too, becomes float32. An `.index.json` is read with all files that it
    lists. A training checkpoint of PyTorch gives its moving average where it has one, and its
    "model" or "state_dict" otherwise; it needs torch, and nothing but tensors and plain values,
    numpy's arrays, paths and argparse's Namespace among them, is ever unpickled.

    Raises:
      MissingFileError: no such file, or a part of a sharded one is missing.
      InputError: another kind of file, a damaged one, one that holds other objects, one part of
        several, or a tensor that numpy cannot hold; names the file.
      MissingPackageError: a PyTorch file, and torch is not installed.
    """
    path = user_path(path)
    if not path.is_file():
        raise MissingFileError(f"no file {path}")
    if path.name.endswith(_INDEX_SUFFIX):
        return _read_shards(path)
    if _SHARD.search(path.stem):
        raise InputError(f"{path} is one part of several: give the folder they are in")
    return _read_file(path)


def _read_file(path: epath.Path) -> dict[str, np.ndarray]:
    if not path.name.endswith((_SAFETENSORS, *_PYTORCH)):
        accepted = ", ".join((_SAFETENSORS, *_PYTORCH))
        raise InputError(f"{path.name} is no file of weights: its name must end in {accepted}")
    read = _read_safetensors if path.name.endswith(_SAFETENSORS) else _read_pytorch
    with naming(path), on_disk(path) as file:
        with open(file, "rb") as opened:
            if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise InputError("a pointer of Git LFS to the weights: git lfs pull")
        arrays = read(file)
    for name, array in arrays.items():
        if array.dtype.itemsize == 2 and array.dtype.kind in "fV":  # V: ml_dtypes' bfloat16
            arrays[name] = array.astype(np.float32)
    return arrays


def _read_shards(index: epath.Path) -> dict[str, np.ndarray]:
    """Every array that transformers' index lists, out of the files beside it."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(places, Mapping) or not all(isinstance(f, str) for f in places.values()):
        raise InputError(f"{index} has no weight_map of names and files")
    files = sorted(set(places.values()))
    if missing := [name for name in files if not (index.parent / name).is_file()]:
        raise MissingFileError(f"{index} lists files that are not there: {few(missing)}")
    arrays: dict[str, np.ndarray] = {}
    for name in files:
        arrays |= _read_file(index.parent / name)
    if lacking := places.keys() - arrays.keys():
        where = few({places[name] for name in lacking})
        raise InputError(f"{index} lists weights that are not in {where}: {few(lacking)}")
    return arrays


def _read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            return file.get_tensors()
    except (SafetensorError, AttributeError) as error:  # the latter of what numpy lacks: float8
        raise InputError(f"not a readable .safetensors file: {error}") from error


def _read_pytorch(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError(
            f"reading {path.name} needs PyTorch: pip install 'flora_jax[torch]'"
        ) from error
    try:
        with torch.serialization.safe_globals(_PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"holds more than tensors and plain values (or is damaged), and nothing else is "
            f"unpickled: save the state dict alone, torch.save(model.state_dict(), ...). Found was "
            f"{_reason(error)}"
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"not a readable PyTorch file: {_reason(error)}") from error
    found = _state_dicts(content)
    if not found:
        what = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else content
        raise InputError(
            f"no state dict, flat or under a key such as {' or '.join(_WRAPPERS)}; found {what}"
        )
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in found[pick(found, usual=_WRAPPERS)].items():
        try:
            is_bfloat16 = tensor.dtype == torch.bfloat16
            arrays[name] = (tensor.float() if is_bfloat16 else tensor).detach().numpy()
        except (TypeError, RuntimeError) as error:
            raise InputError(f"{name} is {tensor.dtype}, {tensor.layout}: {error}") from error
    return arrays


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


def _reason(error: Exception) -> str:
    """What torch's message says was found, without its advice, or its first line."""
    found = re.search(r"Unsupported \w+: (?:GLOBAL )?(\S+)", str(error))
    return found[1] if found else (str(error).strip().splitlines() or [""])[0]
