"""Networks with pretrained weights, in any known layout of names."""

from collections.abc import Mapping

import numpy as np
from etils import epath

from flora_jax.errors import InputError, MissingFileError, few
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.weights.beside import check_description
from flora_jax.weights.detect import without_prefix
from flora_jax.weights.folder import SPEC_FILE, inside, load_model
from flora_jax.weights.hub import local_folder
from flora_jax.weights.load_parameters import load_parameters
from flora_jax.weights.metadata.fields import naming
from flora_jax.weights.metadata.spec import CONFIG_FILE, read_spec
from flora_jax.weights.state_dict import read_state_dict

HUGGING_FACE_FILES = tuple(
    name + suffix
    for name in ("model.safetensors", "pytorch_model.bin")
    for suffix in ("", ".index.json")
)


def from_pretrained(
    path: epath.PathLike, spec: Spec | None = None, *, strict: bool = True
) -> Network:
    """A model with the weights of a file or a folder.

    Args:
      path: a `.safetensors` file; a `.pth`, `.pt`, `.bin` or `.pth.tar` file of PyTorch (needs
        torch); a folder written by `flora_jax.save`; a Hugging Face folder, in one file or several;
        or `hf:owner/name` of the hub (needs huggingface_hub), and after it perhaps `@revision`.
      spec: the model to make; a folder that says what it holds, in our `spec.json` or in the
        `config.json` of Hugging Face or timm, needs none. How the weights are fitted to it, and
        what strict means, says `from_state_dict`. What stands beside the weights must not
        contradict it; with strict=False that is a warning.

    Raises:
      MissingFileError: nothing to read at `path`.
      MissingPackageError: a PyTorch file, and torch is not installed; likewise the hub.
      StorageError: the hub cannot be reached, and the cache does not hold the repository.
      InputError: not a file of weights, no spec, one that the file beside the weights contradicts,
        or weights that do not fit it; names the file.
    """
    path = local_folder(path)
    own = load_model(path) if (path / SPEC_FILE).exists() else None
    if own is None and path.is_dir():
        folder, path = path, _file_in(path)
        if spec is None and (folder / CONFIG_FILE).exists():
            spec = read_spec(folder)
    if own is not None and spec in (None, own.spec):
        return own
    if spec is None:
        raise InputError(
            f"{path} does not say what model it is of: pass a spec, such as deit('base')"
        )
    may_reset = not check_description(path, spec, strict)
    if own is None:
        arrays = read_state_dict(path)
    else:
        arrays = {name: np.asarray(p) for name, p in functional.split(own)[1].items()}
    with naming(path):
        return load_parameters(without_prefix(arrays, spec), spec, strict, may_reset)


def from_state_dict(
    arrays: Mapping[str, np.ndarray], spec: Spec, *, strict: bool = True
) -> Network:
    """A model with these weights, under the names of timm, Hugging Face, a release, or our own.

    What wrappers put before every name is left out. Position embeddings and relative position
    tables of another size are interpolated, as the library that has these names does it. A
    classifier that is missing, or has another number of classes, gives way to one of zeros, with a
    warning; a spec without classes leaves it out. Factor pairs of a compressed model are taken at
    the ranks they have. A NotFiniteWarning names what is NaN or infinite: it can be looked at, but
    neither factorised nor trained.

    Args:
      arrays: numpy arrays by name; float16, bfloat16, float32 or float64.
      spec: the model to make; a dense one takes the ranks of stored factor pairs.
      strict: False leaves missing weights at random values and ignores unexpected ones, with a
        warning that names them.

    Raises:
      InputError: unknown names, weights of another family, missing or unexpected ones, one of
        another shape, rank or kind of number than the spec's.
    """
    return load_parameters(without_prefix(arrays, spec), spec, strict)


def _file_in(folder: epath.Path) -> epath.Path:
    for name in HUGGING_FACE_FILES:
        if (folder / name).exists():
            return folder / name
    expected = ", ".join((SPEC_FILE, *HUGGING_FACE_FILES))
    files = few([path.name for path in folder.iterdir()]) if folder.exists() else "none"
    hint = inside(folder, SPEC_FILE, *HUGGING_FACE_FILES)
    raise MissingFileError(f"{folder} has no weights; looked for {expected}, found {files}{hint}")
