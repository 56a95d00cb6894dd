"""Splits of a dataset: to train on, to search with and to report on.

An image belongs to a split by the hash of its key. A folder without a split to report on is split
by what the images hold, so that copies stay together (`copies`). The architecture search scores on
`heldout`, which is taken out of the training images; `test` is reported once.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flora_jax.data import sources
from flora_jax.data.copies import copies_in
from flora_jax.data.image_folder import (
    ImageFolderSource,
    find_splits,
    image_folder,
    with_same_classes,
)
from flora_jax.data.labels import check_labels
from flora_jax.data.subsets import Subset, hold_out, of_classes, split_by_content, subset
from flora_jax.errors import InputError, few, unknown

log = logging.getLogger(__name__)

TEST_FRACTION = 0.25  # of a dataset that has no test split of its own
TEST_SEED = 0  # not the user's seed: the reported images never change
HELD_OUT_BY = ("name", "content")
_PURPOSES = {"training": "to train on", "held-out": "to search with", "test": "to report on"}


@dataclasses.dataclass(frozen=True)
class Splits:
    """Disjoint sources: to train with, to choose by, to report on.

    Attributes:
      copies_kept: what is said of copies that stay together, where they do.
    """

    train: sources.Source
    heldout: sources.Source
    test: sources.Source
    copies_kept: str = ""

    def __str__(self) -> str:
        counts = (f"{len(part):,}" for part in (self.train, self.heldout, self.test))
        text = "{} images to train with, {} to choose by, {} to report on; ".format(*counts)
        return f"{text}{self.num_classes or 'no'} classes{self.copies_kept}"

    @property
    def num_classes(self) -> int:
        """0 where the images have no labels."""
        return self.train.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the labels 0, 1, ...; none where the images have no labels."""
        return self.train.class_names


