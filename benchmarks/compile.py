"""How long the supernet's training step compiles, cold and from the cache, and its peak memory.

    python benchmarks/compile.py --model deit_b --batch 8

Each figure is from a process of its own: sliced and masked, with an empty compilation cache and
with a filled one. A child compiles, takes three steps, and reports its peak memory.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile

import numpy as np
from common import MODELS, describe_machine, write_json

import flora_jax as flora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="deit_b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--child", choices=("sliced", "masked"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=pathlib.Path, help="also write the ratios to this file")
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments)
        return

    machine = describe_machine(arguments.model, "float32", f"batch {arguments.batch}")
    print(machine)
    print(f"{'':8}{'cold s':>9}{'cached s':>10}{'peak GiB':>10}")
    figures = {}
    for implementation in ("sliced", "masked"):
        with tempfile.TemporaryDirectory() as cache:
            cold, cached = (child(arguments, implementation, cache) for _ in range(2))
        figures[implementation] = cold
        print(
            f"{implementation:8}{cold['seconds']:>9.1f}{cached['seconds']:>10.1f}"
            f"{cold['peak_gib']:>10.2f}"
        )
        figures[implementation]["cached"] = cached["seconds"]
    ratios = {
        "peak_sliced_over_masked": figures["sliced"]["peak_gib"] / figures["masked"]["peak_gib"],
        "cold_over_cached": figures["sliced"]["seconds"] / figures["sliced"]["cached"],
    }
    print(f"peak of sliced over masked: {ratios['peak_sliced_over_masked']:.2f}")
    write_json(arguments.json, machine, ratios)


def child(arguments, implementation: str, cache: str) -> dict[str, float]:
    done = subprocess.run(
        [
            sys.executable,
            __file__,
            f"--model={arguments.model}",
            f"--batch={arguments.batch}",
            f"--child={implementation}",
        ],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> None:
    from step import supernet_step

    arguments.compute_dtype = "float32"
    step, seconds = supernet_step(arguments.child, arguments)
    space = flora.RankSpace.regular(MODELS[arguments.model])
    for genes in space.sample(np.random.default_rng(0), 3, "low_rank_aware"):
        step(genes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "peak_gib": peak}))


if __name__ == "__main__":
    main()
