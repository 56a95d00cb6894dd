"""Several seeds of one config: mean and spread of the result, as Markdown tables.

    python benchmarks/seeds.py --config configs/digits.py --workdir runs/seeds --seeds 0 1 2

Runs the command line once a seed in WORKDIR/seed_N; a finished run is not repeated. Further
arguments, such as --config.budget.macs="(0.38,0.4)", go to it as they are. The second table
compares the subnet with its baselines image by image, over all seeds.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys

import numpy as np
from safetensors.numpy import load_file

from flora_jax.evaluation.comparison import baseline_pairs, compare, kind_of
from flora_jax.io.files import write_json
from flora_jax.report.table import difference_text, in_points, named_entries
from flora_jax.timing import describe_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    arguments, others = parser.parse_known_args()

    workdirs = [arguments.workdir / f"seed_{seed}" for seed in arguments.seeds]
    for seed, workdir in zip(arguments.seeds, workdirs, strict=True):
        command = [sys.executable, "-m", "flora_jax.main", f"--config={arguments.config}"]
        own = [f"--workdir={workdir}", f"--config.seed={seed}"]
        subprocess.run([*command, *own, *others], check=True)
    results = [json.loads((workdir / "result.json").read_text()) for workdir in workdirs]
    tested = [workdir / "test_images.safetensors" for workdir in workdirs]
    print(f"{summary(results)}\n\n{comparison(tested)}\n")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"peak memory of a run: {peak:.1f} GiB")
    if arguments.json:
        found = {"machine": describe_device(), "peak_gib": peak, "results": results}
        write_json(arguments.json, found | {"differences": differences(tested)})


def summary(results: list[dict]) -> str:
    """One row a model: top-1 of every seed, mean and standard deviation, points lost, savings."""
    lines = [
        "| model | top-1 % per seed | mean ± sd | against dense | fewer MACs | fewer params |",
        "|---|---|---|---|---|---|",
    ]
    entries = [named_entries(result) for result in results]

    def column(name: str, field: str) -> np.ndarray:
        return np.array([seed[name][field] for seed in entries])

    for name in entries[0]:
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


def comparison(paths: list[pathlib.Path]) -> str:
    """One row for the subnet against each other model: differences of the mean over the seeds.

    Ends the program with one line where a file is missing or holds other test images.
    """
    lines = [
        "| model | against | points of top-1 (95 %) | log-likelihood (95 %) |",
        "|---|---|---|---|",
    ]
    for name, others in differences(paths).items():
        for other, difference in others.items():
            points = difference_text(in_points(difference["top1"]))
            likelihood = difference_text(difference["log_likelihood"], digits=4)
            lines.append(f"| {name} | {other} | {points} | {likelihood} |")
    return "\n".join(lines)


def differences(paths: list[pathlib.Path]) -> dict[str, dict[str, dict]]:
    """Of `compare`; the intervals are for other test images, with these trained models."""
    results = mean_over_seeds(paths)
    pairs = [pair for pair in baseline_pairs(results) if kind_of(pair[0]) == "subnet"]
    return compare(results, pairs)


def mean_over_seeds(paths: list[pathlib.Path]) -> dict[str, dict[str, np.ndarray]]:
    """Reads what each model made of each test image, and averages it over the seeds.

    Returns:
      {model: {"is_correct": float64 [n], "log_likelihood": float64 [n]}}
    """
    for path in paths:
        if not path.exists():
            sys.exit(f"{path} is missing: an earlier version of flora_jax has made this run")
    seeds = [load_file(path) for path in paths]
    for path, seed in zip(paths, seeds, strict=True):
        if not np.array_equal(seed["label"], seeds[0]["label"]):
            sys.exit(f"{path} is of other test images than {paths[0]}")
    results: dict[str, dict[str, np.ndarray]] = {}
    for key in seeds[0]:
        model, _, name = key.rpartition("/")
        if name in ("is_correct", "log_likelihood"):
            values = np.stack([seed[key] for seed in seeds])
            results.setdefault(model, {})[name] = values.mean(axis=0, dtype=np.float64)
    return results


if __name__ == "__main__":
    main()
