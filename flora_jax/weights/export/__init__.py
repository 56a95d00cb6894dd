"""Files for other programs: the kinds of them, by the names that a config knows them by."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable

from flora_jax.errors import MissingPackageError
from flora_jax.weights.export.onnx import TOLERANCES, export_onnx
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
      tolerance: how far outputs may be from the model's, as a share of the largest.
    """

    path: str
    write: Callable[..., None]
    packages: tuple[str, ...] = ()
    extra: str = ""
    tolerance: float = 1e-4

    @property
    def is_coarse(self) -> bool:
        """True for an ONNX file of lower precision, whose accuracy may be another."""
        return self.tolerance > 1e-4


def _onnx(dtype: str) -> Export:
    name = "model.onnx" if dtype == "float32" else f"model_{dtype}.onnx"
    write = functools.partial(export_onnx, dtype=dtype)
    return Export(name, write, ("onnx", "onnxruntime"), "onnx", TOLERANCES[dtype])


EXPORTS = {
    "onnx": _onnx("float32"),
    "onnx_float16": _onnx("float16"),
    "onnx_int8": _onnx("int8"),
    "torch": Export("pytorch", export_torch, ("torch",), "torch"),
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
