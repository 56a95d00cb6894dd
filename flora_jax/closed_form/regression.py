"""Least squares for a layer, from sums over rows of what enters it and of its target.

With x' what enters a layer and t its target, the layer becomes the ridge regression of t on x',

    W = (cov(x') + a I)^-1 (cov(x', t) + a W0),    bias = mean(t) - W^T mean(x'),

a = ridge * mean variance of x', W0 the weight that it had; at a rank r the matrix of that rank
nearest to W in the norm of cov(x') + a I (reduced-rank regression).
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.cluster.mesh import AXES
from flora_jax.flora.svd import svd_factors
from flora_jax.models.layers import LayerNorm
from flora_jax.models.spec import Rank

RIDGE = 0.1  # docs/decisions.md
Arrays = dict[str, np.ndarray]
Sums = dict[str, np.ndarray]


class Rows(NamedTuple):
    """What enters a layer of the smaller network, and its target, [M, in] and [M, out].

    Of qkv and fc1, in place of the target, what enters them in the dense network.
    """

    inputs: jax.Array
    target: jax.Array


def sums_over(rows: Rows, weights: jax.Array) -> dict[str, jax.Array]:
    """Sums over the rows of all devices, about the means `at_x` and `at_t`.

    Float32 cannot tell a small spread from a large mean: sums about zero would lose it.
    """
    count, x, t = jax.lax.psum((weights.sum(), weights @ rows.inputs, weights @ rows.target), AXES)
    count = jnp.maximum(count, jnp.finfo(jnp.float32).tiny)
    at_x, at_t = x / count, t / count
    inputs, target = rows.inputs - at_x[None], rows.target - at_t[None]
    weighted = inputs * weights[:, None]
    sums = {
        "count": weights.sum(),
        "x": weighted.sum(0),
        "t": weights @ target,
        "xx": jnp.matmul(weighted.T, inputs, precision="highest"),
        "xt": jnp.matmul(weighted.T, target, precision="highest"),
    }
    return jax.lax.psum(sums, AXES) | {"at_x": at_x, "at_t": at_t}


def added_up(batches: Iterable[Mapping[str, jax.Array]]) -> Sums:
    """Adds up sums of batches, float64; of `sums_over` about zero then, not about their means."""
    on_devices: dict[str, jax.Array] = {}  # products: to the host and into float64 but once
    vectors: dict[str, list[np.ndarray]] = {}
    for sums in batches:
        for name, found in sums.items():
            if found.ndim < 2:
                vectors.setdefault(name, []).append(np.asarray(found))
            else:
                on_devices[name] = on_devices.get(name, 0.0) + found
    each = {name: np.array(found, np.float64) for name, found in vectors.items()}
    if not (products := {n: np.array(found, np.float64) for n, found in on_devices.items()}):
        return {name: found.sum(0) for name, found in each.items()}
    count, x, t, at_x, at_t = (each[name] for name in ("count", "x", "t", "at_x", "at_t"))
    all_x, all_t = (own + count[:, None] * at for own, at in ((x, at_x), (t, at_t)))
    products["xx"] += at_x.T @ x + all_x.T @ at_x
    products["xt"] += at_x.T @ t + all_x.T @ at_t
    return {"count": np.asarray(count.sum()), "x": all_x.sum(0), "t": all_t.sum(0), **products}


def fit_layer(
    sums: Mapping[str, np.ndarray],
    start: Mapping[str, Any],
    is_target: bool,
    ridge: float,
    rank: Rank = None,
    singular_values_into: str = "down",
) -> Arrays:
    """The parameters of one layer, from sums over its rows.

    A bias that is not stored, or lacks the key's part, cannot take up a mean: then moments about
    zero stand for covariances, and a bias in parts stays as it was.

    Args:
      sums: float64: count []; x [in], t [out] and the products xx [in, in], xt [in, out].
      start: kernel [in, out], whose dtype the result has, and the bias if there is one.
      is_target: False: t is what enters the dense layer, and the target what `start` makes of it.
    """
    dtype, bias = np.asarray(start["kernel"]).dtype, start.get("bias")
    kernel = np.asarray(start["kernel"], float)
    count = sums["count"]
    mean_x, mean_t = sums["x"] / count, sums["t"] / count
    moment, across = sums["xx"] / count, sums["xt"] / count
    size = len(moment)
    floor = np.finfo(np.float32).eps * np.trace(moment) / size
    takes_mean = bias is not None and len(bias) == kernel.shape[1]
    if takes_mean:
        moment, across = (
            moment - np.outer(mean_x, mean_x),
            across - np.outer(mean_x, mean_t),
        )
    if not is_target:
        across, mean_t = across @ kernel, mean_t @ kernel
        mean_t = mean_t + np.asarray(bias, float) if takes_mean else mean_t
    pull = ridge * max(np.trace(moment) / size, floor, np.finfo(np.float32).tiny)
    moment = moment + pull * np.eye(size)
    fitted = np.linalg.solve(moment, across + pull * kernel)
    if rank is None:
        found = {"kernel": fitted}
    else:
        down, up = svd_factors(fitted, singular_values_into, moment)
        found = {"down": down[:rank], "up": up[:rank]}
        fitted = down[:rank].T @ up[:rank]
    if bias is not None:
        found["bias"] = mean_t - mean_x @ fitted if takes_mean else np.asarray(bias)
    return {name: array.astype(dtype) for name, array in found.items()}


def fit_norm(sums: Mapping[str, np.ndarray], norm: LayerNorm, ridge: float) -> None:
    """Fits scale and bias, value by value, to sums over what they multiply and what is missing."""
    mean_x, mean_t = sums["x"] / sums["count"], sums["t"] / sums["count"]
    variance, across = (
        np.diag(sums[name]) / sums["count"] - mean_x * mean
        for name, mean in (("xx", mean_x), ("xt", mean_t))
    )
    scale = (across + ridge * np.asarray(norm.scale[...], float)) / (variance + ridge)
    norm.scale[...] = jnp.asarray(scale, norm.scale.dtype)
    norm.bias[...] = jnp.asarray(mean_t - scale * mean_x, norm.bias.dtype)
