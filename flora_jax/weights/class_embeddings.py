"""Embeddings of classes, as a network for texts made them, by which images are classified."""

import io

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from flora_jax.errors import InputError, MissingFileError
from flora_jax.evaluation.outputs import unit_vectors
from flora_jax.io.paths import user_path
from flora_jax.weights.metadata.class_names import CLASSES_FILE, read_class_names


def read_class_embeddings(path: epath.PathLike, width: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Reads a file of class embeddings for a network that embeds images.

    Args:
      path: a `.npy` [classes, D], whose names stand in a `classes.json` beside it; or a
        `.safetensors` with an array [D] for each name, or [n, D] of several texts for one.
      width: D of the network.

    Returns:
      Names, empty where nobody gave any; float32 [classes, D] at length one.

    Raises:
      MissingFileError: the file is not there.
      InputError: it cannot be read, or does not hold a finite vector of this width for each of two
        classes or more, and as many names.
    """
    path = user_path(path)
    if not path.exists():
        raise MissingFileError(f"no file {path} of class embeddings")
    try:
        if path.suffix == ".npy":
            loaded = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
            arrays = [*loaded.astype(np.float32)]
            names = read_class_names(path.parent)
        else:
            found = safetensors.load(path.read_bytes())
            names, arrays = tuple(found), [*found.values()]
    except (SafetensorError, ValueError, TypeError, EOFError) as error:
        raise InputError(f"{path} is no .npy or .safetensors of arrays: {error}") from error
    if len(arrays) < 2 or len(names or arrays) != len(arrays):
        raise InputError(
            f"{path} has {len(arrays)} classes and {len(names)} names; two or more are needed, and "
            f"of a .npy the names of all in {CLASSES_FILE} beside it, or of none"
        )
    vectors = []
    for name, array in zip(names or range(len(arrays)), arrays, strict=True):
        if array.shape[-1:] != (width,) or array.ndim > 2:
            raise InputError(
                f"{path}: {name} has shape {array.shape}; the network embeds in {width} dimensions"
            )
        texts = unit_vectors(jnp.atleast_2d(jnp.asarray(array, jnp.float32)))
        vectors.append(np.asarray(unit_vectors(texts.mean(axis=0))))
        if not abs(np.linalg.norm(vectors[-1]) - 1) < 1e-3:
            raise InputError(f"{path}: {name} is zero, NaN or infinite")
    return names, np.stack(vectors)
