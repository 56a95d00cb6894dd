"""Which method compresses best at which number of pictures: FLORA, the closed form, or both.

    python benchmarks/dinov2.py --out runs/material/dinov2_hf --hugging_face
    python benchmarks/emoji.py --out runs/material/emoji
    python benchmarks/methods.py --weights runs/material/dinov2_hf --pictures runs/material/emoji \
        --workdir runs/methods --sizes 1000 3000 all --seeds 0 1 2 --out runs/methods.png

For each set of pictures and each seed one dense model is trained; from it each method makes a
network for each of two budgets, on as many image-steps (pictures times epochs):

  published           FLORA: plain SVD, ranks sampled by cost, search; half of the steps train the
                      supernet, half fine-tune the winner. No candidate filtering.
  improved            the same with factors weighed by activations and nested sampling
  closed              closed form, then fine-tuning for all of the steps
  closed then FLORA   closed form at 0.7 of the MACs and fine-tuning for a third of the steps; a
                      supernet of that network for a third; the winner fine-tuned for a third

The same learning rates everywhere, those of configs/yours.py, but for the published method, which
needs higher ones (docs/decisions.md), and learns no features. Finished runs are not repeated, and
others go on where they were. Intervals are paired 95 % intervals of the difference to the closed
form; seeds are averaged first, and emojis are drawn with all of their pictures.
"""

import argparse
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from safetensors.numpy import load_file
from seeds import mean_over_seeds

from flora_jax.data.image_folder import image_folder
from flora_jax.io.files import read_json, write_json
from flora_jax.report.formats import png
from flora_jax.report.table import difference_text, in_points, named_entries
from flora_jax.timing import describe_device

BUDGETS = ((0.33, 0.35), (0.48, 0.5))
HALF_STRENGTH = (0.68, 0.72)
METHODS = ("published", "improved", "closed", "closed then FLORA")
BASELINE = "closed"
PUBLISHED = {
    "supernet_sampling": "low_rank_aware",
    "supernet.learning_rate": 3e-3,
    "supernet.distill_features": 0.0,
    "finetune.learning_rate": 2e-2,
    "finetune.distill_features": 0.0,
}
RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=pathlib.Path, required=True)
    parser.add_argument("--pictures", type=pathlib.Path, required=True)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=["1000", "3000", "all"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, default=16_000, help="image-steps of a method")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="picture to write")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    if BASELINE not in arguments.methods:
        parser.error(f"--methods needs {BASELINE!r}, with which the others are compared")

    for size in arguments.sizes:
        for seed in arguments.seeds:
            folder = arguments.workdir / size / f"seed_{seed}"
            run_methods(arguments, folder, arguments.pictures / size, seed)
    found = {}
    for size in arguments.sizes:
        num_train = len(image_folder(arguments.pictures / size, "train"))
        found[f"{num_train:,}"] = figures(arguments, size)
    print("\n".join(table(found, arguments.methods)))
    draw(found, arguments.methods, arguments.out)
    machine = describe_device()
    print(f"\n{arguments.steps} image-steps, {len(arguments.seeds)} seeds; {machine}")
    if arguments.json:
        write_json(arguments.json, {"machine": machine, "steps": arguments.steps, "found": found})


def run_methods(
    arguments: argparse.Namespace, folder: pathlib.Path, pictures: pathlib.Path, seed: int
) -> None:
    num_train = len(image_folder(pictures, "train"))
    epochs = arguments.steps / num_train

    def run(name: str, weights: pathlib.Path, stages: str, **values: Any) -> None:
        settings = {
            "pretrained": weights,
            "image_size": 70,
            "seed": seed,
            "data.name": f"folder:{pictures}",
            "data.heldout_split": "heldout",
            "uniform_baseline": "none",
            "stages": tuple(stages.split()),
            "search.halving": True,
            **values,
        }
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "flora_jax.main", "--config=configs/yours.py"]
        subprocess.run([*command, f"--workdir={folder / name}", *flags], check=True)

    def flora(name: str, weights: pathlib.Path, share: float, start: str = "", **values) -> None:
        stages = f"pretrain {start} supernet search extract finetune evaluate report"
        budgets = tuple((low / share, high / share) for low, high in BUDGETS)
        run(name, weights, stages, **{"budget.macs": budgets} | values)

    run("dense", arguments.weights, "pretrain evaluate", **{"pretrain.epochs": epochs / 2})
    dense = folder / "dense" / "dense"
    halves = {"supernet.epochs": epochs / 2, "finetune.epochs": epochs / 2}
    thirds = {"supernet.epochs": epochs / 3, "finetune.epochs": epochs / 3}
    compress = "pretrain compress finetune evaluate report"
    run("closed", dense, compress, **{"budget.macs": BUDGETS, "finetune.epochs": epochs})
    if "published" in arguments.methods:
        flora("published", dense, 1, **halves | PUBLISHED)
    if "improved" in arguments.methods:
        flora("improved", dense, 1, "calibrate", **halves)
    if "closed then FLORA" not in arguments.methods:
        return
    half = {"budget.macs": HALF_STRENGTH, "finetune.epochs": epochs / 3}
    run("closed_half", dense, compress, **half)
    result = read_json(folder / "closed_half" / "result.json")
    share = result["subnet"]["macs"] / result["dense"]["macs"]
    flora("closed then FLORA", folder / "closed_half" / "subnet", share, "calibrate", **thirds)


