"""The low-rank supernet, and the extraction of a subnet (FLORA, section 3).

    kernel of a layer = down[:r].T @ up[:r],    stored dense where r * (in + out) >= in * out

The published code counts the MACs of the cheaper form, but builds subnets with a pair of factors at
every rank below full; here the extracted network is what is counted.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.errors import InputError, unknown
from flora_jax.flora.layer import IMPLEMENTATIONS, RankedLinear, default_implementation
from flora_jax.flora.space import RankSpace
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.layers import check_images
from flora_jax.models.network import Network
from flora_jax.models.spec import LinearShape, Rank


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


def abstract_supernet(space: RankSpace, implementation: str | None = None) -> Supernet:
    """A supernet whose parameters are shapes without values: the target of a restore.

    Raises:
      InputError: the implementation is unknown.
    """
    implementation = implementation or default_implementation()
    if implementation not in IMPLEMENTATIONS:
        raise InputError(unknown("implementation", implementation, IMPLEMENTATIONS))
    ranks_of = {layer.name: c for layer, c in zip(space.spec.layers, space.choices, strict=True)}

    def ranked(layer: LinearShape, rank: Rank, *, rngs: nnx.Rngs) -> RankedLinear:
        return RankedLinear(layer, ranks_of[layer.name], implementation, rngs=rngs)

    return Supernet(create_abstract(space.spec, linear=ranked), space)


def _check_one_subnet(genes) -> None:
    if genes.ndim != 1:
        raise InputError(f"genes have shape {genes.shape}; pass one subnet at a time")


@jax.jit(static_argnums=0)
def _forward(structure, parameters, images, genes):
    return functional.merge(structure, parameters, genes)(images)
