"""Several seeds of one config: mean and spread of the result, as a Markdown table.

    python benchmarks/seeds.py --config configs/digits.py --workdir runs/seeds --seeds 0 1 2

Runs the command line once a seed in WORKDIR/seed_N; a finished run is not repeated. Further
arguments, such as --config.budget.macs="(0.38,0.4)", go to it as they are.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments, others = parser.parse_known_args()

    results = []
    for seed in arguments.seeds:
        workdir = arguments.workdir / f"seed_{seed}"
        command = [sys.executable, "-m", "flora_jax.main", f"--config={arguments.config}"]
        own = [f"--workdir={workdir}", f"--config.seed={seed}"]
        subprocess.run([*command, *own, *others], check=True)
        results.append(json.loads((workdir / "result.json").read_text()))
    print(summary(results))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"peak memory of a run: {peak:.1f} GiB")


def summary(results: list[dict]) -> str:
    """One row a model: top-1 of every seed, mean and standard deviation, points lost, savings."""
    lines = [
        "| model | top-1 % per seed | mean ± sd | against dense | fewer MACs | fewer params |",
        "|---|---|---|---|---|---|",
    ]

    def column(name: str, field: str) -> np.ndarray:
        return np.array([result[name][field] for result in results])

    for name in results[0]:
        top1 = 100 * column(name, "top1")
        change = (top1 - 100 * column("dense", "top1")).mean()
        saved = [
            100 * (1 - column(name, field) / column("dense", field)).mean()
            for field in ("macs", "params")
        ]
        lines.append(
            f"| {name} | {', '.join(f'{t:.2f}' for t in top1)} "
            f"| {top1.mean():.2f} ± {top1.std(ddof=min(1, len(top1) - 1)):.2f} "
            f"| {change:+.2f} | {saved[0]:.1f} % | {saved[1]:.1f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
