"""The network as an ONNX file, for runtimes without JAX."""

import importlib.util
import logging
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flora_jax.errors import InputError, MissingPackageError, unknown
from flora_jax.evaluation.outputs import outputs_of
from flora_jax.evaluation.quality import AGREEMENT
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.weights.export.checks import (
    Forward,
    check_computes,
    check_fits_in_a_file,
    exactly,
    file_named,
    images_to_compare,
    write_program,
)
from flora_jax.weights.export.onnx_networks import Graph, network

log = logging.getLogger(__name__)
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "int8": 3e-1}  # its accuracy is measured, too


def export_onnx(
    model: Network,
    path: epath.PathLike,
    dtype: str = "float32",
    images: np.ndarray | None = None,
) -> None:
    """Writes a model as an `.onnx` file, weights inside, for any batch size.

    The input "images" is float32 [B, C, H, W], normalised; the output is "logits" float32
    [B, num_classes], "numbers" or "embedding" where the outputs are such, or "features" [B, D] of a
    network without a head. The file's metadata say what they mean, as "outputs". The operations
    are those of opset 20. In ONNX Runtime and in OpenVINO, where they are installed, the file is
    run, and has to give what the model gives on this machine, within 1e-4 of the largest output.

    Args:
      dtype: "float32", or "float16" for weights and computation between input and output: half the
        size, outputs within 2e-2 of the largest; or "int8" for products with weights, for CPUs: a
        quarter of the size, outputs within 1e-1 of the largest; convolutions stay float32.
        Activations are scaled to 8 bits as they come, all of a batch alike, so that an image's
        output depends a little on the others. Of features it is their direction that is compared,
        as a share of their length: 2e-2 is a cosine of 0.9998, 1e-1 one of 0.995.
      images: float32 [B, H, W, C], normalised, to run the file on; None: two random ones.

    Raises:
      MissingPackageError: onnx is not installed, or for int8 ONNX Runtime.
      InputError: the model is a supernet or no plain network, `path` does not end in .onnx, another
        dtype, images of another shape, the weights exceed 2 GiB, or what was written computes
        something else.
      StorageError: the file cannot be written.
    """
    path = file_named(path, ".onnx")
    if dtype not in TOLERANCES:
        raise InputError(unknown("dtype", dtype, TOLERANCES))
    compared = images_to_compare(model, images)
    num_values = sum(value.size for value in functional.split(model)[1].values())
    smaller = "" if dtype == "float16" else "; dtype='float16' halves it"
    graph_dtype = "float32" if dtype == "int8" else dtype  # 8 bits come out of float32
    check_fits_in_a_file(num_values * np.dtype(graph_dtype).itemsize, path, smaller)
    for name in ("onnx", "onnxruntime") if dtype == "int8" else ("onnx",):
        try:
            importlib.import_module(name)
        except ImportError as error:
            install = "pip install 'flora_jax[onnx]'"
            raise MissingPackageError(f"export_onnx needs {name}: {install}") from error

    def check(content: bytes) -> None:
        by_direction = dtype != "float32" and outputs_of(model.spec).quality is AGREEMENT
        how = compared, TOLERANCES[dtype], by_direction
        for name, opened in (runtimes := installed_runtimes()).items():
            check_computes(opened(content), exactly(model), *how, f" in {name}")
        if not runtimes:
            log.warning("%s was not run to check it: pip install 'flora_jax[onnx]'", path.name)

    def make() -> bytes:
        written = _onnx_model(model, graph_dtype)
        return _in_8_bits(written) if dtype == "int8" else written.SerializeToString()

    write_program(path, make, check)


def _onnx_model(model: Network, dtype: str) -> Any:
    from onnx import helper

    graph, image = Graph(dtype), jax.ShapeDtypeStruct((1, *model.spec.image_shape), jnp.float32)
    height, width, channels = model.spec.image_shape
    is_float32 = dtype == "float32"
    x = network(graph, model, "images" if is_float32 else graph.cast("images", dtype))
    output = x if is_float32 else graph.cast(x, "float32")
    _, size = jax.eval_shape(lambda images: model(images), image).shape
    name = "logits" if outputs_of(model.spec).are_logits else model.spec.kind
    made = graph.model([channels, height, width], output, name, size)
    helper.set_model_props(made, {"outputs": model.spec.kind})
    return made


def _in_8_bits(model: Any) -> bytes:
    """The onnx.ModelProto with weights of products in 8 bits, a scale for each output."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    add_pre_process_metadata(model)  # otherwise it warns of steps that this graph does not need
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.onnx")
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            # Seven bits: on CPUs without VNNI, sums of products of eight do not fit into 16.
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        return path.read_bytes()


def installed_runtimes() -> dict[str, Callable[[bytes], Forward]]:
    """The programs that run such a file here, by their names."""
    known = {
        "onnxruntime": ("ONNX Runtime", in_onnx_runtime),
        "openvino": ("OpenVINO", in_openvino),
    }
    return dict(runtime for package, runtime in known.items() if importlib.util.find_spec(package))


def in_onnx_runtime(content: bytes) -> Forward:
    """The file's function of images [B, H, W, C]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of half floats that it cannot fold
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.transpose(0, 3, 1, 2)})[0]


def in_openvino(content: bytes) -> Forward:
    """The same, computed in float32 where the file leaves a choice."""
    compiled = compiled_by_openvino(content, INFERENCE_PRECISION_HINT="f32")
    return lambda images: compiled([images.transpose(0, 3, 1, 2)])[0]


def compiled_by_openvino(content: bytes, **options: str) -> Any:
    """The openvino.CompiledModel of an ONNX file, on the CPU. Raises as `import_openvino`."""
    core = import_openvino().Core()
    return core.compile_model(core.read_model(content), "CPU", options)


def import_openvino() -> Any:
    """The package; ImportError where it is not installed."""
    # It would tell its maker of each use, from a forked process, which threads of JAX do not bear.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")
