"""A DeiT supernet at full size: does a training step fit, and what does it cost?

    python benchmarks/full_size.py --model base --batch 8 --steps 3

Trains the low-rank supernet (random weights, 224 px, low-rank aware draws) with the dense model as
teacher in the step, exactly as the pipeline does, and prints one table: seconds a step, the
multiply-adds of the drawn subnet as a share of the dense model's, and the peak memory of the
process against the limit.
"""

import argparse
import os
import platform
import resource
import time

import jax
import numpy as np

import flora_jax as flora
from flora_jax.cluster.mesh import make_mesh
from flora_jax.data.normalize import Normalization
from flora_jax.models import functional
from flora_jax.report.table import human_count
from flora_jax.training.settings import TrainSettings
from flora_jax.training.step import initial_state, make_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "small", "base"), default="base")
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--implementation", choices=("masked", "sliced"), default="sliced")
    parser.add_argument("--limit_gib", type=float, default=16.0, help="memory limit to check")
    arguments = parser.parse_args()

    spec = flora.deit(arguments.model)
    print(
        f"DeiT-{arguments.model}, {spec.image_size} px, {human_count(spec.num_params())} "
        f"parameters, batch {arguments.batch}, {arguments.implementation}; jax {jax.__version__} "
        f"on {jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} cores)"
    )

    started = time.perf_counter()
    dense = flora.create(spec)
    space = flora.RankSpace.regular(spec)
    supernet = flora.factorize(dense, space, implementation=arguments.implementation)
    print(f"factorised in {time.perf_counter() - started:.1f} s")

    settings = TrainSettings(
        steps=arguments.steps, batch_size=arguments.batch, learning_rate=2.5e-5
    )
    structure, parameters = functional.split(supernet.network)
    teacher_structure, teacher_parameters = functional.split(dense)
    step = make_step(structure, settings, Normalization(), make_mesh(), teacher_structure)
    state = initial_state(structure, parameters, settings)
    del parameters, supernet

    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (arguments.batch, *spec.image_shape), dtype=np.uint8),
        "label": rng.integers(0, spec.num_classes, arguments.batch, dtype=np.int32),
    }
    all_genes = space.sample(rng, arguments.steps, "low_rank_aware")
    started = time.perf_counter()
    step = step.lower(state, batch, all_genes[0], teacher_parameters).compile()
    print(f"compiled in {time.perf_counter() - started:.1f} s")

    print("step  seconds  subnet MACs  share of dense    loss")
    for i, genes in enumerate(all_genes):
        started = time.perf_counter()
        state, metrics = step(state, batch, genes, teacher_parameters)
        loss = float(metrics[0])
        seconds, macs = time.perf_counter() - started, int(space.macs(genes))
        share = macs / spec.macs()
        print(f"{i:4d}  {seconds:7.2f}  {human_count(macs):>11}  {share:14.3f}  {loss:6.3f}")

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    verdict = "within" if peak <= arguments.limit_gib else "ABOVE"
    print(f"peak memory {peak:.1f} GiB, {verdict} the limit of {arguments.limit_gib:g} GiB")


if __name__ == "__main__":
    main()
