"""Weights under the names that timm gives them."""

import numpy as np
from etils import epath
from safetensors.numpy import save

from flora_jax.io.files import replacing
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.weights.export.refusals import check_is_one_network, file_named
from flora_jax.weights.layouts import timm


def export_timm(model: Network, path: epath.PathLike) -> None:
    """Writes a model as a `.safetensors` file under timm's names, float32.

    A dense model loads into timm as it is. In a compressed one the searchable layers have the names
    of the published subnets: `X.VT.weight` [R, in], `X.U.weight` [out, R] and `X.U.bias` for a pair
    of factors, `X.fc.weight` and `X.fc.bias` for one that stayed dense.

    Raises:
      InputError: the model is a supernet, or `path` does not end in .safetensors.
    """
    path = file_named(path, ".safetensors")
    check_is_one_network(model)
    parameters = functional.split(model)[1]
    arrays: dict[str, np.ndarray] = {}
    for row in timm(model.spec):
        arrays |= row.write(np.asarray(parameters[row.target], np.float32))
    with replacing(path) as partial:
        partial.write_bytes(save(arrays, metadata={"format": "pt"}))
