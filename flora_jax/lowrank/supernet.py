"""The low-rank supernet: SVD weight inheritance in, any smaller network out (FLORA, section 3)."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from threadpoolctl import threadpool_limits

from flora_jax.lowrank.layer import IMPLEMENTATIONS, RankedLinear, default_implementation
from flora_jax.lowrank.space import RankSpace
from flora_jax.models import create, create_abstract, functional
from flora_jax.models.layers import check_images
from flora_jax.models.spec import LinearShape, Rank


@dataclasses.dataclass(frozen=True)
class Supernet:
    """Every rank configuration of a space in one network that shares all weights.

    `network` is the model itself; its searchable layers take a gene each.
    """

    network: nnx.Module
    space: RankSpace

    def __call__(self, images: jax.Array, genes) -> jax.Array:
        """images float32 [B, H, W, C], genes int [L] (may be traced) -> logits [B, classes].

        Raises:
          ValueError: images of another shape or dtype; genes of another length or out of range.
        """
        check_images(images, self.space.spec.image_shape)
        if isinstance(genes, jax.core.Tracer):
            if genes.shape != (self.space.num_layers,):
                raise ValueError(
                    f"genes have shape {genes.shape}, expected ({self.space.num_layers},)"
                )
        else:
            genes = self.space.validate(genes)
            _check_one_subnet(genes)
        graphdef, parameters = functional.split(self.network)
        return _forward(graphdef, parameters, images, jnp.asarray(genes))


@jax.jit(static_argnums=0)
def _forward(graphdef, parameters, images, genes):
    return functional.merge(graphdef, parameters)(images, genes)


def factorize(
    model: nnx.Module, space: RankSpace, *, implementation: str | None = None
) -> Supernet:
    """A supernet that inherits a dense model's weights through the SVD of each kernel.

    Args:
      model: a dense model of `space.spec`.
      space: the ranks each layer may take.
      implementation: "masked", "sliced", or None for what suits the platform.

    Raises:
      ValueError: the model is not of the space's spec, or the implementation is unknown.
    """
    if model.spec != space.spec:
        raise ValueError("the model's spec is not the spec of the rank space")
    parameters = functional.split(model)[1]
    layers = space.spec.layers
    kernels = [np.asarray(parameters.pop(f"{layer.name}.kernel")) for layer in layers]
    sides = ["up" if _is_fc2(layer) else "down" for layer in layers]
    # A thread a layer: LAPACK's own threads stall one another for minutes on a busy machine.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        for layer, (down, up) in zip(layers, pool.map(svd_factors, kernels, sides), strict=True):
            parameters[f"{layer.name}.down"] = jnp.asarray(down)
            parameters[f"{layer.name}.up"] = jnp.asarray(up)
    return Supernet(
        functional.with_parameters(_abstract_network(space, implementation), parameters), space
    )


def svd_factors(kernel: np.ndarray, singular_values_into: str) -> tuple[np.ndarray, np.ndarray]:
    """kernel [in, out] -> down [R, in], up [R, out] with kernel = down.T @ up, R = min(in, out)."""
    left, singular_values, right = np.linalg.svd(kernel, full_matrices=False)
    down, up = left.T, right
    if singular_values_into == "down":
        down = down * singular_values[:, None]
    else:
        up = up * singular_values[:, None]
    return np.ascontiguousarray(down), np.ascontiguousarray(up)


def _is_fc2(layer: LinearShape) -> bool:
    """The published rule puts the singular values into the output side of fc2 only."""
    return layer.name.endswith("fc2")


def abstract_supernet(space: RankSpace, implementation: str | None = None) -> Supernet:
    """A supernet whose parameters are shapes without values: the target of a restore."""
    return Supernet(_abstract_network(space, implementation), space)


def _abstract_network(space: RankSpace, implementation: str | None) -> nnx.Module:
    implementation = implementation or default_implementation()
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; choose {', '.join(IMPLEMENTATIONS)}"
        )

    def build():
        network = create(space.spec)
        for layer, ranks in zip(space.spec.layers, space.choices, strict=True):
            parent, _, name = layer.name.rpartition(".")
            ranked = RankedLinear(
                layer.in_features,
                layer.out_features,
                ranks,
                implementation,
                use_bias=layer.use_bias,
                rngs=nnx.Rngs(0),
            )
            setattr(_submodule(network, parent), name, ranked)
        return network

    return nnx.eval_shape(build)


def _submodule(module: nnx.Module, path: str) -> nnx.Module:
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def _check_one_subnet(genes: np.ndarray) -> None:
    if genes.ndim != 1:
        raise ValueError(f"genes have shape {genes.shape}; pass one subnet at a time")


def extract(supernet: Supernet, genes) -> nnx.Module:
    """The chosen subnet as a smaller plain model, equal to the supernet at these genes.

    A layer whose factor pair would cost at least the dense matrix becomes one dense Linear.

    Raises:
      ValueError: genes of another length or out of range.
    """
    genes = supernet.space.validate(genes)
    _check_one_subnet(genes)
    return extract_ranks(supernet, tuple(supernet.space.ranks(genes).tolist()))


def extract_ranks(supernet: Supernet, ranks: tuple[int, ...]) -> nnx.Module:
    """As `extract`, for any rank from 1 to full, whether the space lists it or not."""
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
