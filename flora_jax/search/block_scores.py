"""Scores of every rank triple of one block, with all other blocks at full rank.

Only the block varies, so what comes before it is computed once a batch, and its attention half
once for each choice of the qkv rank. Every function here is compiled once per block shape.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from flora_jax.evaluation import EvaluationSet, means, sum_metrics
from flora_jax.lowrank.supernet import Supernet
from flora_jax.mesh import make_mesh, replicate
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
    embed = _compiled(network, type(network).embed)
    classify = _compiled(network, type(network).classify)
    varied = network.blocks[block]
    attention = _compiled(varied, type(varied).attention_half)
    mlp = _compiled(varied, type(varied).mlp_half)
    full_rank = [_compiled(module, type(module).__call__) for module in network.blocks]

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
            sums[k].append(sum_metrics(classify(x), labels, mask))
    return means(sums, evaluation_set.num_images)


def _compiled(module, method: Callable) -> Callable:
    graphdef, parameters = functional.split(module)
    parameters = replicate(parameters, make_mesh())
    return functools.partial(_run, graphdef, method, parameters)


@jax.jit(static_argnums=(0, 1))
def _run(graphdef, method, parameters, *arguments):
    return method(functional.merge(graphdef, parameters), *arguments)
