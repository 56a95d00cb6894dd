"""One picture of several runs: accuracy against cost of every kind of model, means over the seeds.

    python benchmarks/front.py --runs runs/clip_art/seed_* --others plain runs/plain/seed_* \
        --out runs/clip_art.png

The runs must have the same budgets and test images. Error bars are paired 95 % intervals of the
difference to the dense model, over images, seeds pooled image by image. `--others NAME RUN...` adds
the subnets of other runs under a name, and prints how far the subnets are ahead of them. With
several budgets it also prints how many fewer multiply-adds the subnet has than uniform ranks that
are as good, read off their front.
"""

import argparse
import pathlib

import numpy as np
from common import describe_machine, parser_of, write_json
from matplotlib.figure import Figure
from seeds import mean_over_seeds

from flora_jax.evaluation.comparison import kind_of, paired_interval
from flora_jax.io.files import read_json
from flora_jax.report.figures import color_of
from flora_jax.report.formats import png
from flora_jax.report.table import difference_text, in_points, named_entries

MEASURES = {"is_correct": ("top-1 accuracy (%)", 100), "log_likelihood": ("log-likelihood", 1)}
KINDS = ("uniform", "allocated", "subnet")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", nargs="+", type=pathlib.Path, required=True)
    parser.add_argument("--others", nargs="+", default=[], metavar="NAME RUN", action="append")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()

    of_kinds = {kind: front(arguments.runs, kind) for kind in KINDS}
    fronts = {kind: found for kind, found in of_kinds.items() if len(found["macs"]) > 1}
    ratios = {}
    for name, *runs in arguments.others:
        fronts[name] = front([pathlib.Path(run) for run in runs], "subnet")
        ratios |= print_ahead(fronts["subnet"], fronts[name], name)
    draw(fronts, arguments)
    is_front = "uniform" in fronts and len(fronts["subnet"]["macs"]) > 2  # not dense and one budget
    for measure in MEASURES if is_front else ():
        title = f"{measure}: MACs of the subnet and of uniform ranks as good"
        saved = ratios[title] = fewer_macs(fronts["uniform"], fronts["subnet"], measure)
        told = (f"{m:.0f} % ({a:.0f}..{b:.0f}) fewer at {at}" for at, (m, a, b) in saved.items())
        print(f"{title}: {', '.join(told)}")
    write_json(arguments.json, describe_machine(), ratios)


def front(runs: list[pathlib.Path], kind: str) -> dict:
    """Of a kind of model at each budget: MACs as shares, and pooled results; dense comes last."""
    entries = [named_entries(read_json(run / "result.json")) for run in runs]
    pooled = mean_over_seeds([run / "test_images.safetensors" for run in runs])
    names = [name for name in entries[0] if kind_of(name) == kind]
    shares = [np.mean([e[name]["macs"] / e["dense"]["macs"] for e in entries]) for name in names]
    return {
        "macs": np.array([*shares, 1.0]),
        "results": [pooled[name] for name in (*names, "dense")],
    }


def print_ahead(ours: dict, theirs: dict, name: str) -> dict[str, dict]:
    ratios = {}
    pairs = zip(ours["results"][:-1], theirs["results"][:-1], strict=True)
    for share, (our, their) in zip(ours["macs"][:-1], pairs, strict=True):
        top1, likelihood = (paired_interval(our[m] - their[m]) for m in MEASURES)
        title = f"subnet against {name} at {100 * share:.0f} % of the dense model's MACs"
        ratios[title] = {"top1": top1, "log_likelihood": likelihood}
        print(
            f"{title}: {difference_text(in_points(top1))} points of top-1, "
            f"{difference_text(likelihood, 4)} of log-likelihood"
        )
    return ratios


def draw(fronts: dict[str, dict], arguments: argparse.Namespace) -> None:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for ax, (measure, (label, scale)) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        for i, (kind, found) in enumerate(fronts.items()):
            *models, dense = found["results"]
            level = scale * dense[measure].mean()
            intervals = [paired_interval(m[measure] - dense[measure]) for m in models]
            middle, low, high = (
                scale * np.array(column) for column in zip(*intervals, strict=True)
            )
            shares = 100 * found["macs"][:-1] + 0.25 * (i - len(fronts) / 2)  # side by side
            errors = (middle - low, high - middle)
            style = {"color": color_of(kind), "marker": "o", "capsize": 3, "label": kind}
            ax.errorbar(shares, level + middle, yerr=errors, **style)
        ax.axhline(level, color="0.4", linestyle="--", linewidth=1, label="dense (100 % of MACs)")
        ax.set_xlabel("multiply-adds (% of dense)")
        ax.set_ylabel(label)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels))
    arguments.out.write_bytes(png(figure))
    print(f"Picture: {arguments.out}")


def fewer_macs(uniform: dict, subnet: dict, measure: str) -> dict[str, list]:
    """MACs that the subnets save against uniform ranks that are as good, with bootstrap intervals.

    Read off the front of uniform ranks, which ends at the dense model; what is better than that
    counts as if it were as good.
    """
    size, rng = len(uniform["results"][0][measure]), np.random.default_rng(0)
    budgets = subnet["macs"][:-1]

    def saved(images: np.ndarray) -> np.ndarray:
        ours, theirs = (
            np.array([result[measure][images].mean() for result in found["results"]])
            for found in (subnet, uniform)
        )
        is_better = np.append(True, theirs[1:] > np.maximum.accumulate(theirs)[:-1])
        needed = np.interp(ours[:-1], theirs[is_better], uniform["macs"][is_better])
        return 100 * (1 - budgets / np.where(ours[:-1] > theirs.max(), 1, needed))

    middle = saved(np.arange(size))
    low, high = np.percentile(
        [saved(rng.integers(size, size=size)) for _ in range(2000)], (2.5, 97.5), axis=0
    )
    return {
        f"{100 * share:.0f} % of the dense model's": interval
        for share, *interval in zip(budgets, middle, low, high, strict=True)
    }


if __name__ == "__main__":
    main()
