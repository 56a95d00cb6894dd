"""Accuracies by class, and the confusions between classes."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

_MAX_CLASSES = 30
_MAX_PAIRS = 8


@dataclasses.dataclass(frozen=True)
class Confusion:
    """A class that a model takes for another."""

    label: str
    predicted: str
    images: int  # of the class
    count: int  # how many of them the model takes for the other, at least one
    baseline: int | None  # how many the dense model does, where there is one
    example: int  # the index of one
    # uint8 [H, W, 1 or 3], that one; None where it cannot be shown.
    image: np.ndarray | None = dataclasses.field(default=None, compare=False)


def class_rows(
    labels: np.ndarray, predicted: Mapping[str, np.ndarray], names: Sequence[str]
) -> list[list[str]]:
    """A table of accuracies by class; of very many classes those that the last model lost most on.

    Args:
      labels: int [n].
      predicted: {model: int [n]}, at least one.
      names: of the labels 0, 1, ...

    Returns:
      Titles, then for each class its name, the number of its images and each model's accuracy in %.
    """
    counts = np.bincount(labels, minlength=len(names))
    right = [np.bincount(labels[p == labels], minlength=len(names)) for p in predicted.values()]
    shares, present = right / np.maximum(counts, 1), np.flatnonzero(counts)
    if len(present) > _MAX_CLASSES:
        gained = (shares[-1] - shares[0])[present]
        present = present[np.argsort(gained, kind="stable")[:_MAX_CLASSES]]
    rows = [
        [names[i], str(counts[i]), *(f"{100 * share:.1f}" for share in shares[:, i])]
        for i in present.tolist()
    ]
    return [["class", "images", *(f"{model} %" for model in predicted)], *rows]


def confusions(
    labels: np.ndarray, predicted: np.ndarray, baseline: np.ndarray | None, names: Sequence[str]
) -> list[Confusion]:
    """The pairs of classes that a model confuses most, the most frequent first.

    Args:
      labels, predicted: int [n], what the images are and what the model takes them for.
      baseline: int [n], what the dense model takes them for.
      names: of the labels 0, 1, ...
    """
    wrong = np.flatnonzero(predicted != labels)
    both = np.stack([labels[wrong], predicted[wrong]], axis=1)
    pairs, firsts, counts = np.unique(both, axis=0, return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_MAX_PAIRS]
    found = []
    for i, (label, other) in zip(order, pairs[order], strict=True):
        of_class, before = labels == label, None
        if baseline is not None:
            before = int((of_class & (baseline == other)).sum())
        numbers = int(of_class.sum()), int(counts[i]), before, int(wrong[firsts[i]])
        found.append(Confusion(names[label], names[other], *numbers))
    return found
