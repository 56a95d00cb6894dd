"""Compile time of the supernet's training step, cold and from the cache, and its peak memory.

    python benchmarks/compile.py --model deit_b --batch 8

Each figure is from a process of its own: sliced and masked, with an empty compilation cache and
with a filled one. A child compiles, takes three steps, and reports its peak memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
from common import MODELS, describe_machine, parser_of, peak_gib, write_json

import flora_jax as flora


def main() -> None:
    parser = parser_of(__doc__, "deit_b", batch=8)
    parser.add_argument("--child", choices=("sliced", "masked"), help=argparse.SUPPRESS)
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
        figures[implementation] = cold | {"cached": cached["seconds"]}
        print(
            f"{implementation:8}{cold['seconds']:>9.1f}{cached['seconds']:>10.1f}"
            f"{cold['peak_gib']:>10.2f}"
        )
    ratios = {
        "peak_sliced_over_masked": figures["sliced"]["peak_gib"] / figures["masked"]["peak_gib"],
        "cold_over_cached": figures["sliced"]["seconds"] / figures["sliced"]["cached"],
    }
    print(f"peak of sliced over masked: {ratios['peak_sliced_over_masked']:.2f}")
    write_json(arguments.json, machine, ratios)


def child(arguments, implementation: str, cache: str) -> dict[str, float]:
    options = [f"--model={arguments.model}", f"--batch={arguments.batch}"]
    done = subprocess.run(
        [sys.executable, __file__, *options, f"--child={implementation}"],
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
    print(json.dumps({"seconds": seconds, "peak_gib": peak_gib()}))


if __name__ == "__main__":
    main()
