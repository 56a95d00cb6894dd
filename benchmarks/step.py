"""Time of a training step of the supernet, beside its alternatives.

    python benchmarks/step.py --model deit_s --batch 16
    python benchmarks/step.py --model deit_b --batch 8 --rounds 30

Low-rank aware draws, a new subnet in every round; within a round all train the same subnet: the
sliced and the masked supernet, the dense network, and the supernet in plain eager PyTorch if torch
is installed, each in a process of its own. Each takes two steps and the second counts, for training
is one step after another, and a process that has waited has lost its caches and freed memory.
`spread` is the mean over the median. The last line fits the sliced step's time against the
multiply-adds of subnets from the smallest to the largest.

All have large pages where the system gives them when asked, as the command line has
(docs/performance.md).
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import time
from collections.abc import Callable

import jax
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
from flora_jax.cluster.mesh import make_mesh, shard_batch, shard_parameters
from flora_jax.data.normalize import Normalization
from flora_jax.models import functional
from flora_jax.report.table import human_count
from flora_jax.timing import median_ratio, time_in_turn
from flora_jax.training.settings import TrainSettings
from flora_jax.training.step import initial_state, make_step

UNTIMED = 1  # steps before each that is timed


def main() -> None:
    parser = parser_of(__doc__, "deit_s", batch=16, rounds=30)
    parser.add_argument("--fitted", type=int, default=30, help="draws that the line is fitted to")
    parser.add_argument("--compute_dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--without", nargs="*", default=[], help="leave out: masked dense torch")
    arguments = parser.parse_args()

    space = flora.RankSpace.regular(MODELS[arguments.model])
    genes = space.sample(np.random.default_rng(0), arguments.rounds, "low_rank_aware")
    spread_genes = from_small_to_large(space, arguments.fitted)
    machine = describe_machine(arguments.model, arguments.compute_dtype, f"batch {arguments.batch}")
    print(machine)

    names = [name for name in WORK if name not in arguments.without]
    if "torch" in names and (why := why_no_peer(MODELS[arguments.model])):
        print(f"{why}: no peer")
        names.remove("torch")
    steps = {name: in_own_process(name, arguments) for name in names}
    work = {name: one_after_another(step, genes, UNTIMED) for name, step in steps.items()}
    times = time_in_turn(work, arguments.rounds, PAUSE, UNTIMED)
    ratios = {
        f"sliced_over_{name}": median_ratio(times["sliced"], times[name])
        for name in names
        if name != "sliced"
    }
    print_table(times, ratios)
    work = {"sliced": one_after_another(steps["sliced"], spread_genes)}
    times = time_in_turn(work, arguments.fitted)
    ratios |= print_fit(times["sliced"], space.macs(spread_genes))
    write_json(arguments.json, machine, ratios)


def in_own_process(name: str, arguments: argparse.Namespace) -> Callable[[np.ndarray], float]:
    """step(genes) -> loss. Apart, as they would run: their memory and threads do not meet."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(theirs, name, arguments), daemon=True).start()
    print(f"{name}: ready, compiled in {ours.recv():.1f} s")

    def step(genes: np.ndarray) -> float:
        ours.send(genes)
        return ours.recv()

    return step


def serve(connection, name: str, arguments: argparse.Namespace) -> None:
    step, seconds = WORK[name](arguments)
    connection.send(seconds)
    with contextlib.suppress(EOFError):  # when the parent has what it wants
        while True:
            connection.send(step(connection.recv()))


def supernet_step(implementation: str, arguments: argparse.Namespace):
    spec = MODELS[arguments.model]
    space = flora.RankSpace.regular(spec)
    network = flora.factorize(flora.create(spec), space, implementation=implementation).network
    return compiled_step(network, space.full_rank_genes, arguments)


def dense_step(arguments: argparse.Namespace):
    step, seconds = compiled_step(flora.create(MODELS[arguments.model]), None, arguments)
    return lambda _: step(None), seconds


def torch_step(arguments: argparse.Namespace):
    import torch
    import torch_peer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    spec = MODELS[arguments.model]
    images, labels = some_images(spec, arguments.batch)
    normalized = np.asarray(Normalization()(jax.numpy.asarray(images)))
    is_bfloat16 = arguments.compute_dtype == "bfloat16"
    step = torch_peer.make_step(torch_peer.build(spec), normalized, labels, is_bfloat16)
    space = flora.RankSpace.regular(spec)
    return lambda genes: step(space.ranks(genes).tolist()), 0.0


WORK = {
    "sliced": functools.partial(supernet_step, "sliced"),
    "masked": functools.partial(supernet_step, "masked"),
    "dense": dense_step,
    "torch": torch_step,
}


def from_small_to_large(space: flora.RankSpace, count: int) -> np.ndarray:
    """Genes int32 [count, L] whose multiply-adds span the space, in an order by chance."""
    least, most = space.macs_range()
    rng, width = np.random.default_rng(1), (most - least) / count
    windows = [(least + i * width, least + (i + 1) * width) for i in range(count)]
    return rng.permutation([space.sample_within(rng, 1, macs=window)[0] for window in windows])


def compiled_step(network, genes: np.ndarray | None, arguments: argparse.Namespace):
    """step(genes) -> loss, waiting for it; and the seconds of compiling."""
    started = time.perf_counter()
    step, state, batch = compile_step(network, genes, arguments)
    seconds = time.perf_counter() - started

    def run(genes) -> float:
        nonlocal state
        state, metrics = step(state, batch, genes, None)
        return float(metrics[0])

    return run, seconds


def compile_step(network, genes: np.ndarray | None, arguments: argparse.Namespace):
    """A compiled step, and the state and the batch that it starts from."""
    images, labels = some_images(network.spec, arguments.batch)
    settings = TrainSettings(
        steps=10_000,
        batch_size=arguments.batch,
        learning_rate=2.5e-5,
        compute_dtype=arguments.compute_dtype,
    )
    structure, parameters = functional.split(network)
    mesh = make_mesh()
    state = shard_parameters(initial_state(structure, parameters, settings), mesh)
    batch = shard_batch({"image": images, "label": labels}, mesh)
    step = make_step(structure, settings, Normalization(), mesh)
    return step.lower(state, batch, genes, None).compile(), state, batch


def print_table(times: dict[str, np.ndarray], ratios: dict[str, float]) -> None:
    print(f"{'':8}{'s/step':>9}{'spread':>9}{'sliced over it':>16}")
    for name, milliseconds in times.items():
        median = np.median(milliseconds) / 1000
        spread = milliseconds.mean() / 1000 / median
        ratio = ratios.get(f"sliced_over_{name}")
        print(f"{name:8}{median:>9.3f}{spread:>9.2f}" + (f"{ratio:>16.3f}" if ratio else ""))


def print_fit(milliseconds: np.ndarray, macs: np.ndarray) -> dict[str, float]:
    """A straight line through time against sampled multiply-adds."""
    slope, intercept = np.polyfit(macs, milliseconds / 1000, 1)
    r_squared = np.corrcoef(macs, milliseconds)[0, 1] ** 2
    print(
        f"sliced: {1e9 * slope:.4f} s per G multiply-adds of an image, {intercept:.3f} s beside "
        f"them, R2 {r_squared:.3f}, over {human_count(macs.min())}..{human_count(macs.max())}"
    )
    return {"r_squared": float(r_squared)}


if __name__ == "__main__":
    use_large_pages()  # as the command line does
    main()
