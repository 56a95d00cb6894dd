"""Some of a source's examples: by index, by class, or held out by the hash of their keys or files.

So an image is held out for ever, on every machine and whatever the order of the images.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from flora_jax.data import sources
from flora_jax.data.kept import digest
from flora_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """The examples of `source` at `indices`, int [n].

    Attributes:
      classes: those that all these examples belong to, numbered anew in this order; empty: all
        classes of the source, as they are.
    """

    source: sources.Source
    indices: np.ndarray
    classes: tuple[int, ...] = ()

    @property
    def left_out(self) -> dict[str, int]:
        return self.source.left_out

    @property
    def num_classes(self) -> int:
        return len(self.classes) or self.source.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        names = self.source.class_names
        return tuple(names[label] for label in self.classes) or names

    @property
    def labels(self) -> np.ndarray:
        if not self.classes:
            return self.source.labels[self.indices]
        numbers = np.arange(self.source.num_classes, dtype=np.int32)
        numbers[list(self.classes)] = np.arange(len(self.classes))
        return numbers[self.source.labels[self.indices]]

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> sources.Example:
        example = self.source[int(self.indices[index])]
        if self.classes:
            example = {**example, "label": self.classes.index(example["label"])}
        return example


def subset(source: sources.Source, indices) -> Subset:
    """The examples of `source` at `indices`, int [n], in that order."""
    return Subset(source, np.asarray(indices, np.int64))


def shuffled(source: sources.Source, seed: int) -> Subset:
    """All examples, in an order of which every beginning is a fair sample."""
    return subset(source, np.random.default_rng(seed).permutation(len(source)))


def hold_out(source: sources.Source, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Splits a source in two by hashed keys, class by class.

    Args:
      source: the examples; only its labels and keys are read.
      fraction: share of each class that is held out, rounded to whole examples.
      seed: another seed holds out other examples.

    Returns:
      (train, heldout), each in the order of `source`.

    Raises:
      InputError: fraction is not between 0 and 1, or one of the two would be empty.
    """
    if not 0 < fraction < 1:
        raise InputError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    labels, is_held_out = source.labels, np.zeros(len(source), bool)
    hashes = np.array([_hash(seed, source.key(i)) for i in range(len(source))])
    by_class_and_hash = np.lexsort((hashes, labels))
    for members in np.split(by_class_and_hash, np.cumsum(np.bincount(labels))[:-1]):
        is_held_out[members[: round(fraction * len(members))]] = True
    if not 0 < is_held_out.sum() < len(source):
        raise InputError(
            f"fraction {fraction} of each class holds out {is_held_out.sum()} of {len(source)} "
            f"images; both parts need at least one"
        )
    return subset(source, np.flatnonzero(~is_held_out)), subset(source, np.flatnonzero(is_held_out))


def _hash(seed: int, key: object) -> bytes:
    # A file name need not be valid UTF-8: its bytes are hashed as they are.
    return digest(f"{seed}/{key}".encode(errors="surrogateescape"))


def of_classes(source: sources.Source, classes: tuple[int, ...]) -> Subset:
    """The examples of these classes, numbered anew in this order. Raises InputError of others."""
    if len(set(classes)) < len(classes) or not set(classes) <= set(range(source.num_classes)):
        raise InputError(
            f"classes {tuple(classes)} must be different ones of 0..{source.num_classes - 1}"
        )
    return Subset(source, np.flatnonzero(np.isin(source.labels, classes)), tuple(classes))


def split_by_content(
    labels: np.ndarray, copies: np.ndarray, parts: Sequence[tuple[float, int]]
) -> list[np.ndarray]:
    """Takes one part after another out of all images, in whole groups of copies.

    A group belongs to the class of most of its images. Each part takes groups of a class in the
    order of a hash of what they hold, whatever the files are named, up to its share of the images;
    where none fits, the smallest one, if that is at most a third of the class. A group is kept for
    each of the later parts and for what is left.

    Args:
      labels: int [n].
      copies: of the same images, uint64 [2, n] as `copies_in` finds them.
      parts: share of each class that a part takes of what is left, rounded but at least one
        image, and a seed that picks other ones.

    Returns:
      The indices of what is left, then those of each part, all in ascending order.
    """
    contents, groups = copies
    members: dict[int, list[int]] = collections.defaultdict(list)
    for index in np.lexsort((contents, groups)).tolist():
        members[groups[index]].append(index)
    of_class: dict[int, list[list[int]]] = collections.defaultdict(list)
    for group in members.values():
        of_class[int(np.bincount(labels[group]).argmax())].append(group)
    taken = np.zeros(len(labels), int)
    for left in of_class.values():
        whole = sum(map(len, left))
        for number, (fraction, seed) in enumerate(parts, 1):
            wanted = max(1, round(fraction * sum(map(len, left))))
            spare = len(left) - (len(parts) - number + 1)
            ranked = sorted(
                (len(group) if len(group) > wanted else 0, _hash(seed, contents[group[0]]), group)
                for group in left
            )
            chosen: list[int] = []
            for _, _, group in ranked:
                fits = len(chosen) + len(group) <= wanted
                if spare > 0 and (fits or (not chosen and 3 * len(group) <= whole)):
                    chosen += group
                    spare -= 1
            taken[chosen] = number
            left = [group for group in left if not taken[group[0]]]
    return [np.flatnonzero(taken == number) for number in range(len(parts) + 1)]
