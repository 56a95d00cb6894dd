"""The files that a model can be handed out as, by the names that a config knows them by."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable

from flora_jax.errors import MissingPackageError
from flora_jax.weights.export.onnx import export_onnx
from flora_jax.weights.export.pytorch import export_torch
from flora_jax.weights.export.stablehlo import export_stablehlo
from flora_jax.weights.export.timm import export_timm_folder


@dataclasses.dataclass(frozen=True)
class Export:
    """One kind of file.

    Attributes:
      path: its name beside others; of a folder where it has no ending.
      write: (model, path, images=) -> None; compares it with the model on these images, float32
        [B, H, W, C], or on random ones for None.
      extra: of this library, which has the packages that it takes to write and to compare.
    """

    path: str
    write: Callable[..., None]
    packages: tuple[str, ...] = ()
    extra: str = ""


_ONNX = ("onnx", "onnxruntime")
EXPORTS = {
    "onnx": Export("model.onnx", export_onnx, _ONNX, "onnx"),
    "onnx_float16": Export(
        "model_float16.onnx", functools.partial(export_onnx, dtype="float16"), _ONNX, "onnx"
    ),
    "torch": Export("torch", export_torch, ("torch",), "torch"),
    "stablehlo": Export("model.stablehlo.bin", export_stablehlo),
    "timm": Export("timm", export_timm_folder),
}


def check_packages(kinds: Iterable[str]) -> None:
    """Raises MissingPackageError, with the command that installs it, where a kind needs another."""
    for kind in kinds:
        export = EXPORTS[kind]
        missing = [name for name in export.packages if not importlib.util.find_spec(name)]
        if missing:
            raise MissingPackageError(
                f"export {kind!r} needs {' and '.join(missing)}, to write and to compare: "
                f"pip install 'flora_jax[{export.extra}]'"
            )
