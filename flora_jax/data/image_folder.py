"""Images in class folders, as torchvision's ImageFolder lays them out, read by index."""

import copy
import dataclasses
import errno
import logging
import os
import posixpath
import unicodedata

import numpy as np
from etils import epath

from flora_jax.data.decoding import MAX_MEGAPIXELS, WHITE, BadImageError, decode_rgb
from flora_jax.data.folder_index import Index, check_folder, class_of, read_index
from flora_jax.data.sources import DerivedSource, Example
from flora_jax.io.paths import absolute, user_path

# What links to nothing or in a circle, files of somebody else and folders raise.
_UNREADABLE = {errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EISDIR}

log = logging.getLogger(__name__)


class ImageFolderSource:
    """The images of one split. Each is decoded as it is asked for.

    Attributes:
      split: the folder of the split inside the dataset's.
      classes: names of the class folders; label i is that of classes[i].
      labels: int32 [number of images].
      left_out: how many things in the folder are no image of it, by kind, as in an `Index`.
    """

    def __init__(
        self,
        root: epath.Path,
        split: str,
        index: Index,
        least_side: int | None = None,
        max_megapixels: float = MAX_MEGAPIXELS,
        background: tuple[int, ...] = WHITE,
    ):
        """Takes the index of the folder root/split; the rest is as in `decode_rgb`."""
        self.split = split
        self.left_out = index.left_out
        self._root = root
        self._least_side, self._max_megapixels = least_side, max_megapixels
        self._background = background
        # A folder may sort before one inside a class that comes earlier: "a b" before "a/b".
        folders = sorted(index.images, key=lambda folder: (class_of(folder), folder))
        # The same name may be spelled in two ways, by Linux and by a Mac.
        names = [unicodedata.normalize("NFC", class_of(folder)) for folder in folders]
        self.classes = tuple(dict.fromkeys(names))
        self._keys = [
            posixpath.normpath(f"{split}/{folder}/{name}")
            for folder in folders
            for name in index.images[folder]
        ]
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.repeat(
            np.array([number[name] for name in names], np.int32),
            [len(index.images[folder]) for folder in folders],
        )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    def numbered_as(self, classes: tuple[str, ...]) -> "ImageFolderSource":
        """The same images, their classes in another order."""
        other = copy.copy(self)
        other.classes = classes
        number = np.array([classes.index(name) for name in self.classes], np.int32)
        other.labels = number[self.labels]
        return other

    def with_least_side(self, least_side: int | None) -> "ImageFolderSource":
        """The same images, of which large JPEGs are decoded at another size."""
        other = copy.copy(self)
        other._least_side = least_side
        return other

    @property
    def folder(self) -> epath.Path:
        """That of the split."""
        return self._root / self.split

    @property
    def decoding(self) -> str:
        """Tells the pixels of an image from those that other settings make of it."""
        return f"{self._background} {self._max_megapixels}"

    def path(self, index: int) -> epath.Path:
        return self._root / self.key(index)

    def encoded(self, index: int) -> bytes:
        """Content of a file; raises BadImageError where there is none, OSError for a bad disk."""
        return _read(self.path(index))

    def decoded(self, index: int, encoded: bytes) -> np.ndarray:
        """The pixels uint8 [H, W, 3] of that content; raises BadImageError."""
        name = os.fspath(self.path(index))
        return decode_rgb(encoded, name, self._least_side, self._max_megapixels, self._background)

    def key(self, index: int) -> str:
        """The path inside the dataset's folder, with forward slashes."""
        return self._keys[index]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Example:
        """Reads an image; raises BadImageError where it is no whole one, OSError for a bad disk."""
        image = self.decoded(index, self.encoded(index))
        return {"image": image, "label": int(self.labels[index]), "key": self.key(index)}


def image_folder(
    root: epath.PathLike,
    split: str,
    cache_dir: epath.PathLike | None = None,
    least_side: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    background: tuple[int, ...] = WHITE,
) -> ImageFolderSource:
    """The images at root/split/CLASS/**/*.jpeg, with any suffix that torchvision reads.

    Classes and the images of each are in torchvision's order, apart from what is hidden, which is
    left out, and what links lead to a second time (`flora_jax.data.listing`). Names of classes are
    in composed Unicode.

    Args:
      root: local folder or URL (gs://...) of the dataset.
      split: folder inside it, e.g. "train" or "val"; "." where the class folders lie in root.
      cache_dir: as in `read_index`.
      least_side, max_megapixels, background: as in `decode_rgb`.

    Returns:
      A source of uint8 [H, W, 3] images, each of its own size.

    Raises:
      InputError: there is no such folder, or as `read_index`; names the folder.
    """
    root = absolute(user_path(root))
    folder = root / split
    check_folder(root)
    check_folder(folder)
    index = read_index(folder, by_class=True, cache_dir=cache_dir)
    source = ImageFolderSource(root, split, index, least_side, max_megapixels, background)
    _log(folder, source, f"images of {source.num_classes} classes")
    return source


@dataclasses.dataclass(frozen=True, eq=False)
class UnlabelledSource(DerivedSource):
    """Images that belong to no class: every label is 0, and there are 0 classes."""

    @property
    def num_classes(self) -> int:
        return 0

    @property
    def class_names(self) -> tuple[str, ...]:
        return ()

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self), np.int32)

    def __getitem__(self, index: int) -> Example:
        return {**self.source[index], "label": 0}


def unlabelled_folder(
    root: epath.PathLike,
    least_side: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    cache_dir: epath.PathLike | None = None,
    background: tuple[int, ...] = WHITE,
) -> UnlabelledSource:
    """All images in a folder and those inside it, of no class; keys are paths inside it.

    Raises:
      InputError: there is no such folder, no image in it, or as `read_index`.
    """
    root = absolute(user_path(root))
    check_folder(root)
    index = read_index(root, by_class=False, cache_dir=cache_dir)
    one_class = {f"./{inside}".removesuffix("/."): n for inside, n in index.images.items()}
    images = ImageFolderSource(
        root, ".", Index(one_class, index.left_out), least_side, max_megapixels, background
    )
    _log(root, images, "images")
    return UnlabelledSource(images)


def _log(folder: epath.Path, source: ImageFolderSource, images: str) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in source.left_out.items())
    left_out = f"; left out: {kinds}" if kinds else ""
    log.info("%s: %d %s%s", folder, len(source), images, left_out)


def _read(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        # Where the folder itself is gone, a disk is, and not one image.
        if error.errno not in _UNREADABLE or not path.parent.is_dir():
            raise
        raise BadImageError(f"{path} cannot be read: {error.strerror}{_target(path)}") from error


def _target(path: epath.Path) -> str:
    link = os.fspath(path)
    return f" (a link to {os.readlink(link)})" if os.path.islink(link) else ""
