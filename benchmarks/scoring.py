"""How many candidates a second the filter and the search can score.

    python benchmarks/scoring.py --model deit_s --batch 32

A random candidate on one batch in turn with the same forward pass in plain eager PyTorch, if torch
is installed; then every triple of one block in the middle, with the blocks before it computed once,
beside scoring the whole network for each.
"""

import argparse
import functools
import os
import pathlib
import time

import jax.numpy as jnp
import numpy as np
from common import MODELS, PAUSE, describe_machine, one_after_another, some_images, write_json

import flora_jax as flora
from flora_jax.cluster.memory import use_large_pages
from flora_jax.data.normalize import Normalization
from flora_jax.evaluation import EvaluationSet, evaluate
from flora_jax.search.block_scores import score_block
from flora_jax.timing import median_ratio, time_in_turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="deit_s")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--triples", type=int, default=27, help="of the block, spread evenly")
    parser.add_argument("--json", type=pathlib.Path, help="also write the ratios to this file")
    arguments = parser.parse_args()

    spec = MODELS[arguments.model]
    space = flora.RankSpace.regular(spec)
    supernet = flora.factorize(flora.create(spec), space)
    images, labels = some_images(spec, arguments.batch)
    batch = {"image": images, "label": labels, "mask": np.ones(arguments.batch, np.float32)}
    evaluation_set = EvaluationSet([batch], Normalization())
    machine = describe_machine(arguments.model, "float32", f"batch {arguments.batch}")
    print(machine)

    ratios = compare_with_torch(spec, space, supernet, images, evaluation_set, arguments.rounds)
    ratios |= compare_with_whole_networks(supernet, evaluation_set, arguments.triples)
    write_json(arguments.json, machine, ratios)


def compare_with_torch(spec, space, supernet, images, evaluation_set, rounds) -> dict[str, float]:
    genes = space.sample(np.random.default_rng(1), rounds, "uniform")
    score = functools.partial(evaluate, supernet, evaluation_set)
    work = {"ours": one_after_another(score, genes)}
    try:
        import torch
        import torch_peer
    except ImportError:
        print("torch is not installed: no peer")
    else:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        normalized = np.asarray(Normalization()(jnp.asarray(images)))
        forward = torch_peer.make_forward(torch_peer.build(spec), normalized)
        work["torch"] = one_after_another(forward, space.ranks(genes).tolist())
    times = time_in_turn(work, rounds, PAUSE)
    for name, milliseconds in times.items():
        median = np.median(milliseconds) / 1000
        print(f"{name}: {median:.3f} s a candidate, {len(images) / median:.1f} images/s")
    if "torch" not in times:
        return {}
    ratio = median_ratio(times["ours"], times["torch"])
    print(f"over_torch {ratio:.3f}")
    return {"over_torch": ratio}


def compare_with_whole_networks(supernet, evaluation_set, count: int) -> dict[str, float]:
    space = supernet.space
    block = space.num_blocks // 2
    kept = [space.full_rank_genes.reshape(-1, 3)[b : b + 1] for b in range(space.num_blocks)]
    triples = space.kept[block]
    kept[block] = triples[np.linspace(0, len(triples) - 1, count).round().astype(int)]
    local = flora.Supernet(supernet.network, space.keep(kept))
    genes = np.tile(space.full_rank_genes, (count, 1))
    genes[:, 3 * block : 3 * block + 3] = kept[block]

    def seconds(work) -> float:
        work()  # compiles
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    with_prefix = seconds(lambda: score_block(local, block, evaluation_set))
    whole = seconds(lambda: evaluate(supernet, evaluation_set, genes))
    print(
        f"block {block}, {count} triples: {count / with_prefix:.2f} candidates/s with what they "
        f"share computed once, {count / whole:.2f} as whole networks: {whole / with_prefix:.2f}x"
    )
    return {"prefix_speedup": whole / with_prefix}


if __name__ == "__main__":
    use_large_pages()  # as the command line does
    main()
