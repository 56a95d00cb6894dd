"""Weight inheritance by SVD: a dense model's kernels as pairs of factors (FLORA, section 3).

    kernel = U S V^T,    down = (U S)^T, up = V^T;    of fc2 down = U^T, up = S V^T, as published

Ours is the norm in which the leading components are the best: that of a calibration, where one is
given (`flora_jax/closed_form/calibrate.py`), in the place of the identity's.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from flora_jax.errors import InputError, few
from flora_jax.flora.space import RankSpace
from flora_jax.flora.supernet import Supernet, abstract_supernet
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.models.spec import LinearShape

log = logging.getLogger(__name__)

_BYTES_OF_THREADS = 2**33


class InputMoments(Protocol):
    """Second moments of the layers' inputs, as `flora_jax.calibrate` makes them."""

    @property
    def num_images(self) -> int: ...

    @property
    def shrinkage(self) -> float: ...

    def check_fits(self, model: Network) -> None: ...

    def moment_of(self, layer: LinearShape) -> np.ndarray: ...

    def is_full_rank(self, layer: LinearShape, moment: np.ndarray) -> bool: ...

    def shrunk(self, moment: np.ndarray) -> np.ndarray: ...


def factorize(
    model: Network,
    space: RankSpace,
    *,
    calibration: InputMoments | None = None,
    implementation: str | None = None,
) -> Supernet:
    """A supernet that inherits a dense model's weights through an SVD of each kernel.

    Args:
      model: a dense model of `space.spec`.
      space: the ranks each layer may take.
      calibration: of this model; the leading components are then the best on what really enters the
        layer. None: the plain SVD, as published.
      implementation: "masked", "sliced", or None for what suits the platform.

    Raises:
      InputError: the model is not of the space's spec, the calibration is of another model, the
        implementation is unknown, or a kernel has no factors that are finite; names the layer.
    """
    if model.spec != space.spec:
        raise InputError("the model's spec is not the spec of the rank space")
    if calibration is not None:
        calibration.check_fits(model)
    parameters = functional.split(model)[1]
    layers = space.spec.layers
    kernels = [np.asarray(parameters.pop(f"{layer.name}.kernel")) for layer in layers]

    short_of_rank = []

    def factors(layer: LinearShape, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _check_finite(layer, "kernel", kernel)
        moment = None
        if calibration is not None:
            moment = calibration.moment_of(layer)
            _check_finite(layer, "second moment of its input", moment)
            if not calibration.is_full_rank(layer, moment):
                short_of_rank.append(layer.name)
            moment = calibration.shrunk(moment)
        try:
            with np.errstate(over="ignore"):  # what exceeds the dtype is found below
                pair = svd_factors(kernel, layer.singular_values_into, moment)
        except np.linalg.LinAlgError as error:
            raise InputError(f"{layer.name} cannot be factorised: {error}") from error
        if not all(np.isfinite(factor).all() for factor in pair):
            raise InputError(
                f"{layer.name} cannot be factorised: its factors exceed {kernel.dtype}"
            )
        return pair

    # A thread a layer: LAPACK's own threads stall one another for minutes on a busy machine.
    with threadpool_limits(1), ThreadPoolExecutor(_num_threads(layers)) as pool:
        pairs = zip(layers, pool.map(factors, layers, kernels), strict=True)
        for layer, (down, up) in pairs:
            parameters[f"{layer.name}.down"] = jnp.asarray(down)
            parameters[f"{layer.name}.up"] = jnp.asarray(up)
    if calibration is not None and short_of_rank:
        log.info(
            "%d images are few for what enters %s: the covariance of their tokens is evened out by "
            "a shrinkage of %g",
            *(calibration.num_images, few(short_of_rank), calibration.shrinkage),
        )
    network = abstract_supernet(space, implementation).network
    return Supernet(functional.with_parameters(network, parameters), space)


def _num_threads(layers: Sequence[LinearShape]) -> int:
    """As many as there are cores, and as have room for a moment and what becomes of it."""
    needed = 4 * 8 * max(layer.in_features for layer in layers) ** 2
    return max(1, min(os.cpu_count() or 1, _BYTES_OF_THREADS // needed))


def _check_finite(layer: LinearShape, what: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():  # of which LAPACK might never return
        raise InputError(f"{layer.name} cannot be factorised: its {what} is not finite")


def svd_factors(
    kernel: np.ndarray, singular_values_into: str, moment: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """kernel [in, out] -> down [R, in], up [R, out] with kernel = down.T @ up, R = min(in, out).

    Half precision is factorised in float32; the factors have the kernel's dtype.

    Args:
      moment: float64 [in, in], positive definite: the error that the leading r components leave is
        the least for every r in the norm of this matrix. None: in that of the identity.
    """
    wide = kernel.astype(np.promote_types(kernel.dtype, np.float32) if moment is None else float)
    if moment is None:
        left, sizes, up = np.linalg.svd(wide, full_matrices=False)
        down = left.T
    else:
        up = np.linalg.svd(np.linalg.cholesky(moment).T @ wide, full_matrices=False)[2]
        down = up @ wide.T  # exact at full rank, for the rows of `up` span those of the kernel
        sizes = np.linalg.norm(down, axis=1)
        down = down / np.where(sizes > 0, sizes, 1)[:, None]
    if singular_values_into == "down":
        down = down * sizes[:, None]
    else:
        up = up * sizes[:, None]
    return np.ascontiguousarray(down, kernel.dtype), np.ascontiguousarray(up, kernel.dtype)
