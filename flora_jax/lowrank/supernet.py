"""The low-rank supernet: SVD weight inheritance in, any smaller network out (FLORA, section 3)."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from threadpoolctl import threadpool_limits

from flora_jax.errors import InputError, few, unknown
from flora_jax.lowrank.calibration import Calibration
from flora_jax.lowrank.layer import IMPLEMENTATIONS, RankedLinear, default_implementation
from flora_jax.lowrank.space import RankSpace
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.layers import check_images
from flora_jax.models.linear_shape import LinearShape, Rank
from flora_jax.models.network import Network

log = logging.getLogger(__name__)

_BYTES_OF_THREADS = 2**33


@dataclasses.dataclass(frozen=True)
class Supernet:
    """Every rank configuration of a space in one network that shares all weights.

    `network` is the model itself. Its genes are slots (`flora_jax.models.functional`), one a
    searchable layer; where nobody sets them, it is the network of full rank. `space` may keep fewer
    triples than the network was built for.

    Raises:
      InputError: the network's ranks are others than the space's choices, so that genes would mean
        other ranks than the space says; names the layer.
    """

    network: Network
    space: RankSpace

    def __post_init__(self):
        built = {
            ".".join(map(str, path)): module.ranks
            for path, module in nnx.iter_modules(self.network)
            if isinstance(module, RankedLinear)
        }
        for layer, ranks in zip(self.space.spec.layers, self.space.choices, strict=True):
            if built.get(layer.name) != ranks:
                raise InputError(
                    f"{layer.name} of the network takes the ranks {built.get(layer.name)}, of the "
                    f"space {ranks}; a supernet of another space is made anew by factorize"
                )

    def __call__(self, images: jax.Array, genes) -> jax.Array:
        """images float32 [B, H, W, C], genes int [L] (may be traced) -> logits [B, classes].

        Raises:
          InputError: images of another shape or dtype; genes of another length or out of range.
        """
        check_images(images, self.space.spec.image_shape)
        if isinstance(genes, jax.core.Tracer):
            if genes.shape != (self.space.num_layers,):
                raise InputError(
                    f"genes have shape {genes.shape}, expected ({self.space.num_layers},)"
                )
        else:
            genes = self.space.validate(genes)
            _check_one_subnet(genes)
        structure, parameters = functional.split(self.network)
        return _forward(structure, parameters, images, jnp.asarray(genes))


@jax.jit(static_argnums=0)
def _forward(structure, parameters, images, genes):
    return functional.merge(structure, parameters, genes)(images)


def factorize(
    model: Network,
    space: RankSpace,
    *,
    calibration: Calibration | None = None,
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
            "%d images leave the second moments of %s short of full rank; shrinkage of %g fills "
            "them",
            *(calibration.num_images, few(short_of_rank), calibration.shrinkage),
        )
    return Supernet(
        functional.with_parameters(_abstract_network(space, implementation), parameters), space
    )


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


def abstract_supernet(space: RankSpace, implementation: str | None = None) -> Supernet:
    """A supernet whose parameters are shapes without values: the target of a restore."""
    return Supernet(_abstract_network(space, implementation), space)


def _abstract_network(space: RankSpace, implementation: str | None) -> Network:
    implementation = implementation or default_implementation()
    if implementation not in IMPLEMENTATIONS:
        raise InputError(unknown("implementation", implementation, IMPLEMENTATIONS))
    ranks_of = {layer.name: c for layer, c in zip(space.spec.layers, space.choices, strict=True)}

    def ranked(layer: LinearShape, rank: Rank, *, rngs: nnx.Rngs) -> RankedLinear:
        return RankedLinear(layer, ranks_of[layer.name], implementation, rngs=rngs)

    return create_abstract(space.spec, linear=ranked)


def _check_one_subnet(genes: np.ndarray) -> None:
    if genes.ndim != 1:
        raise InputError(f"genes have shape {genes.shape}; pass one subnet at a time")


def extract(supernet: Supernet, genes) -> Network:
    """The chosen subnet as a smaller plain model, equal to the supernet at these genes.

    A layer whose factor pair would cost at least the dense matrix becomes one dense Linear.

    Raises:
      InputError: genes of another length or out of range.
    """
    genes = supernet.space.validate(genes)
    _check_one_subnet(genes)
    return extract_ranks(supernet, tuple(supernet.space.ranks(genes).tolist()))


def extract_ranks(supernet: Supernet, ranks: tuple[int, ...]) -> Network:
    """Extracts as `extract` does, at any ranks from 1 to full, also such as no choice lists."""
    space, parameters = supernet.space, functional.split(supernet.network)[1]
    space.spec.with_ranks(ranks)  # raises where they do not fit
    stored_ranks: list[Rank] = []
    for layer, rank in zip(space.spec.layers, ranks, strict=True):
        down = parameters.pop(f"{layer.name}.down")[:rank]
        up = parameters.pop(f"{layer.name}.up")[:rank]
        if layer.is_cheaper_dense(rank):
            kernel = jnp.matmul(down.T, up, precision="highest")  # it is kept for good
            parameters[f"{layer.name}.kernel"] = kernel
            stored_ranks.append(None)
        else:
            parameters |= {f"{layer.name}.down": down, f"{layer.name}.up": up}
            stored_ranks.append(rank)
    spec = space.spec.with_ranks(tuple(stored_ranks))
    return functional.with_parameters(create_abstract(spec), parameters)
