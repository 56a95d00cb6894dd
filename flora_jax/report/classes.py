"""What models make of each class: how often they are right, and what they take for what."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

_MAX_CLASSES = 30
_MAX_PAIRS = 8


@dataclasses.dataclass(frozen=True)
class ClassAccuracy:
    """One class. Attributes: its name; images of it; {model: share of them that it gets right}."""

    name: str
    images: int
    top1: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """A class that a model takes for another.

    Attributes:
      label, predicted: their names.
      images: of the class.
      count: how many of them the model takes for the other, at least one.
      baseline: how many the dense model does; None where there is none.
      example: the index of one.
      picture: of it, as a data URI; "" where it cannot be shown.
    """

    label: str
    predicted: str
    images: int
    count: int
    baseline: int | None
    example: int
    picture: str = ""


def class_accuracies(
    labels: np.ndarray, predicted: Mapping[str, np.ndarray], names: Sequence[str]
) -> list[ClassAccuracy]:
    """The classes of some images; of very many those that the last model has lost most on.

    Args:
      labels: int [n].
      predicted: {model: int [n]}, at least one.
      names: of the labels 0, 1, ...
    """
    counts = np.bincount(labels, minlength=len(names))
    right = {
        model: np.bincount(labels[found == labels], minlength=len(names)) / np.maximum(counts, 1)
        for model, found in predicted.items()
    }
    shares, present = list(right.values()), np.flatnonzero(counts)
    if len(present) > _MAX_CLASSES:
        gained = (shares[-1] - shares[0])[present]
        present = present[np.argsort(gained, kind="stable")[:_MAX_CLASSES]]
    return [
        ClassAccuracy(
            names[i], int(counts[i]), {model: float(share[i]) for model, share in right.items()}
        )
        for i in present.tolist()
    ]


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
    pairs, firsts, counts = np.unique(
        np.stack([labels[wrong], predicted[wrong]], axis=1),
        axis=0,
        return_index=True,
        return_counts=True,
    )
    order = np.argsort(-counts, kind="stable")[:_MAX_PAIRS]
    return [
        Confusion(
            names[label],
            names[other],
            images=int((labels == label).sum()),
            count=int(counts[i]),
            baseline=(
                None if baseline is None else int(((labels == label) & (baseline == other)).sum())
            ),
            example=int(wrong[firsts[i]]),
        )
        for i, (label, other) in zip(order, pairs[order], strict=True)
    ]
