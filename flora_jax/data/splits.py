"""Which images are trained on, searched with and reported on.

An image belongs to a split by the hash of its key, so a split is the same for ever, on every
machine and whatever the order of the images. A folder without a split to report on is split by the
contents of the images (`content_split`), so that copies of one picture stay together. The
architecture search scores on `heldout`, which is taken out of the training images; `test` is
reported once.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence

import numpy as np

from flora_jax.data import sources
from flora_jax.data.content_split import check_enough, say_split, split_by_content
from flora_jax.data.copies import copies_in
from flora_jax.data.decoding import WHITE
from flora_jax.data.folder_layout import check_several_classes, find_layout, open_folder
from flora_jax.data.image_folder import ImageFolderSource, unlabelled_folder
from flora_jax.data.labels import check_labels
from flora_jax.data.preprocessing import check_background
from flora_jax.errors import InputError

TEST_FRACTION = 0.25  # of a dataset that has no test split of its own
TEST_SEED = 0  # not the user's seed: the reported images never change


@dataclasses.dataclass(frozen=True, eq=False)
class Subset(sources.DerivedSource):
    """The examples of `source` at `indices`, int [n].

    Attributes:
      classes: those that all these examples belong to, numbered anew in this order; empty: all
        classes of the source, as they are.
    """

    indices: np.ndarray
    classes: tuple[int, ...] = ()

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


@dataclasses.dataclass(frozen=True)
class Splits:
    """Disjoint sources: to train on, to search with, to report on."""

    train: sources.Source
    heldout: sources.Source
    test: sources.Source

    @property
    def num_classes(self) -> int:
        """How many there are; 0 where the images have no labels."""
        return self.train.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the labels 0, 1, ...; none where the images have no labels."""
        return self.train.class_names


def subset(source: sources.Source, indices) -> Subset:
    """The examples of `source` at `indices`, int [n], in that order."""
    return Subset(source, np.asarray(indices, np.int64))


