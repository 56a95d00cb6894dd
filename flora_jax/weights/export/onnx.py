"""The network as an ONNX file, for runtimes without JAX."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flora_jax.errors import InputError, MissingPackageError, unknown
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.weights.export.checked import (
    Forward,
    check_computes,
    exactly,
    images_to_compare,
    write_program,
)
from flora_jax.weights.export.onnx_graph import Graph
from flora_jax.weights.export.onnx_networks import network
from flora_jax.weights.export.refusals import (
    check_fits_in_a_file,
    check_is_one_network,
    file_named,
)

log = logging.getLogger(__name__)
TOLERANCES = {"float32": 1e-4, "float16": 2e-2}


def export_onnx(
    model: Network,
    path: epath.PathLike,
    dtype: str = "float32",
    images: np.ndarray | None = None,
) -> None:
    """Writes a model as an `.onnx` file, weights inside, for any batch size.

    The input "images" is float32 [B, C, H, W], normalised; the output is "logits" float32
    [B, num_classes], or "features" [B, D] of a network without a classifier. The operations are
    those of opset 20. Where ONNX Runtime is installed, the file is run, and has to give what the
    model gives on this machine, within 1e-4 of the largest output.

    Args:
      dtype: "float32", or "float16" for weights and computation between input and output: half the
        size, outputs within 2e-2 of the largest.
      images: float32 [B, H, W, C], normalised, to run the file on; None: two random ones.

    Raises:
      MissingPackageError: onnx is not installed.
      InputError: the model is a supernet or no plain network, `path` does not end in .onnx, another
        dtype, images of another shape, the weights exceed 2 GiB, or what was written computes
        something else.
      StorageError: the file cannot be written.
    """
    path = file_named(path, ".onnx")
    if dtype not in TOLERANCES:
        raise InputError(unknown("dtype", dtype, TOLERANCES))
    check_is_one_network(model)
    compared = images_to_compare(model.spec, images)
    num_values = sum(value.size for value in functional.split(model)[1].values())
    smaller = "; dtype='float16' halves it" if dtype == "float32" else ""
    check_fits_in_a_file(num_values * np.dtype(dtype).itemsize, path, smaller)
    _check_is_installed()

    def check(content: bytes) -> None:
        if (written := _in_onnx_runtime(content)) is None:
            log.warning("%s was not run to check it: pip install 'flora_jax[onnx]'", path.name)
            return
        check_computes(written, exactly(model), compared, TOLERANCES[dtype])

    write_program(path, lambda: _onnx_model(model, dtype).SerializeToString(), check)


def _check_is_installed() -> None:
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "export_onnx needs onnx: pip install 'flora_jax[onnx]'"
        ) from error


def _onnx_model(model: Network, dtype: str) -> Any:
    spec, graph = model.spec, Graph(dtype)
    height, width, channels = spec.image_shape
    images, is_float32 = "images", dtype == "float32"
    x = network(graph, model, images if is_float32 else graph.cast(images, dtype))
    output = x if is_float32 else graph.cast(x, "float32")
    name, features = (
        ("logits", spec.num_classes) if spec.num_classes else ("features", _width(model))
    )
    return graph.model({images: ["B", channels, height, width]}, output, {name: ["B", features]})


def _width(model: Network) -> int:
    """Of the pooled feature."""
    image = jax.ShapeDtypeStruct((1, *model.spec.image_shape), jnp.float32)
    return jax.eval_shape(lambda images: model(images), image).shape[-1]


def _in_onnx_runtime(content: bytes) -> Forward | None:
    """The file's function of images [B, H, W, C]; None where ONNX Runtime is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of half floats that it cannot fold
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.transpose(0, 3, 1, 2)})[0]
