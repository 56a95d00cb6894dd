"""What a training step of the supernet costs, beside its alternatives.

    python benchmarks/step.py --model deit_s --batch 16
    python benchmarks/step.py --model deit_b --batch 8 --rounds 30

Low-rank aware draws, a new subnet in every round; within a round all train the same subnet: the
sliced and the masked supernet, the dense network, and the supernet in plain eager PyTorch if torch
is installed. `spread` is the mean over the median. The last line fits the sliced step's time
against the multiply-adds of subnets from the smallest to the largest.

On Linux, GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment lets both sides allocate large
pages (docs/performance.md).
"""

import argparse
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from common import SIZES, describe_machine, median_ratio, time_in_turn, write_json

import flora_jax as flora
from flora_jax.data.normalize import Normalization
from flora_jax.mesh import make_mesh, shard_batch, shard_parameters
from flora_jax.models import functional
from flora_jax.report.table import human_count
from flora_jax.train.settings import TrainSettings
from flora_jax.train.step import initial_state, make_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="deit_s")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--fitted", type=int, default=30, help="draws that the line is fitted to")
    parser.add_argument("--compute_dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--without", nargs="*", default=[], help="leave out: masked dense torch")
    parser.add_argument("--json", type=pathlib.Path, help="also write the ratios to this file")
    arguments = parser.parse_args()

    spec = flora.deit(SIZES[arguments.model])
    space = flora.RankSpace.regular(spec)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (arguments.batch, *spec.image_shape), np.uint8)
    labels = rng.integers(0, spec.num_classes, arguments.batch).astype(np.int32)
    genes = space.sample(rng, arguments.rounds + 2, "low_rank_aware")
    spread_genes = from_small_to_large(space, arguments.fitted)
    machine = describe_machine(arguments.model, arguments.compute_dtype, f"batch {arguments.batch}")
    print(machine)

    networks = {
        "sliced": flora.factorize(flora.create(spec), space, implementation="sliced").network,
        "masked": flora.factorize(flora.create(spec), space, implementation="masked").network,
        "dense": flora.create(spec),
    }
    work = {}
    for name in [name for name in networks if name not in arguments.without]:
        step, seconds = compiled_step(networks[name], images, labels, arguments.compute_dtype)
        print(f"{name}: compiled in {seconds:.1f} s")
        work[name] = as_work(step, genes, name == "dense")
        if name == "sliced":
            sliced = step
    if "torch" not in arguments.without and (peer := torch_step(spec, images, labels, arguments)):
        ranks = [space.ranks(g).tolist() for g in genes]
        work["torch"] = lambda index: peer(ranks[index])
    times = time_in_turn(work, arguments.rounds)

    ratios = {
        f"sliced_over_{name}": median_ratio(times["sliced"], times[name])
        for name in times
        if name != "sliced"
    }
    print_table(times, ratios)
    seconds = time_in_turn({"sliced": lambda index: sliced(spread_genes[index])}, len(spread_genes))
    ratios |= print_fit(seconds["sliced"], space.macs(spread_genes))
    write_json(arguments.json, machine, ratios)


def from_small_to_large(space: flora.RankSpace, count: int) -> np.ndarray:
    """Genes int32 [count, L] whose multiply-adds span the space, in an order by chance."""
    least, most = space.macs_range()
    rng, width = np.random.default_rng(1), (most - least) / count
    windows = [(least + i * width, least + (i + 1) * width) for i in range(count)]
    return rng.permutation([space.sample_within(rng, 1, macs=window)[0] for window in windows])


def compiled_step(network, images, labels, compute_dtype: str):
    """step(genes) -> loss, waiting for it; and the seconds of compiling."""
    settings = TrainSettings(
        steps=10_000, batch_size=len(images), learning_rate=2.5e-5, compute_dtype=compute_dtype
    )
    graphdef, parameters = functional.split(network)
    mesh = make_mesh()
    state = shard_parameters(initial_state(parameters, settings), mesh)
    batch = shard_batch({"image": images, "label": labels}, mesh)
    step = make_step(graphdef, settings, Normalization(), mesh)
    genes = None
    if isinstance(getattr(network.blocks[0].attn.qkv, "ranks", None), tuple):
        genes = np.zeros(3 * len(network.blocks), np.int32)
    started = time.perf_counter()
    step = step.lower(state, batch, genes, None).compile()
    seconds = time.perf_counter() - started

    def run(genes) -> float:
        nonlocal state
        state, metrics = step(state, batch, genes, None)
        return float(metrics[0])

    return run, seconds


def as_work(step: Callable, genes: np.ndarray, is_dense: bool) -> Callable[[int], float]:
    return lambda index: step(None if is_dense else genes[index])


def torch_step(spec, images, labels, arguments):
    try:
        import torch
        import torch_peer
    except ImportError:
        print("torch is not installed: no peer")
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    normalized = np.asarray(Normalization()(jax.numpy.asarray(images)))
    model = torch_peer.build(spec)
    return torch_peer.make_step(model, normalized, labels, arguments.compute_dtype == "bfloat16")


def print_table(times: dict[str, list[float]], ratios: dict[str, float]) -> None:
    print(f"{'':8}{'s/step':>9}{'spread':>9}{'sliced over it':>16}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        spread = statistics.mean(seconds) / median
        ratio = ratios.get(f"sliced_over_{name}")
        print(f"{name:8}{median:>9.3f}{spread:>9.2f}" + (f"{ratio:>16.3f}" if ratio else ""))


def print_fit(seconds: list[float], macs: np.ndarray) -> dict[str, float]:
    """A straight line through time against sampled multiply-adds."""
    slope, intercept = np.polyfit(macs, seconds, 1)
    r_squared = np.corrcoef(macs, seconds)[0, 1] ** 2
    print(
        f"sliced: {1e9 * slope:.4f} s per G multiply-adds of an image, {intercept:.3f} s beside "
        f"them, R2 {r_squared:.3f}, over {human_count(macs.min())}..{human_count(macs.max())}"
    )
    return {"r_squared": float(r_squared)}


if __name__ == "__main__":
    main()
