"""Which held-out measure ranks subnets best? Split-half reliability on finished runs.

    python benchmarks/search_metric.py runs/seeds/seed_0 runs/seeds/seed_1

Draws random subnets inside the run's MAC window, inherited from its supernet, and splits its
held-out images in two at random, many times. A measure on one half is good when it correlates with
the accuracy on the other half.
"""

import argparse

import jax
import numpy as np

import flora_jax as flora
from flora_jax.runs.images import Images
from flora_jax.stages.budget import macs_budgets
from flora_jax.stages.run import Run


def per_image(
    heldout: flora.EvaluationSet, supernet: flora.Supernet, genes: np.ndarray
) -> tuple[np.ndarray, ...]:
    """genes [P, L] -> is the right class first, and its log-probability: both [P, images]."""
    columns = []
    for images, labels, mask in heldout.batches:
        used = np.asarray(mask) > 0
        rows = np.arange(used.sum())
        labels = np.asarray(labels)[used]
        logits = np.stack([np.asarray(supernet(images, one))[used] for one in genes])
        log_probability = np.asarray(jax.nn.log_softmax(logits))
        columns.append((logits.argmax(-1) == labels, log_probability[:, rows, labels]))
    return tuple(np.concatenate(parts, axis=1) for parts in zip(*columns, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of finished runs")
    parser.add_argument("--subnets", type=int, default=120)
    parser.add_argument("--splits", type=int, default=50)
    arguments = parser.parse_args()

    print("correlation with top1 on the other half of the held-out images")
    print("images      top1  log_likelihood  run")
    for folder in arguments.runs:
        run, supernet = Run.open(folder), flora.load(f"{folder}/supernet")
        rng = np.random.default_rng(0)
        window = macs_budgets(run.settings, run.spec)[-1].window
        genes = supernet.space.sample_within(rng, arguments.subnets, window)
        is_right, log_probability = per_image(Images(run.settings).heldout_set, supernet, genes)
        found = []
        for _ in range(arguments.splits):
            order = rng.permutation(is_right.shape[1])
            one, other = np.array_split(order, 2)
            target = is_right[:, other].mean(axis=1)
            found.append(
                [
                    np.corrcoef(measure[:, one].mean(axis=1), target)[0, 1]
                    for measure in (is_right, log_probability)
                ]
            )
        top1, log_likelihood = np.mean(found, axis=0)
        print(f"{is_right.shape[1]:6d}  {top1:8.2f}  {log_likelihood:14.2f}  {folder}")


if __name__ == "__main__":
    main()
