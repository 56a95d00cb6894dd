"""Scores of every rank triple of one block, with all other blocks at full rank.

Only the block varies, so what comes before it is computed once a batch, and its attention half
once for each choice of the qkv rank. Every function here is compiled once per block shape.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from flora_jax.cluster.mesh import SPLIT, WHOLE, on_each_device, replicate
from flora_jax.evaluation import EvaluationSet, means, sum_metrics
from flora_jax.lowrank.supernet import Supernet
from flora_jax.models import functional


def score_block(
    supernet: Supernet, block: int, evaluation_set: EvaluationSet
) -> dict[str, np.ndarray]:
    """Metrics of each kept triple of `block`, in the order of `space.kept[block]`.

    Returns:
      {"top1": float64 [K], "log_likelihood": float64 [K]}

    Raises:
      ValueError: the network has no such block.
    """
    if not 0 <= block < supernet.space.num_blocks:
        raise ValueError(f"block {block} lies outside 0..{supernet.space.num_blocks - 1}")
    network, triples = supernet.network, supernet.space.kept[block]
    mesh = evaluation_set.mesh
    embed = _compiled(network, type(network).embed, mesh)
    classify = _compiled(network, type(network).classify, mesh)
    varied = network.blocks[block]
    attention = _compiled(varied, type(varied).attention_half, mesh)
    mlp = _compiled(varied, type(varied).mlp_half, mesh)
    whole = [_compiled(module, type(module).__call__, mesh) for module in network.blocks]
    full_rank = [
        functools.partial(run, triple)
        for run, triple in zip(whole, supernet.space.full_rank_triples, strict=True)
    ]

    sums: list[list[jax.Array]] = [[] for _ in triples]
    for images, labels, mask in evaluation_set.batches:
        before = embed(None, images)
        for run in full_rank[:block]:
            before = run(before)
        # The attention half depends on the gene of qkv alone.
        attended = {triple[0]: attention(triple, before) for triple in _one_of_each_qkv(triples)}
        for k, triple in enumerate(triples):
            x = mlp(triple, attended[triple[0]])
            for run in full_rank[block + 1 :]:
                x = run(x)
            sums[k].append(_sum_metrics(mesh, classify(None, x), labels, mask))
    return means(sums, evaluation_set.num_images)


def _one_of_each_qkv(triples: np.ndarray) -> np.ndarray:
    return triples[np.unique(triples[:, 0], return_index=True)[1]]


def _compiled(module, method: Callable, mesh: Mesh) -> Callable:
    """The method as a function of the module's genes (None where it has none) and a batch."""
    structure, parameters = functional.split(module)
    return functools.partial(_run, structure, method, mesh, replicate(parameters, mesh))


@jax.jit(static_argnums=(0, 1, 2))
def _run(structure, method, mesh, parameters, genes, batch):
    def on_one_device(parameters, genes, batch):
        return method(functional.merge(structure, parameters, genes), batch)

    in_specs = (WHOLE, WHOLE, SPLIT)
    return on_each_device(on_one_device, mesh, in_specs, SPLIT)(parameters, genes, batch)


@jax.jit(static_argnums=0)
def _sum_metrics(mesh, logits, labels, mask):
    return on_each_device(sum_metrics, mesh, SPLIT, SPLIT)(logits, labels, mask)
