"""Programs that run a finished model: JAX, and where installed ONNX Runtime, OpenVINO, PyTorch."""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable

import jax
import numpy as np

from flora_jax.errors import InputError
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.weights.export.onnx import compiled_by_openvino, export_onnx, import_openvino
from flora_jax.weights.export.pytorch import export_torch, load_export

Forward = Callable[[], np.ndarray]  # one batch; its logits
# Of so many random images, or of these, float32 [B, H, W, C]; they wait on the device.
Prepare = Callable[[int | np.ndarray], Forward]

ENGINES = {
    "jax": "JAX",
    "onnxruntime": "ONNX Runtime",
    "onnxruntime_int8": "ONNX Runtime int8",
    "openvino": "OpenVINO",
    "openvino_float16": "OpenVINO float16",
    "openvino_int8": "OpenVINO int8",
    "pytorch": "PyTorch",
}
_OUT_OF_MEMORY = ("resource_exhausted", "out of memory", "allocate memory", "bad_alloc")


@dataclasses.dataclass(frozen=True)
class Engine:
    """A program that runs networks.

    Attributes:
      name: that tables show.
      version: of its package, and what of the machine it uses where that is a choice.
      open: loads a network; each engine keeps its own defaults.
    """

    name: str
    version: str
    open: Callable[[Network], Prepare]

    @property
    def key(self) -> str:
        """The name of it that configs take, one of `ENGINES`."""
        return next(key for key, name in ENGINES.items() if name == self.name)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def installed_engines(dtype: str = "float32") -> tuple[list[Engine], list[str]]:
    """The engines that can run here, and for each of the others a line how to get it.

    Args:
      dtype: of weights and activations in JAX; the others say theirs.
    """
    in_jax = functools.partial(_in_jax, dtype)
    version = " ".join([jax.__version__, *([dtype] if dtype != "float32" else [])])
    engines, hints = [Engine("JAX", version, in_jax)], []
    others = (
        ("ONNX Runtime", "onnx", _onnx_runtime),
        ("OpenVINO", "openvino", _openvino),
        ("PyTorch", "torch", _pytorch),
    )
    for name, extra, find in others:
        try:
            engines += find(name)
        except ImportError:
            hints.append(f"{name} is left out: pip install 'flora_jax[{extra}]' brings it")
    return engines, hints


def engine_of(key: str, dtype: str = "float32") -> Engine:
    """The engine of this name, one of `ENGINES`; `dtype` as in `installed_engines`.

    Raises:
      InputError: it is not installed, or does not run here.
    """
    engines, hints = installed_engines(dtype)
    for engine in engines:
        if engine.key == key:
            return engine
    here = ", ".join(engine.key for engine in engines)
    own = [hint for hint in hints if ENGINES[key].startswith(hint.partition(" is left out")[0])]
    raise InputError("; ".join([f"latency.engine {key!r} cannot run here, but {here} can", *own]))


def onnx_runtime() -> Engine | None:
    """ONNX Runtime in float32, where it is installed."""
    try:
        return _onnx_runtime("ONNX Runtime")[0]
    except ImportError:
        return None


def is_out_of_memory(error: Exception) -> bool:
    """True for an error by which an engine, or NumPy, says that memory does not suffice."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)


def _in_jax(dtype: str, network: Network) -> Prepare:
    """Compiled, with the weights as arguments on the first device, as `--predict` runs it."""
    structure, parameters = functional.split(network)
    device = jax.local_devices()[0]
    parameters = {name: p.astype(dtype) for name, p in parameters.items()}
    parameters = jax.device_put(parameters, device)
    run = jax.jit(lambda parameters, images: functional.merge(structure, parameters)(images))

    def prepare(batch: int | np.ndarray) -> Forward:
        images = jax.device_put(_images(network.spec, batch).astype(dtype), device)
        return lambda: np.asarray(run(parameters, images))

    return prepare


def _onnx_runtime(name: str) -> list[Engine]:
    """In float32, and where that is for CPUs, in 8 bits as well."""
    import onnx  # noqa: F401
    import onnxruntime

    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    is_on_gpu = has_cuda and jax.default_backend() == "gpu"
    device = "cuda" if is_on_gpu else "cpu"
    version = f"{onnxruntime.__version__} ({device})"
    dtypes = {name: "float32"} if is_on_gpu else {name: "float32", f"{name} int8": "int8"}
    return [
        Engine(engine, version, functools.partial(_in_onnx_runtime, device, dtype))
        for engine, dtype in dtypes.items()
    ]


def _in_onnx_runtime(device: str, dtype: str, network: Network) -> Prepare:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.onnx")
        export_onnx(network, path, dtype)
        providers = ["CUDAExecutionProvider"] if device == "cuda" else []
        session = onnxruntime.InferenceSession(path, providers=[*providers, "CPUExecutionProvider"])

    def prepare(batch: int | np.ndarray) -> Forward:
        images = _channels_first(network.spec, batch)
        inputs = {"images": onnxruntime.OrtValue.ortvalue_from_numpy(images, device, 0)}
        return lambda: session.run_with_ort_values(None, inputs)[0].numpy()

    return prepare


def _openvino(name: str) -> list[Engine]:
    """On the CPU, in float32 and from files of 16 and 8 bits, for one image at a time as fast as it
    can."""
    import onnx  # noqa: F401

    openvino = import_openvino()
    version = f"{openvino.__version__.partition('-')[0]} (cpu)"
    dtypes = {name: "float32", f"{name} float16": "float16", f"{name} int8": "int8"}
    return [
        Engine(engine, version, functools.partial(_in_openvino, dtype))
        for engine, dtype in dtypes.items()
    ]


def _in_openvino(dtype: str, network: Network) -> Prepare:
    # Else it computes in bfloat16 where a CPU can.
    precision = {"INFERENCE_PRECISION_HINT": "f32"} if dtype != "float16" else {}
    options = {"PERFORMANCE_HINT": "LATENCY"} | precision
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.onnx")
        export_onnx(network, path, dtype)
        compiled = compiled_by_openvino(path.read_bytes(), **options)

    def prepare(batch: int | np.ndarray) -> Forward:
        images = _channels_first(network.spec, batch)
        return lambda: compiled([images])[0]

    return prepare


def _pytorch(name: str) -> list[Engine]:
    import torch

    is_on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = "cuda" if is_on_gpu else "cpu"
    version = f"{torch.__version__} ({device})"
    return [Engine(name, version, functools.partial(_in_pytorch, device))]


def _in_pytorch(device: str, network: Network) -> Prepare:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        export_torch(network, folder)
        module = load_export(folder).eval().to(device)

    def prepare(batch: int | np.ndarray) -> Forward:
        images = torch.from_numpy(_channels_first(network.spec, batch)).to(device)

        def run() -> np.ndarray:
            with torch.inference_mode():
                return module(images).cpu().numpy()

        return run

    return prepare


def _images(spec: Spec, batch: int | np.ndarray) -> np.ndarray:
    """These, or so many random ones as after normalisation: float32 [B, H, W, C]."""
    if isinstance(batch, np.ndarray):
        return batch
    return np.random.default_rng(0).standard_normal((batch, *spec.image_shape), np.float32)


def _channels_first(spec: Spec, batch: int | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(_images(spec, batch).transpose(0, 3, 1, 2))
