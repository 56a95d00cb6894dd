"""Supernets of the same space beside one another: which training makes the better subnets?

    python benchmarks/supernets.py runs/aware runs/plain --subnets 8

For each budget of the first run it measures the same subnets in every run's supernet, on the test
images and without fine-tuning: the uniform one and random ones of the first run's space inside the
window. What is printed is each supernet's mean top-1 and log-likelihood over these subnets, and its
difference to the first supernet with a paired 95 % interval. Runs must have the same dense model
and test images.
"""

import argparse
import sys

import numpy as np

import flora_jax as flora
from flora_jax.evaluation.comparison import compare
from flora_jax.evaluation.evaluate import evaluate_images
from flora_jax.flora.supernet import extract_ranks
from flora_jax.report.table import difference_text, in_points
from flora_jax.runs.images import Images
from flora_jax.stages.budget import macs_budgets
from flora_jax.stages.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of runs that have trained a supernet")
    parser.add_argument("--subnets", type=int, default=8, help="random ones at each budget")
    parser.add_argument("--full_rank", action="store_true", help="the full rank as well")
    arguments = parser.parse_args()

    first = Run.open(arguments.runs[0])
    images = Images(first.settings)
    test_set = images.evaluation_set(images.splits.test)
    supernets = {name: flora.load(f"{name}/supernet") for name in arguments.runs}
    for title, ranks in subnets_of(first, arguments).items():
        results = {
            name: mean_over_subnets([extract_ranks(supernet, each) for each in ranks], test_set)
            for name, supernet in supernets.items()
        }
        others = compare(results, [(name, arguments.runs[0]) for name in arguments.runs[1:]])
        print(f"{title}: {len(ranks)} subnets")
        for name, found in results.items():
            top1, likelihood = 100 * found["is_correct"].mean(), found["log_likelihood"].mean()
            line = f"  {top1:6.2f} %  {likelihood:8.4f}  {name}"
            if name in others:
                against = others[name][arguments.runs[0]]
                line += (
                    f": {difference_text(in_points(against['top1']))} points, "
                    f"{difference_text(against['log_likelihood'], 4)}"
                )
            print(line)
        sys.stdout.flush()


def subnets_of(run: Run, arguments: argparse.Namespace) -> dict[str, list[tuple[int, ...]]]:
    """Ranks [L] of the subnets by a title of their budget."""
    space, found = flora.load(run.folder / "supernet").space, {}
    for budget in macs_budgets(run.settings, run.spec):
        title = f"{budget.shares[1]:g} of the multiply-adds"
        found[f"uniform, {title}"] = [space.uniform_ranks_within(budget.window[1])]
        rng = np.random.default_rng(0)
        genes = space.sample_within(rng, arguments.subnets, budget.window)
        found[f"random, {title}"] = [tuple(ranks) for ranks in space.ranks(genes).tolist()]
    if arguments.full_rank:
        found["full rank"] = [tuple(space.ranks(space.full_rank_genes).tolist())]
    return found


def mean_over_subnets(models: list, test_set: flora.EvaluationSet) -> dict[str, np.ndarray]:
    """Image by image: how often the models are right, and their mean log-likelihood."""
    each = [evaluate_images(model, test_set) for model in models]
    return {
        name: np.mean([found[name] for found in each], axis=0, dtype=np.float64)
        for name in ("is_correct", "log_likelihood")
    }


if __name__ == "__main__":
    main()
