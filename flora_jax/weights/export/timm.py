"""Weights under the names that timm gives them."""

import dataclasses
import logging

import numpy as np
from etils import epath
from safetensors.numpy import save

from flora_jax.io.files import replacing
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.weights.export.refusals import check_is_one_network, file_named
from flora_jax.weights.layouts import timm

log = logging.getLogger(__name__)


def export_timm(model: Network, path: epath.PathLike) -> None:
    """Writes a model as a `.safetensors` file under timm's names, float32.

    A dense model loads into timm as it is. A compressed one loads into this library and the
    published code, and a warning names the exports that run elsewhere: its searchable layers have
    the names of the published subnets, `X.VT.weight` [R, in], `X.U.weight` [out, R] and `X.U.bias`
    for a pair of factors, `X.fc.weight` and `X.fc.bias` for one that stayed dense.

    Raises:
      InputError: the model is a supernet, or `path` does not end in .safetensors.
    """
    path = file_named(path, ".safetensors")
    check_is_one_network(model)
    if model.spec != dataclasses.replace(model.spec, blocks=()):
        log.warning(
            "%s: timm cannot hold what is compressed (ranks, widths of single blocks, tokens that "
            "leave); flora.export_torch writes a folder that PyTorch runs, flora.export_onnx a "
            "file for other runtimes",
            path.name,
        )
    parameters = functional.split(model)[1]
    arrays: dict[str, np.ndarray] = {}
    for row in timm(model.spec):
        arrays |= row.write(np.asarray(parameters[row.target], np.float32))
    with replacing(path) as partial:
        partial.write_bytes(save(arrays, metadata={"format": "pt"}))
