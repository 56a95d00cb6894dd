"""Checks of exports: refusals before anything is made, and comparison with the model after."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from flora_jax.errors import InputError
from flora_jax.flora.supernet import Supernet
from flora_jax.io.files import replacing
from flora_jax.io.paths import user_path
from flora_jax.models import functional
from flora_jax.models.network import Network

# protobuf (ONNX) and flatbuffers (jax.export) end at 2 GiB; what is not weights needs some of it.
LARGEST_FILE = 2**31 - 2**24
_BATCH = 2
Forward = Callable[[np.ndarray], np.ndarray]


def check_is_one_network(model: Any) -> None:
    """Raises InputError of a supernet, and of what is no network at all."""
    if isinstance(model, Supernet):
        raise InputError("a supernet holds many networks: extract one first, then export it")
    if not isinstance(model, Network):
        kind = type(model).__name__
        raise InputError(f"a {kind} cannot be exported; flora.slim.extract gives a network")


def check_fits_in_a_file(num_bytes: int, path: epath.Path, instead: str = "") -> None:
    """Raises InputError of more weights than one such file can hold."""
    if num_bytes > LARGEST_FILE:
        raise InputError(
            f"{num_bytes / 2**30:.2f} GiB of weights are too many for {path.name}: a "
            f"{path.suffix} file holds 2 GiB at most{instead}"
        )


def file_named(path: epath.PathLike, ending: str) -> epath.Path:
    """The path that the user means. Raises InputError unless it ends so and is no folder."""
    path = user_path(path)
    if path.suffix != ending:
        raise InputError(f"{path.name} must end in {ending}")
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file, such as {path / f'model{ending}'}")
    return path


def images_to_compare(model: Any, images: np.ndarray | None) -> np.ndarray:
    """The images that a written network is run on: those given, or else two random ones.

    Raises:
      InputError: as `check_is_one_network`, or those given are none that the network takes.
    """
    check_is_one_network(model)
    shape = model.spec.image_shape
    if images is None:
        return np.random.default_rng(0).normal(size=(_BATCH, *shape)).astype(np.float32)
    if images.dtype != np.float32 or images.shape[1:] != shape or not len(images):
        raise InputError(
            f"images to compare on are {images.dtype} {images.shape}; the network takes float32 "
            f"(B, {', '.join(map(str, shape))}), B at least 1"
        )
    return images


def exactly(model: Network) -> Forward:
    """The model's function, in float32 throughout; elsewhere than on CPU the default is less."""
    structure, parameters = functional.split(model)

    def run(images: np.ndarray) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(_forward(structure, parameters, images))

    return run


@jax.jit(static_argnums=0)  # compiled once for all files of a model
def _forward(structure, parameters, images):
    return functional.merge(structure, parameters)(images)


def check_computes(
    written: Forward,
    model: Forward,
    images: np.ndarray,
    tolerance: float,
    by_direction: bool = False,
    where: str = "",
) -> None:
    """Compares two functions of images float32 [B, H, W, C].

    Args:
      by_direction: of outputs that are features, of which people take the cosine, it is that of
        each image that is compared, as the distance of vectors of length 1.
      where: " in" the program that ran the written one, for the message.

    Raises:
      InputError: they differ by more than `tolerance` of the largest output, or of 1 where all are
        smaller, or the model's own outputs are not finite.
    """
    expected = model(images)
    if not np.isfinite(expected).all():
        raise InputError("the model's outputs are NaN or infinite on the images to compare on")
    given = written(images)
    difference, of = np.abs(given - expected).max() / max(1, np.abs(expected).max()), "the largest"
    if by_direction:
        difference, of = np.sqrt(2 - 2 * cosines(given, expected)).max(), "their length"
    if not difference <= tolerance:  # NaN where the written one overflows
        raise InputError(
            f"the written network computes something else{where}, so nothing is exported: its "
            f"outputs differ from the model's by {difference:.1e} of {of}, accepted is "
            f"{tolerance:g}"
        )


def cosines(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The cosine of each two rows of [n, D], float64 [n]."""
    pairs = (np.float64(rows) for rows in (features, others))
    one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in pairs)
    return np.minimum((one * other).sum(axis=1), 1)


def write_program(path: epath.Path, make: Callable[[], bytes], check: Callable[[bytes], None]):
    """Makes the bytes of a program and writes them; `path` is there once they pass the check.

    Raises:
      StorageError: the file cannot be written, which shows before the program is made.
    """
    with replacing(path) as partial:
        partial.write_bytes(b"")
        partial.write_bytes(make())
        check(partial.read_bytes())
