"""The network as one StableHLO program, weights inside, for whoever has JAX."""

from typing import Any

import jax
import numpy as np
from etils import epath
from jax import export

from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.weights.export.checks import (
    check_computes,
    check_fits_in_a_file,
    file_named,
    images_to_compare,
    write_program,
)

PLATFORMS = ("cpu", "cuda", "tpu")
_TOLERANCE = 1e-5  # the same program on the same machine; a compiler may choose anew each time


def export_stablehlo(
    model: Network, path: epath.PathLike, images: np.ndarray | None = None
) -> None:
    """Writes a model as a `.bin` file of `jax.export`, for CPU, CUDA and TPU, any batch size.

    `jax.export.deserialize(pathlib.Path(path).read_bytes()).call(images)` needs JAX alone. It takes
    float32 [B, H, W, C], normalised, and gives what the model does, compiled with its weights as
    constants: float32 logits [B, num_classes], or features [B, D] without a classifier.

    What reads it for sure is the version of JAX that wrote it, those released up to six months
    after it, and up to three weeks before: `jax.export` promises no more, see
    https://docs.jax.dev/en/latest/501/export.html#compatibility-guarantees. Keep the model, too.

    Args:
      images: float32 [B, H, W, C], normalised, on which the program is compared with the model;
        None: two random ones.

    Raises:
      InputError: the model is a supernet or no network, `path` does not end in .bin, images of
        another shape, the weights exceed 2 GiB, or the written program computes something else,
        which is never expected.
      StorageError: the file cannot be written.
    """
    path = file_named(path, ".bin")
    compared = images_to_compare(model, images)
    structure, parameters = functional.split(model)
    # From the host: parameters on several devices would tie the program to as many.
    constants: dict[str, Any] = {name: np.asarray(value) for name, value in parameters.items()}
    check_fits_in_a_file(sum(value.nbytes for value in constants.values()), path)
    compute = jax.jit(lambda parameters, images: functional.merge(structure, parameters)(images))
    # A program inside one: else what depends on weights alone, such as a Swin's biases for each
    # window, would be computed here and stored in full.
    forward = jax.jit(lambda images: compute(constants, images))

    def program() -> bytes:
        (batch,) = export.symbolic_shape("B")
        images = jax.ShapeDtypeStruct((batch, *model.spec.image_shape), np.float32)
        return bytes(export.export(forward, platforms=PLATFORMS)(images).serialize())

    def check(content: bytes) -> None:
        written = export.deserialize(bytearray(content)).call
        check_computes(
            lambda images: np.asarray(written(images)),
            lambda images: np.asarray(forward(images)),
            compared,
            _TOLERANCE,
        )

    write_program(path, program, check)
