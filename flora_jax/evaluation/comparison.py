"""Models compared image by image: on the same images their accuracies are paired.

What two models get right overlaps, so that the difference between them is known far more closely
than the accuracy of either.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from flora_jax.evaluation.quality import METRICS

Interval = tuple[float, float, float]  # the difference, and the ends of its 95 % interval

_RESAMPLES = 2000
_BASELINES = {"subnet": ("uniform", "allocated"), "allocated": ("uniform",)}


def paired_interval(differences: np.ndarray) -> Interval:
    """Mean of the differences between two models, and its 95 % percentile bootstrap interval.

    The bootstrap draws images, with the same seed every time. It says what other test images might
    have shown, not what another training might.

    Args:
      differences: float [n], one an image, n >= 1.
    """
    rng, n = np.random.default_rng(0), len(differences)
    means = [differences[rng.integers(n, size=n)].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(differences.mean()), float(low), float(high)


def compare(
    results: Mapping[str, Mapping[str, np.ndarray]], pairs: Iterable[tuple[str, str]]
) -> dict[str, dict[str, dict[str, Interval]]]:
    """Differences between models in each metric that was measured, with intervals.

    Args:
      results: {model: {"is_correct": bool or float [n], "log_likelihood": float [n]}}, or with the
        values that another metric has of each image; of the same images in the same order.
      pairs: (model, the other that it is compared with).

    Returns:
      {model: {other: {"top1": (difference, low, high), "log_likelihood": the same}}}, model minus
      other, top-1 as a share; for other values the metrics that they are of.

    Raises:
      KeyError: a pair names a model without results.
    """
    compared: dict[str, dict[str, dict[str, Interval]]] = {}
    for model, other in pairs:
        ours, theirs = results[model], results[other]
        compared.setdefault(model, {})[other] = {
            metric.name: paired_interval(
                np.subtract(ours[metric.of_image], theirs[metric.of_image], dtype=np.float64)
            )
            for metric in METRICS
            if metric.of_image in ours
        }
    return compared


def budget_name(kind: str, budget: Sequence[float]) -> str:
    """The name of a model of one of several budgets (low, high): "subnet 0.55" for (0.5, 0.55)."""
    return f"{kind} {budget[1]:g}"


def kind_of(name: str) -> str:
    """The kind of model of a name: "subnet" for "subnet" and for "subnet 0.55"."""
    return name.split(" ")[0]


def baseline_pairs(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Each model with those it has to stand against: the baselines of its budget, then "dense"."""
    for name in names:
        kind = kind_of(name)
        baselines = [name.replace(kind, baseline, 1) for baseline in _BASELINES.get(kind, ())]
        others = [other for other in (*baselines, "dense") if other in names and other != name]
        yield from ((name, other) for other in others)
