"""Weights under the names that timm gives them."""

import dataclasses
import logging

import numpy as np
from etils import epath
from safetensors.numpy import save

from flora_jax.io.files import replacing, write_json
from flora_jax.io.paths import user_path
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.models.spec_json import spec_to_json
from flora_jax.weights.export.checks import (
    check_computes,
    check_is_one_network,
    exactly,
    file_named,
    images_to_compare,
)
from flora_jax.weights.folder import SPEC_FILE, WEIGHTS_FILE, load_model
from flora_jax.weights.layouts import timm

log = logging.getLogger(__name__)
_TOLERANCE = 1e-5  # the same weights in the same program


def export_timm(model: Network, path: epath.PathLike) -> None:
    """Writes a model as a `.safetensors` file under timm's names, float32.

    A dense model loads into timm as it is; batch norms, which are folded here, do nothing there. A
    compressed one loads into this library and the published code, and a warning names the exports
    that run elsewhere: its searchable layers have the names of the published subnets,
    `X.VT.weight` [R, in], `X.U.weight` [out, R] and `X.U.bias` for a pair of factors,
    `X.fc.weight` and `X.fc.bias` for one that stayed dense.

    Raises:
      InputError: the model is a supernet, or `path` does not end in .safetensors.
    """
    path = file_named(path, ".safetensors")
    check_is_one_network(model)
    if model.spec != dataclasses.replace(model.spec, blocks=()):
        log.warning(
            "%s: timm cannot hold what is compressed; flora.export_torch writes a folder that "
            "PyTorch runs, flora.export_onnx a file for other runtimes",
            path.name,
        )
    parameters = functional.split(model)[1]
    arrays: dict[str, np.ndarray] = {}
    for row in timm(model.spec):
        arrays |= row.write(np.asarray(parameters[row.target], np.float32))
    with replacing(path) as partial:
        partial.write_bytes(save(arrays, metadata={"format": "pt"}))


def export_timm_folder(
    model: Network, folder: epath.PathLike, images: np.ndarray | None = None
) -> None:
    """Writes `model.safetensors` as `export_timm` does, and beside it the spec.

    `flora_jax.load` opens the folder, which is done to compare what was written.

    Args:
      images: float32 [B, H, W, C], normalised, to compare on; None: two random ones.

    Raises:
      InputError: as `export_timm`, images of another shape, or the file holds another model.
    """
    folder = user_path(folder)
    compared = images_to_compare(model, images)
    export_timm(model, folder / WEIGHTS_FILE)
    write_json(folder / SPEC_FILE, spec_to_json(model.spec))
    check_computes(exactly(load_model(folder)), exactly(model), compared, _TOLERANCE)
