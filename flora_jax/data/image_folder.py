"""Images in class folders, as torchvision's ImageFolder lays them out, read by index."""

import dataclasses
import errno
import functools
import logging
import os
import posixpath
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from flora_jax.data import listing
from flora_jax.data.decoding import BadImageError, decode_rgb
from flora_jax.data.listing import SUFFIXES, check_folder, class_of, read_index
from flora_jax.data.sources import Example
from flora_jax.errors import InputError, few
from flora_jax.io.paths import absolute, user_path

_TEST_NAMES = ("test", "valid", "validation")  # taken where there is no val
_SPLIT_NAMES = {*_TEST_NAMES, "train", "training", "val", "testing", "dev", "eval"}
# What links to nothing or in a circle, files of somebody else and folders raise.
_UNREADABLE = {errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EISDIR}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolderSource:
    """The images of one split. Each is decoded as it is asked for.

    Attributes:
      root: the folder of the dataset.
      split: the folder of the split inside it.
      class_names: of the class folders; label i is that of class_names[i]. Empty: no classes.
      labels: int32 [number of images]; 0 where there are no classes.
      keys: paths of the images inside root, with forward slashes.
      left_out: how many things in the folder are no image of it, by kind, as in an `Index`.
      decode: `decode_rgb` with its settings.
    """

    root: epath.Path
    split: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    keys: list[str]
    left_out: dict[str, int]
    decode: functools.partial[np.ndarray]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def folder(self) -> epath.Path:
        """That of the split."""
        return self.root / self.split

    def numbered_as(self, names: tuple[str, ...]) -> "ImageFolderSource":
        """The same images, their classes in another order."""
        number = np.array([names.index(name) for name in self.class_names], np.int32)
        return dataclasses.replace(self, class_names=names, labels=number[self.labels])

    def with_least_side(self, least_side: int | None) -> "ImageFolderSource":
        """The same images, of which large JPEGs are decoded at another size."""
        decode = functools.partial(self.decode, least_side=least_side)
        return dataclasses.replace(self, decode=decode)

    def path(self, index: int) -> epath.Path:
        return self.root / self.keys[index]

    def encoded(self, index: int) -> bytes:
        """Content of a file; raises BadImageError where there is none, OSError for a bad disk."""
        path = self.path(index)
        try:
            return path.read_bytes()
        except OSError as error:
            # Where the folder itself is gone, a disk is, and not one image.
            if error.errno not in _UNREADABLE or not path.parent.is_dir():
                raise
            link = f" (a link to {os.readlink(path)})" if os.path.islink(path) else ""
            raise BadImageError(f"{path} cannot be read: {error.strerror}{link}") from error

    def key(self, index: int) -> str:
        return self.keys[index]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Example:
        """Reads an image; raises BadImageError where it is no whole one, OSError for a bad disk."""
        image = self.decode(self.encoded(index), os.fspath(self.path(index)))
        return {"image": image, "label": int(self.labels[index]), "key": self.key(index)}


def image_folder(
    root: epath.PathLike,
    split: str = ".",
    cache_dir: epath.PathLike | None = None,
    by_class: bool = True,
    **decoding: Any,
) -> ImageFolderSource:
    """The images at root/split/CLASS/**/*.jpeg, with any suffix that torchvision reads.

    Classes and the images of each are in torchvision's order, apart from what is hidden, which is
    left out, and what links lead to a second time (`flora_jax.data.listing`). Names of classes are
    in composed Unicode.

    Args:
      root: local folder or URL (gs://...) of the dataset.
      split: folder inside it, e.g. "train" or "val"; "." where the class folders lie in root.
      cache_dir: as in `read_index`.
      by_class: False: all images in root/split, of no class.
      **decoding: as in `decode_rgb`.

    Returns:
      A source of uint8 [H, W, 3] images, each of its own size.

    Raises:
      InputError: there is no such folder, or as `read_index`; names the folder.
    """
    root = absolute(user_path(root))
    place = root / split
    check_folder(root)
    check_folder(place)
    index = read_index(place, by_class, cache_dir)
    # A folder may sort before one inside a class that comes earlier: "a b" before "a/b".
    folders = sorted(index.images, key=lambda inside: (class_of(inside) * by_class, inside))
    # The same name may be spelled in two ways, by Linux and by a Mac.
    names = [unicodedata.normalize("NFC", class_of(inside)) for inside in folders]
    classes = tuple(dict.fromkeys(names)) if by_class else ()
    keys, labels = [], []
    for inside, name in zip(folders, names, strict=True):
        images = index.images[inside]
        keys += [posixpath.normpath(f"{split}/{inside}/{image}") for image in images]
        labels += [classes.index(name) if by_class else 0] * len(images)
    kinds = ", ".join(f"{count} {kind}" for kind, count in index.left_out.items())
    of_classes = f" of {len(classes)} classes" if by_class else ""
    left_out = f"; left out: {kinds}" if kinds else ""
    _say_once(f"{place}: {len(keys):,} images{of_classes}{left_out}")
    decode = functools.partial(decode_rgb, **decoding)
    numbers = np.array(labels, np.int32)
    return ImageFolderSource(root, split, classes, numbers, keys, index.left_out, decode)


@functools.cache
def _say_once(what: str) -> None:
    """A run opens its folders more than once."""
    log.info("%s", what)


def with_same_classes(opened: Mapping[str, ImageFolderSource]) -> dict[str, ImageFolderSource]:
    """The splits of a folder, all with the labels of the first.

    Raises:
      InputError: they have different classes; names them.
    """
    first, *others = opened.values()
    names = set(first.class_names)
    for other in others:
        if names != set(other.class_names):
            raise InputError(
                f"{first.split} and {other.split} in {first.root} must have the same class "
                f"folders; only in one of them: {few(names ^ set(other.class_names))}"
            )
    return {part: source.numbered_as(first.class_names) for part, source in opened.items()}


def find_splits(place: str, test_split: str | None = None) -> tuple[epath.Path, str, str | None]:
    """Folders of the splits of PATH/{train,val}/CLASS, PATH/train/CLASS or PATH/CLASS.

    Args:
      place: PATH, local or a URL.
      test_split: the folder that is reported on; None: val, or the one of test, valid and
        validation that there is.

    Returns:
      PATH, and the folders in it to train on, "." for PATH itself, and to report on, if any.

    Raises:
      InputError: PATH is no folder, several folders could be val, or the splits have other names.
    """
    root = absolute(user_path(place))
    check_folder(root)
    if test_split or ((root / "train").is_dir() and (root / "val").is_dir()):
        return root, "train", test_split or "val"
    if any(_folders(root / "train")):  # otherwise it may be the class of trains
        found = [name for name in _TEST_NAMES if any(_folders(root / name))]
        if len(found) > 1:
            raise InputError(
                f"{root} holds {' and '.join(found)} but no val: name the one to report on with "
                f"data.test_split={found[0]}"
            )
        return root, "train", found[0] if found else None
    if any(_folders(root)) and all(name.lower() in _SPLIT_NAMES for name in _folders(root)):
        raise InputError(
            f"{root} holds splits: expected class folders in {root}/train, and in {root}/val to "
            f"report on"
        )
    return root, ".", None


def _folders(folder: epath.Path) -> Iterator[str]:
    """Names of the folders in one, each looked at when it is asked for: a request at a URL."""
    for name in listing.names_in(folder) if folder.is_dir() else ():
        is_left_out = listing.is_hidden(name) or name.lower().endswith(SUFFIXES)
        if not is_left_out and (folder / name).is_dir():
            yield name