def figures(arguments: argparse.Namespace, size: str) -> dict[str, dict]:
    """Of each method and budget: share of MACs, top-1, and the paired difference to BASELINE."""
    folders = [arguments.workdir / size / f"seed_{seed}" for seed in arguments.seeds]
    emojis = emojis_of(arguments.pictures / size, folders[0])
    dense = named_entries(read_json(folders[0] / "dense" / "result.json"))["dense"]
    results, macs = {}, {}
    for method in arguments.methods:
        paths = [folder / method / "test_images.safetensors" for folder in folders]
        pooled = mean_over_seeds(paths)
        entries = [named_entries(read_json(folder / method / "result.json")) for folder in folders]
        names = sorted(name for name in entries[0] if name.startswith("subnet"))
        for (_, high), name in zip(BUDGETS, names, strict=True):
            results[method, high] = pooled[name]["is_correct"]
            shares = [entry[name]["macs"] / dense["macs"] for entry in entries]
            macs[method, high] = float(np.mean(shares))
    reference = mean_over_seeds([f / "dense" / "test_images.safetensors" for f in folders])
    found = {"dense": {"top1": float(reference["dense"]["is_correct"].mean())}}
    for (method, budget), correct in results.items():
        found[f"{method} {budget:g}"] = {
            "macs": macs[method, budget],
            "top1": float(correct.mean()),
            "against_dense": interval(correct - reference["dense"]["is_correct"], emojis),
            f"against_{BASELINE}": interval(correct - results[BASELINE, budget], emojis),
        }
    return found


def emojis_of(pictures: pathlib.Path, folder: pathlib.Path) -> np.ndarray:
    """The number of the emoji of each test picture."""
    source = image_folder(pictures, "val")
    labels = load_file(folder / "dense" / "test_images.safetensors")["label"]
    if not np.array_equal(labels, source.labels):
        sys.exit(f"{folder} has reported on other pictures than those of {pictures}")
    names = [pathlib.PurePath(key).name.split("_")[0] for key in source.keys]
    return np.unique(names, return_inverse=True)[1]


def interval(differences: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % bootstrap interval, whole groups drawn."""
    sums, sizes = np.bincount(groups, differences), np.bincount(groups)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(sizes), size=(RESAMPLES, len(sizes)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return float(differences.mean()), *map(float, np.percentile(means, (2.5, 97.5)))


def table(found: dict[str, dict], methods: Sequence[str]) -> list[str]:
    lines = [
        f"| pictures | MACs | method | top-1 % | against dense | against {BASELINE} |",
        "|---|---|---|---|---|---|",
    ]
    for size, entries in found.items():
        lines.append(f"| {size} | 100 % | dense | {100 * entries['dense']['top1']:.2f} | | |")
        for _, budget in BUDGETS:
            for method in methods:
                entry = entries[f"{method} {budget:g}"]
                differences = [
                    difference_text(in_points(entry[f"against_{other}"])) if other != method else ""
                    for other in ("dense", BASELINE)
                ]
                lines.append(
                    f"| {size} | {100 * entry['macs']:.1f} % | {method} | "
                    f"{100 * entry['top1']:.2f} | {' | '.join(differences)} |"
                )
    return lines


def draw(found: dict[str, dict], methods: Sequence[str], path: pathlib.Path) -> None:
    """Points of top-1 against the closed form, over the sets of pictures, a panel a budget."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, len(BUDGETS), sharey=True)
    for ax, (_, budget) in zip(axes, BUDGETS, strict=True):
        for i, method in enumerate(method for method in methods if method != BASELINE):
            entries = [entries[f"{method} {budget:g}"] for entries in found.values()]
            middle, low, high = np.array([in_points(e[f"against_{BASELINE}"]) for e in entries]).T
            places = np.arange(len(found)) + 0.08 * (i - 1)
            errors = (middle - low, high - middle)
            ax.errorbar(places, middle, yerr=errors, marker="o", capsize=3, label=method)
        ax.axhline(0, color="0.4", linestyle="--", linewidth=1)
        ax.set_xticks(np.arange(len(found)), list(found))
        ax.set_xlim(-0.5, len(found) - 0.5)
        ax.set_xlabel("pictures to train with")
        ax.set_title(f"at {100 * budget:g} % of the multiply-adds")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("points of top-1 above closed form + fine-tuning")
    axes[0].legend(frameon=False)
    path.write_bytes(png(figure))
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