def hold_out(source: sources.Source, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Splits a source in two by hashed keys, class by class.

    Args:
      source: the examples; only its labels and keys are read.
      fraction: share of each class that is held out, rounded to whole examples.
      seed: another seed holds out other examples.

    Returns:
      (train, heldout), each in the order of `source`.

    Raises:
      InputError: fraction is not between 0 and 1, one of the two would be empty, or two examples
        have the same key; names the key.
    """
    _check_fraction(fraction)
    hashes = _hashes(source, seed)
    _check_unique(source, hashes)
    labels, is_held_out = source.labels, np.zeros(len(source), bool)
    by_class_and_hash = np.lexsort((hashes[:, 1], hashes[:, 0], labels))
    for members in np.split(by_class_and_hash, np.cumsum(np.bincount(labels))[:-1]):
        is_held_out[members[: round(fraction * len(members))]] = True
    if not 0 < is_held_out.sum() < len(source):
        raise InputError(
            f"fraction {fraction} of each class holds out {is_held_out.sum()} of {len(source)} "
            f"images; both parts need at least one"
        )
    return subset(source, np.flatnonzero(~is_held_out)), subset(source, np.flatnonzero(is_held_out))


def _hashes(source: sources.Source, seed: int) -> np.ndarray:
    """Of the keys, uint64 [n, 2], which sort as the bytes of the hashes do."""
    hashes = [
        # A file name need not be valid UTF-8: its bytes are hashed as they are.
        hashlib.blake2b(
            f"{seed}/{source.key(i)}".encode(errors="surrogateescape"), digest_size=16
        ).digest()
        for i in range(len(source))
    ]
    return np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 2).astype(np.uint64)


def load_splits(
    name: str,
    heldout_fraction: float = 0.1,
    seed: int = 0,
    data_dir: str | None = None,
    test_split: str | None = None,
    classes: tuple[int, ...] = (),
    on_bad_image: str = "raise",
    least_side: int | None = None,
    max_megapixels: float = sources.MAX_MEGAPIXELS,
    heldout_split: str | None = None,
    background: tuple[int, ...] = WHITE,
) -> Splits:
    """The splits of a dataset.

    Args:
      name: "digits", "tfds:NAME" for a TFDS dataset with a "train" split, "folder:PATH" for
        images at PATH/{train,val}/CLASS/*.jpeg (see `image_folder`), or "images:PATH" for any
        images in a folder, which have no labels; a quarter of them is the test split, as it is of
        images at PATH/CLASS/*.jpeg or PATH/train/CLASS/*.jpeg alone, by their contents.
      heldout_fraction: share of the training images that is held out for the search.
      seed: picks the held-out images; the test images do not depend on it.
      data_dir: folder of the TFDS datasets; None: the TFDS default.
      test_split: the split that is reported on; None: "validation" of TFDS, "val" of a folder, or
        the only one of "test", "valid" and "validation" that lies there instead.
      classes: the classes to take, numbered anew from 0; empty for all.
      on_bad_image: "raise" BadImageError when an image that cannot be decoded is read, or "skip"
        it: each source is a `SkippingSource`, which takes the next good image of the same split;
        `eval_batches` counts it nowhere.
      least_side: pixels that the short side of a training or held-out image needs; a larger JPEG
        of a folder or of TFDS is decoded smaller, as in `decode_rgb`. Test images never are.
      max_megapixels, background: as in `decode_rgb`.
      heldout_split: the split that is searched with, in place of a share of the training images: of
        TFDS, or a folder beside the training images' or anywhere. For weights that have seen these.

    Raises:
      InputError: unknown name, class or on_bad_image, fraction not between 0 and 1, dataset not
        on disk, a folder whose two splits have different classes or that cannot be split since a
        class has too few images, labels that are no class, a single class, or two images with one
        key.
    """
    _check_fraction(heldout_fraction)
    check_background(background)
    if on_bad_image not in ("raise", "skip"):
        raise InputError(f"unknown on_bad_image {on_bad_image!r}; choose 'raise' or 'skip'")
    rest: sources.Source
    test: sources.Source | None
    own: Sequence[sources.Source] = ()
    kind, _, place = name.partition(":")
    layout = find_layout(place, test_split) if kind == "folder" and place else None
    if heldout_split and not (place and kind in ("folder", "tfds")):
        raise InputError(f"heldout_split needs a dataset with splits, tfds: or folder:, not {name}")
    if layout:
        folder, test, own = open_folder(
            layout, heldout_split, least_side, max_megapixels, background
        )
        rest = folder
    elif kind == "tfds" and place:
        wanted = [("train", least_side), (test_split or "validation", None)]
        wanted += [(heldout_split, least_side)] if heldout_split else []
        rest, test, *own = (
            sources.tfds(place, split, data_dir, side, max_megapixels, background)
            for split, side in wanted
        )
    elif name == "digits":
        rest, test = hold_out(sources.digits(), TEST_FRACTION, TEST_SEED)
    elif kind == "images" and place:
        every_image = unlabelled_folder(place, least_side, max_megapixels, background=background)
        rest, test = hold_out(every_image, TEST_FRACTION, TEST_SEED)
    else:
        raise InputError(
            f"unknown dataset {name!r}; choose 'digits', 'tfds:NAME', 'folder:PATH' or, without "
            f"classes, 'images:PATH'{_likely(name)}"
        )
    if rest.num_classes:
        parts = {"training": [rest], "test": [] if test is None else [test], "held-out": own}
        for part, opened in parts.items():
            for source in opened:
                check_labels(source.labels, rest.num_classes, f"the {part} split of {name}")
    if classes:
        rest, *own = (_of_classes(source, classes) for source in (rest, *own))
        test = None if test is None else _of_classes(test, classes)
    check_several_classes(name, rest)
    if test is None:
        shares = [(TEST_FRACTION, TEST_SEED)] + ([] if own else [(heldout_fraction, seed)])
        by_content = _split_by_content(folder, rest, shares)
        (rest, test), own = by_content[:2], own or by_content[2:]
    train, heldout = (rest, *own) if own else hold_out(rest, heldout_fraction, seed)
    if on_bad_image == "skip":
        return Splits(*map(sources.SkippingSource, (train, heldout, test)))
    return Splits(train, heldout, test)


def _split_by_content(
    folder: ImageFolderSource, chosen: sources.Source, shares: Sequence[tuple[float, int]]
) -> list[Subset]:
    """Splits the images of a folder, or of some of its classes, that has no split to report on.

    Args:
      folder: all of its images.
      chosen: those of the classes that are taken.
      shares: as in `split_by_content`, of the test split and perhaps of the held-out one.

    Returns:
      The images to train on, to report on, and to search with where there is a second share.
    """
    part = chosen if isinstance(chosen, Subset) else subset(folder, range(len(folder)))
    check_enough(part.labels, part.class_names, f"{folder.folder}", len(shares) + 1)
    copies = copies_in(folder).at(part.indices)
    found = split_by_content(part.labels, copies, shares)
    purposes = ("to train on", "to report on", "to search with")
    named = dict(zip(purposes, found, strict=False))
    say_split(f"{folder.folder}", part.labels, part.class_names, copies, named)
    train, test, *heldout = (
        dataclasses.replace(part, indices=part.indices[indices]) for indices in found
    )
    whole = dataclasses.replace(test, source=folder.with_least_side(None))
    return [train, whole, *heldout]


def _likely(name: str) -> str:
    """A hint for a name without its kind."""
    if not name.rpartition(":")[2]:
        return ""
    kind = "folder" if "/" in name or os.path.exists(name) else "tfds"
    return f" (did you mean '{kind}:{name}'?)"


def _of_classes(source: sources.Source, classes: tuple[int, ...]) -> Subset:
    if len(set(classes)) < len(classes) or not set(classes) <= set(range(source.num_classes)):
        raise InputError(
            f"classes {tuple(classes)} must be different ones of 0..{source.num_classes - 1}"
        )
    return Subset(source, np.flatnonzero(np.isin(source.labels, classes)), tuple(classes))


def _check_unique(source: sources.Source, hashes: np.ndarray) -> None:
    if len(np.unique(hashes[:, 0])) == len(hashes):  # the quick half of the answer
        return
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    is_repeated = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    if is_repeated.any():
        repeated = source.key(int(order[1:][is_repeated][0]))
        count = sum(source.key(i) == repeated for i in range(len(source)))
        raise InputError(
            f"{count} examples have the key {repeated!r}; every key must name one example"
        )


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise InputError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
