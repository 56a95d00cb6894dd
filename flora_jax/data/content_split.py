"""Splits images by what they hold: class by class, and copies of one picture on one side.

Neither the names of the files nor their order decide, so that a folder that was renamed or sorted
anew is split as before.
"""

import collections
import hashlib
import logging
from collections.abc import Sequence

import numpy as np

from flora_jax.data.copies import Copies
from flora_jax.errors import InputError, few

_PURPOSES = {"training": "to train on", "held-out": "to search with", "test": "to report on"}

log = logging.getLogger(__name__)

Counts = collections.Counter[int]  # images of each class


def split_by_content(
    labels: np.ndarray, copies: Copies, parts: Sequence[tuple[float, int]]
) -> list[np.ndarray]:
    """Takes one part after another out of all images, in whole groups of near-duplicates.

    Each part takes groups in the order of a hash of their contents, as long as no class exceeds its
    share. A class that would lack in a part gives it its smallest group, if that is at most a third
    of the class. Every class keeps a group for each of the later parts and for what is left.

    Args:
      labels: int [n].
      copies: of the same images.
      parts: fraction of each class that a part takes of what is left, rounded but at least one
        image, and a seed that picks other ones.

    Returns:
      The indices of what is left, then those of each part, all in ascending order.
    """
    groups = np.unique(copies.groups, return_inverse=True)[1]
    counts: list[Counts] = [collections.Counter() for _ in range(int(groups.max()) + 1)]
    names = [b"\xff" * 17] * len(counts)
    contents = [content.tobytes() for content in copies.contents]
    for group, label, content in zip(groups.tolist(), labels.tolist(), contents, strict=True):
        counts[group][label] += 1
        names[group] = min(names[group], content)
    whole = collections.Counter(labels.tolist())
    left = set(range(len(counts)))
    taken = np.zeros(len(counts), int)
    for number, (fraction, seed) in enumerate(parts, 1):
        order = sorted(left, key=lambda group: _hash(seed, names[group]))
        chosen = _take([counts[group] for group in order], whole, fraction, len(parts) - number + 1)
        taken[[order[i] for i in chosen]] = number
        left -= {order[i] for i in chosen}
    return [np.flatnonzero(taken[groups] == number) for number in range(len(parts) + 1)]


def _take(groups: Sequence[Counts], whole: Counts, fraction: float, spare: int) -> set[int]:
    """Which of the groups a part takes that leaves `spare` groups of each class."""
    images: Counts = collections.Counter()
    number: Counts = collections.Counter()
    for group in groups:
        images.update(group)
        number.update(group.keys())
    wanted = {label: max(1, round(fraction * count)) for label, count in images.items()}
    taken: set[int] = set()
    has: Counts = collections.Counter()

    def take(place: int) -> None:
        taken.add(place)
        has.update(groups[place])
        number.subtract(groups[place].keys())

    for place, group in enumerate(groups):
        if all(
            has[label] + count <= wanted[label] and number[label] > spare
            for label, count in group.items()
        ):
            take(place)
    for label in wanted:
        possible = [
            (count.total(), place)
            for place, count in enumerate(groups if not has[label] else ())
            if label in count and place not in taken
            if all(number[of] > spare and 3 * count[of] <= whole[of] for of in count)
        ]
        if possible:
            take(min(possible)[1])
    return taken


def check_enough(labels: np.ndarray, class_names: Sequence[str], place: str, parts: int) -> None:
    """Raises InputError where a class has fewer images than there are parts; names the classes."""
    counts = np.bincount(labels, minlength=len(class_names))
    if (too_few := counts < parts).any():
        names = [f"{class_names[i]} has {counts[i]}" for i in np.flatnonzero(too_few).tolist()]
        raise InputError(
            f"{place} is split into {parts} parts, and each class needs at least {parts} images, "
            f"one for each: {few(names)}; add images, or take other classes with data.classes"
        )


def say_split(
    place: str,
    labels: np.ndarray,
    class_names: Sequence[str],
    copies: Copies,
    parts: dict[str, np.ndarray],
) -> None:
    """Logs how many images each part has, and which classes lack in one."""
    sizes = np.bincount(copies.groups)
    log.info(
        "%s is split here: %s; %d groups of near-duplicates, %d images, are kept together",
        place,
        ", ".join(f"{len(indices)} images {_PURPOSES[part]}" for part, indices in parts.items()),
        (sizes > 1).sum(),
        sizes[sizes > 1].sum(),
    )
    for part, indices in parts.items():
        lacking = sorted(set(range(len(class_names))) - set(labels[indices].tolist()))
        if lacking:
            log.warning(
                "no image %s of %s: their images are copies of too few pictures",
                _PURPOSES[part],
                few([class_names[label] for label in lacking]),
            )


def _hash(seed: int, content: bytes) -> bytes:
    return hashlib.blake2b(f"{seed}/".encode() + content, digest_size=16).digest()
