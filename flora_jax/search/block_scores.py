"""Scores of every rank triple of one block, with all other blocks at full rank.

Only the block varies, so what comes before it is computed once a batch, and its attention half
once for each choice of the qkv rank. Every function here is compiled once per block shape.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from flora_jax.evaluation import EvaluationSet, means, sum_metrics
from flora_jax.lowrank.supernet import Supernet
from flora_jax.mesh import SPLIT, WHOLE, on_each_device, replicate
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
    full_rank = [_compiled(module, type(module).__call__, mesh) for module in network.blocks]

    sums = [[] for _ in triples]
    for images, labels, mask in evaluation_set.batches:
        before = embed(images)
        for run in full_rank[:block]:
            before = run(before)
        attended = {gene: attention(before, gene) for gene in np.unique(triples[:, 0])}
        for k, (qkv, fc1, fc2) in enumerate(triples):
            x = mlp(attended[qkv], (fc1, fc2))
            for run in full_rank[block + 1 :]:
                x = run(x)
            sums[k].append(_sum_metrics(mesh, classify(x), labels, mask))
    return means(sums, evaluation_set.num_images)


def _compiled(module, method: Callable, mesh: Mesh) -> Callable:
    """The method as a function of a batch's share and the genes, if it takes any."""
    graphdef, parameters = functional.split(module)
    return functools.partial(_run, graphdef, method, mesh, replicate(parameters, mesh))


@jax.jit(static_argnums=(0, 1, 2))
def _run(graphdef, method, mesh, parameters, batch, *genes):
    def on_one_device(parameters, batch, *genes):
        return method(functional.merge(graphdef, parameters), batch, *genes)

    in_specs = (WHOLE, SPLIT, *[WHOLE] * len(genes))
    return on_each_device(on_one_device, mesh, in_specs, SPLIT)(parameters, batch, *genes)


@jax.jit(static_argnums=0)
def _sum_metrics(mesh, logits, labels, mask):
    return on_each_device(sum_metrics, mesh, SPLIT, SPLIT)(logits, labels, mask)
