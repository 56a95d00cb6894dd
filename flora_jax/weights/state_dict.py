"""State dicts as files: arrays by name, from safetensors or PyTorch, in one file or several."""

import re
from collections.abc import Mapping

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from flora_jax.errors import InputError, MissingFileError, few
from flora_jax.io.files import on_disk, read_json
from flora_jax.io.paths import user_path
from flora_jax.weights.pytorch import read_pytorch

_SAFETENSORS, _PYTORCH = ".safetensors", (".pth", ".pt", ".bin", ".pth.tar")
_LFS_POINTER = b"version https://git-lfs"
_INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}$")
# What numpy can hold; other kinds, such as float8, are those of quantised weights.
_READABLE = re.compile(r"F64|F32|B?F16|[IU](64|32|16|8)|BOOL")


def read_state_dict(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a `.safetensors` file, or a `.pth`, `.pt`, `.bin` or `.pth.tar` of PyTorch.

    Half precision, bfloat16 too, becomes float32. An `.index.json` is read with all files that it
    lists. A training checkpoint of PyTorch gives its moving average where it has one, and its
    "model" or "state_dict" otherwise; it needs torch, and nothing but tensors and plain values is
    ever unpickled.

    Raises:
      MissingFileError: no such file, or a part of a sharded one is missing.
      InputError: another kind of file, a damaged one, one that holds other objects, one part of
        several, or a tensor of a kind that cannot be read; names file and tensor.
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
    read = _read_safetensors if path.name.endswith(_SAFETENSORS) else read_pytorch
    with on_disk(path) as file:
        with open(file, "rb") as opened:
            if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise InputError(f"{path} is a pointer of Git LFS to the weights: git lfs pull")
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
            for name in file.offset_keys():
                kind = file.get_slice(name).get_dtype()
                if not _READABLE.fullmatch(kind):
                    raise InputError(
                        f"{path}: {name} is stored as {kind}; quantised weights are not read, only "
                        f"F16, BF16, F32 and F64"
                    )
            return file.get_tensors()
    except SafetensorError as error:
        raise InputError(f"{path} is not a readable .safetensors file: {error}") from error
