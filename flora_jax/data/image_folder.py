"""Images in class folders, as torchvision's ImageFolder lays them out, read by index.

The list of files is kept in a cache folder, so that only the first run on a dataset lists it.
"""

import dataclasses
import hashlib
import itertools
import logging
import os
import posixpath
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
from etils import epath

from flora_jax.data.sources import Example, decode_rgb
from flora_jax.errors import InputError
from flora_jax.io.files import read_json, user_cache_dir, write_json
from flora_jax.io.paths import absolute, is_url, user_path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

log = logging.getLogger(__name__)


class ImageFolderSource:
    """The images of one split. Each is decoded as it is asked for.

    Attributes:
      split: the folder of the split inside the dataset's.
      classes: names of the class folders; label i is that of classes[i].
      labels: int32 [number of images].
    """

    def __init__(
        self,
        root: epath.Path,
        split: str,
        images: dict[str, list[str]],
        least_side: int | None,
    ):
        """Takes in `images` the sorted names of the files in each folder root/split/folder."""
        self.split = split
        self._root = root
        self._least_side = least_side
        # A folder may sort before one inside a class that comes earlier: "a b" before "a/b".
        folders = sorted(images, key=lambda folder: (_class_of(folder), folder))
        self.classes = tuple(dict.fromkeys(map(_class_of, folders)))
        self._keys = [
            posixpath.normpath(f"{split}/{folder}/{name}")
            for folder in folders
            for name in images[folder]
        ]
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.repeat(
            np.array([number[_class_of(folder)] for folder in folders], np.int32),
            [len(images[folder]) for folder in folders],
        )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def key(self, index: int) -> str:
        """The path inside the dataset's folder, with forward slashes."""
        return self._keys[index]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Example:
        """Reads an image; raises BadImageError where it is no whole one, OSError for a bad disk."""
        path = self._root / self.key(index)
        image = decode_rgb(path.read_bytes(), os.fspath(path), self._least_side)
        return {"image": image, "label": int(self.labels[index]), "key": self.key(index)}


def image_folder(
    root: epath.PathLike,
    split: str,
    cache_dir: epath.PathLike | None = None,
    least_side: int | None = None,
) -> ImageFolderSource:
    """The images at root/split/CLASS/**/*.{jpg,jpeg,png,webp,bmp}, in any case of the suffix.

    Classes and the images of each are in torchvision's order. A file counts as an image by its
    name alone. The index is read from the cache as long as no folder of the split has changed;
    folders of an object store, which carry no times, are listed anew every time.

    Args:
      root: local folder or URL (gs://...) of the dataset.
      split: folder inside it, e.g. "train" or "val".
      cache_dir: for the index; None: flora_jax/index in $XDG_CACHE_HOME or ~/.cache. One that
        cannot be written is no error.
      least_side: as in `decode_rgb`.

    Returns:
      A source of uint8 [H, W, 3] images, each of its own size.

    Raises:
      InputError: there is no such folder, it has no class folder, a class has no image, or a
        folder cannot be read; names the folder.
    """
    root = absolute(user_path(root))
    folder = root / split
    for path in (root, folder):
        if not path.is_dir():
            raise InputError(f"no folder {path}; {_contents(path.parent)}")
    cache_dir = None if is_url(root) else cache_dir or user_cache_dir("index")
    index = _cached_scan(folder, cache_dir) if cache_dir else _scan(folder)
    images = {inside: names for inside, (_, names) in index.items() if names}
    return ImageFolderSource(root, split, images, least_side)


@dataclasses.dataclass(frozen=True, eq=False)
class UnlabelledSource:
    """Images that belong to no class: every label is 0, and there are 0 classes."""

    images: ImageFolderSource

    num_classes: ClassVar[int] = 0

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self), np.int32)

    def key(self, index: int) -> str:
        return self.images.key(index)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return self.images[index] | {"label": 0}


def unlabelled_folder(root: epath.PathLike, least_side: int | None = None) -> UnlabelledSource:
    """All images in a folder and those inside it, of no class; keys are paths inside it.

    Raises:
      InputError: there is no such folder, or no image in it.
    """
    root = absolute(user_path(root))
    if not root.is_dir():
        raise InputError(f"no folder {root}; {_contents(root.parent)}")
    images = {inside: names for inside, (_, names) in _scan_class(root, ".") if names}
    return UnlabelledSource(ImageFolderSource(root, ".", images, least_side))


# Folder inside the split -> when it was last changed, in ns (None: unknown), and its sorted images.
_Index = dict[str, tuple[int | None, list[str]]]


def _cached_scan(folder: epath.Path, cache_dir: epath.PathLike) -> _Index:
    name = hashlib.blake2b(os.fsencode(folder), digest_size=16).hexdigest()
    cache = epath.Path(cache_dir) / f"{name}.json"
    try:
        index = read_json(cache)
        if all(_modified(folder / inside) == modified for inside, (modified, _) in index.items()):
            return index
        log.info("%s has changed since its index was made", folder)
    except FileNotFoundError:
        log.info("%s is listed for the first time, or one of its folders is gone", folder)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("the index %s cannot be used and is made again: %s", cache, error)
    index = _scan(folder)
    try:
        write_json(cache, index)
    except OSError as error:
        log.info("the index of %s is not kept: %s", folder, error)
    return index


def _scan(folder: epath.Path) -> _Index:
    log.info("listing the images in %s", folder)
    modified = _modified(folder)
    _, classes = _list(folder)
    if not classes:
        raise InputError(
            f"no class folder in {folder}: expected {folder}/CLASS/*.jpeg; {_contents(folder)}"
        )
    with ThreadPoolExecutor(16) as pool:  # a listing waits for the disk or the network
        parts = pool.map(lambda name: _scan_class(folder, name), classes)
        return {".": (modified, [])} | dict(itertools.chain.from_iterable(parts))


def _scan_class(folder: epath.Path, name: str) -> list[tuple[str, tuple[int | None, list[str]]]]:
    found, waiting = [], [name]
    while waiting:
        inside = waiting.pop()
        # The time comes first: a change during the listing makes the index stale.
        modified = _modified(folder / inside)
        images, folders = _list(folder / inside)
        found.append((inside, (modified, images)))
        waiting += [f"{inside}/{subfolder}" for subfolder in folders]
    if not any(images for _, (_, images) in found):
        kind = "folder" if name == "." else "class folder"
        raise InputError(
            f"no image in the {kind} {folder / name}: expected files *{', *'.join(SUFFIXES)}"
        )
    return found


def _list(folder: epath.Path) -> tuple[list[str], list[str]]:
    """Sorted names of images and of folders. What is named like an image is not looked at."""
    names = _names(folder)
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    others = [name for name in names if not name.lower().endswith(SUFFIXES)]
    return images, [name for name in others if (folder / name).is_dir()]


def _names(folder: epath.Path) -> list[str]:
    try:
        if not is_url(folder):
            os.stat(os.path.join(folder, "."))  # where this fails, folders inside look like files
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error}") from error


def _modified(folder: epath.Path) -> int | None:
    # Not through epath, which rounds to seconds.
    return None if is_url(folder) else os.stat(folder).st_mtime_ns


def _class_of(folder: str) -> str:
    return folder.split("/", 1)[0]


def _contents(folder: epath.Path, most: int = 10) -> str:
    """What is in a folder, for an error message."""
    if not folder.is_dir():
        return f"nor is there {folder}"
    names = _names(folder)
    more = ", ..." if len(names) > most else ""
    return f"{folder} holds: {', '.join(names[:most]) or 'nothing'}{more}"
