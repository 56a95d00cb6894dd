"""Evaluation of many rank triples of one block, with all other blocks at ranks that stay.

Only the block varies, so what comes before it is computed once a batch, and its attention half
once for each choice of the qkv rank. Every function here is compiled once per block shape.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flora_jax.cluster.mesh import SPLIT, WHOLE, on_each_device, replicate
from flora_jax.evaluation.quality import CLASSIFICATION
from flora_jax.flora.supernet import Supernet
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.models.spec import LAYERS_PER_BLOCK

# (outputs of the network, target, mask [B]) -> sums over the images, float32 [1, M].
Measure = Callable[[Any, Any, jax.Array], jax.Array]


class BlockScorer:
    """The parts of a supernet, each compiled as a function of its own genes and a batch.

    Args:
      outputs: what becomes of the last block's tokens, as in `Quality`.
    """

    def __init__(
        self,
        supernet: Supernet,
        mesh: Mesh,
        outputs: Callable[[Network, jax.Array], Any] = CLASSIFICATION.outputs,
    ):
        network = replicated(supernet.network, mesh)
        compiled = functools.partial(compiled_method, mesh=mesh)
        self._mesh = mesh
        self._embed = compiled(network, type(network).embed)
        self._outputs = compiled(network, outputs)
        self._whole = [compiled(block, type(block).__call__) for block in network.blocks]
        self._attention = [compiled(block, type(block).attention_half) for block in network.blocks]
        self._mlp = [compiled(block, type(block).mlp_half) for block in network.blocks]

    def logits(self, images: jax.Array, genes: np.ndarray) -> jax.Array:
        """images float32 [B, H, W, C], genes int32 [L] -> logits [B, classes]."""
        return self._outputs(None, self._run(0, self._embed(None, images), genes))

    def sums(
        self,
        block: int,
        triples: np.ndarray,
        others: np.ndarray,
        batches: Iterable[tuple[jax.Array, jax.Array, jax.Array]],
        measure: Measure,
    ) -> list[list[jax.Array]]:
        """Sums of a measure for each triple of `block`, batch by batch, [devices, M] each.

        Args:
          triples: int32 [K, 3], of the block.
          others: int32 [L], genes of the other blocks.
          batches: images, targets and masks.
          measure: hashable.
        """
        sums: list[list[jax.Array]] = [[] for _ in triples]
        for images, target, mask in batches:
            before = self._embed(None, images)
            for run, triple in zip(self._whole[:block], _by_block(others), strict=False):
                before = run(triple, before)
            # The attention half depends on the gene of qkv alone.
            attended = {
                triple[0]: self._attention[block](triple, before)
                for triple in _one_of_each_qkv(triples)
            }
            for k, triple in enumerate(triples):
                x = self._run(block + 1, self._mlp[block](triple, attended[triple[0]]), others)
                found = _measured(measure, self._mesh, self._outputs(None, x), target, mask)
                sums[k].append(found)
        return sums

    def _run(self, first: int, x: jax.Array, genes: np.ndarray) -> jax.Array:
        """Takes tokens through all blocks from the first one on."""
        for run, triple in zip(self._whole[first:], _by_block(genes)[first:], strict=True):
            x = run(triple, x)
        return x


def _by_block(genes: np.ndarray) -> np.ndarray:
    return genes.reshape(-1, LAYERS_PER_BLOCK)


def _one_of_each_qkv(triples: np.ndarray) -> np.ndarray:
    return triples[np.unique(triples[:, 0], return_index=True)[1]]


def replicated(network: Network, mesh: Mesh) -> Network:
    """The same network, whole on every device."""
    structure, parameters = functional.split(network)
    return functional.merge(structure, replicate(parameters, mesh))


def compiled_method(module, method: Callable, mesh: Mesh) -> Callable:
    """The method as a function of the module's genes (None where it has none) and a batch.

    Args:
      method: or any function of the module and a batch.
    """
    structure, parameters = functional.split(module)
    return functools.partial(_run, structure, method, mesh, parameters)


@jax.jit(static_argnums=(0, 1, 2))
def _run(structure, method, mesh, parameters, genes, batch):
    def on_one_device(parameters, genes, batch):
        return method(functional.merge(structure, parameters, genes), batch)

    in_specs = (WHOLE, WHOLE, SPLIT)
    return on_each_device(on_one_device, mesh, in_specs, SPLIT)(parameters, genes, batch)


@jax.jit(static_argnums=(0, 1))
def _measured(measure, mesh, outputs, target, mask):
    return on_each_device(measure, mesh, SPLIT, SPLIT)(outputs, target, mask)
