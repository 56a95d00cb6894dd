"""Candidates a second that the filter and the search can score.

    python benchmarks/scoring.py --model deit_s --batch 32

A random candidate on one batch in turn with the same forward pass in plain eager PyTorch, if torch
is installed; then every triple of one block in the middle, with the blocks before it computed once,
beside scoring the whole network for each; then a generation whose candidates are stopped early,
beside one that all see all images; then several candidates in one program, beside one by one.
"""

import dataclasses
import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import (
    MODELS,
    PAUSE,
    describe_machine,
    one_after_another,
    parser_of,
    some_images,
    why_no_peer,
    write_json,
)

import flora_jax as flora
from flora_jax.cluster.memory import use_large_pages
from flora_jax.data.normalize import Normalization
from flora_jax.evaluation.evaluate import EvaluationSet, evaluate, evaluate_images
from flora_jax.flora.evolution import image_scores
from flora_jax.flora.extras.halving import Races
from flora_jax.flora.filter import score_block
from flora_jax.models import functional
from flora_jax.timing import median_ratio, time_in_turn


def main() -> None:
    parser = parser_of(__doc__, "deit_s", batch=32, rounds=15)
    parser.add_argument("--triples", type=int, default=27, help="of the block, spread evenly")
    parser.add_argument("--candidates", type=int, default=20, help="of the generation")
    parser.add_argument("--at_once", type=int, default=4, help="candidates in one program")
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
    ratios |= compare_with_all_images(supernet, arguments.batch, arguments.candidates)
    ratios |= compare_with_one_by_one(supernet, images, arguments.at_once, arguments.rounds)
    write_json(arguments.json, machine, ratios)


def compare_with_torch(spec, space, supernet, images, evaluation_set, rounds) -> dict[str, float]:
    genes = space.sample(np.random.default_rng(1), rounds, "uniform")
    score = functools.partial(evaluate, supernet, evaluation_set)
    work = {"ours": one_after_another(score, genes)}
    if why := why_no_peer(spec):
        print(f"{why}: no peer")
    else:
        import torch
        import torch_peer

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


def compare_with_all_images(supernet, batch: int, count: int) -> dict[str, float]:
    """A generation of random candidates of one budget, a fifth of which are to be parents.

    The labels are what the full rank says, so that candidates differ in more than noise.
    """
    space = supernet.space
    images, _ = some_images(space.spec, 8 * batch)
    batches = [
        {"image": part, "label": np.zeros(batch, np.int32), "mask": np.ones(batch, np.float32)}
        for part in np.split(images, 8)
    ]
    plain = EvaluationSet(batches, Normalization())
    labels = evaluate_images(supernet, plain, space.full_rank_genes)["predicted"]
    scores = image_scores(supernet, plain.relabelled(labels), "log_likelihood")
    window = [round(share * space.spec.macs()) for share in (0.43, 0.46)]
    genes = space.sample_within(np.random.default_rng(2), count, window)
    costs, places = space.macs(genes), max(1, count // 5)
    of_all = dataclasses.replace(scores, rungs=(scores.num_images,))
    seconds, seen = [], []
    for each in (of_all, scores):
        started = time.perf_counter()
        raced = Races(each, [window], places).run(genes, costs, [[]])
        seconds.append(time.perf_counter() - started)
        seen.append(raced.num_seen.sum())
    images_ratio, time_ratio = seen[1] / seen[0], seconds[1] / seconds[0]
    print(
        f"{count} candidates, {places} places, {scores.num_images} images: "
        f"{count / seconds[0]:.2f} candidates/s on all of them, {count / seconds[1]:.2f} where "
        f"those behind are stopped: {images_ratio:.3f} of the images, {time_ratio:.3f} of the time"
    )
    return {"halving_images": images_ratio, "halving_time": time_ratio}


def compare_with_one_by_one(supernet, images, count: int, rounds: int) -> dict[str, float]:
    """The same forward pass of several candidates in one program, as `jax.vmap` makes it."""
    space = supernet.space
    genes = space.sample(np.random.default_rng(3), rounds * count, "uniform")
    groups = genes.reshape(-1, count, space.num_layers)
    normalized = Normalization()(jnp.asarray(images))
    structure, parameters = functional.split(supernet.network)

    def logits(parameters, normalized, genes):
        return functional.merge(structure, parameters, genes)(normalized)

    one, several = jax.jit(logits), jax.jit(jax.vmap(logits, (None, None, 0)))

    def one_by_one(group) -> None:
        jax.block_until_ready([one(parameters, normalized, genes) for genes in group])

    def at_once(group) -> None:
        jax.block_until_ready(several(parameters, normalized, group))

    ways = {"one_by_one": one_by_one, "at_once": at_once}
    work = {name: one_after_another(way, groups) for name, way in ways.items()}
    times = time_in_turn(work, rounds, PAUSE)
    ratio = median_ratio(times["at_once"], times["one_by_one"])
    print(f"{count} candidates in one program: {ratio:.2f} times the time of one by one")
    return {"at_once_over_one_by_one": ratio}


if __name__ == "__main__":
    use_large_pages()  # as the command line does
    main()