def load_splits(
    name: str,
    heldout_fraction: float = 0.1,
    seed: int = 0,
    data_dir: str | None = None,
    test_split: str | None = None,
    classes: tuple[int, ...] = (),
    on_bad_image: str = "raise",
    least_side: int | None = None,
    heldout_split: str | None = None,
    heldout_by: str = "name",
    **decoding: Any,
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
      heldout_split: the split that is searched with, in place of a share of the training images: of
        TFDS, or a folder beside the training images' or anywhere. For weights that have seen these.
      heldout_by: "name" or, of a folder with classes, "content", so that copies stay together.
      **decoding: max_megapixels, background and exif_orientation, as in `decode_rgb`.

    Raises:
      InputError: unknown name, class, on_bad_image or heldout_by, "content" of what is no folder
        with classes, fraction not between 0 and 1, dataset not on disk, a folder whose two splits
        have different classes or that cannot be split since a class has too few images, labels
        that are no class, or a single class.
    """
    if on_bad_image not in ("raise", "skip"):
        raise InputError(unknown("on_bad_image", on_bad_image, ("raise", "skip")))
    if heldout_by not in HELD_OUT_BY:
        raise InputError(unknown("heldout_by", heldout_by, HELD_OUT_BY))
    by_content = heldout_by == "content" and not heldout_split
    if by_content and not name.startswith("folder:"):
        raise InputError(f"heldout_by 'content' needs a dataset folder:PATH, not {name}")
    parts = dict(_open(name, data_dir, test_split, heldout_split, least_side, decoding))
    whole, num_classes = parts["training"], parts["training"].num_classes
    for part, source in parts.items():
        if num_classes:
            check_labels(source.labels, num_classes, f"the {part} split of {name}")
        if classes:
            parts[part] = of_classes(source, classes)
    if num_classes and len(names := parts["training"].class_names) < 2:
        raise InputError(
            f"{name} has a single class, {names[0]!r}, of which nothing can be learnt: at least 2 "
            f"are needed, or images:PATH without any"
        )
    copies_kept = ""
    if "test" not in parts or by_content:
        shares = {"test": (TEST_FRACTION, TEST_SEED), "held-out": (heldout_fraction, seed)}
        missing = {part: share for part, share in shares.items() if part not in parts}
        found, copies_kept = _split_by_content(whole, parts["training"], missing)
        parts |= found
    if "held-out" not in parts:
        parts["training"], parts["held-out"] = hold_out(parts["training"], heldout_fraction, seed)
    wrap = sources.SkippingSource if on_bad_image == "skip" else lambda source: source
    training, heldout, test = (wrap(parts[part]) for part in ("training", "held-out", "test"))
    return Splits(training, heldout, test, copies_kept)


def _open(
    name: str,
    data_dir: str | None,
    test_split: str | None,
    heldout_split: str | None,
    least_side: int | None,
    decoding: dict[str, Any],
) -> Mapping[str, sources.Source]:
    """The "training", "test" and "held-out" images of a dataset, where they are apart already."""
    kind, _, place = name.partition(":")
    if heldout_split and not (place and kind in ("folder", "tfds")):
        raise InputError(f"heldout_split needs a dataset with splits, tfds: or folder:, not {name}")

    def read(source: Callable[..., Any], train: str, test: str | None) -> dict[str, Any]:
        wanted = {"training": train, "test": test, "held-out": heldout_split}
        return {
            part: source(split=split, least_side=None if part == "test" else least_side, **decoding)
            for part, split in wanted.items()
            if split
        }

    if kind == "folder" and place:
        root, train, test = find_splits(place, test_split)
        return with_same_classes(read(functools.partial(image_folder, root), train, test))
    if kind == "tfds" and place:
        tfds = functools.partial(sources.tfds, place, data_dir=data_dir)
        return read(tfds, "train", test_split or "validation")
    if name == "digits":
        whole: sources.Source = sources.digits()
    elif kind == "images" and place:
        whole = image_folder(place, by_class=False, least_side=least_side, **decoding)
    else:
        raise InputError(
            f"unknown dataset {name!r}; choose 'digits', 'tfds:NAME', 'folder:PATH' or, without "
            f"classes, 'images:PATH'"
        )
    return dict(zip(("training", "test"), hold_out(whole, TEST_FRACTION, TEST_SEED), strict=True))


def _split_by_content(
    folder: sources.Source, chosen: sources.Source, shares: dict[str, tuple[float, int]]
) -> tuple[dict[str, Subset], str]:
    """Takes parts, by their shares, out of the chosen images of a folder; the rest is "training".

    Images of "test" are decoded at full size. Beside them is what to say of copies.
    """
    assert isinstance(folder, ImageFolderSource)  # only a folder may lack a split
    whole = chosen if isinstance(chosen, Subset) else subset(folder, range(len(folder)))
    labels, names, least = whole.labels, whole.class_names, len(shares) + 1
    counts = np.bincount(labels, minlength=len(names))
    if (counts < least).any():
        too_few = [f"{names[i]} has {counts[i]}" for i in np.flatnonzero(counts < least)]
        raise InputError(
            f"{folder.folder} is split into {least} parts, and each class needs at least {least} "
            f"images, one for each: {few(too_few)}"
        )
    copies = copies_in(folder)[:, whole.indices]
    found = split_by_content(labels, copies, list(shares.values()))
    parts = dict(zip(("training", *shares), found, strict=True))
    _, sizes = np.unique(copies[1], return_counts=True)
    copies = sizes[sizes > 1]
    copies_kept = f"; {len(copies)} groups of copies, {copies.sum()} images, are kept together"
    subsets = {}
    for part, indices in parts.items():
        if lacking := set(range(len(names))) - set(labels[indices].tolist()):
            log.warning(
                "no image %s of %s: their images are copies of too few pictures",
                _PURPOSES[part],
                few([names[label] for label in lacking]),
            )
        source = folder.with_least_side(None) if part == "test" else folder
        subsets[part] = dataclasses.replace(whole, source=source, indices=whole.indices[indices])
    return subsets, copies_kept
