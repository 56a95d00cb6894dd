"""The images in a tree of folders: listed once, and kept in a cache until a folder changes.

Links are followed, as torchvision does, but every folder is entered once: a link that leads in a
circle ends where it began, and an image to which several links lead is listed once.
"""

import array
import collections
import dataclasses
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from flora_jax.data.kept import digest, keep, read_kept
from flora_jax.errors import InputError, few
from flora_jax.io.files import user_cache_dir
from flora_jax.io.paths import is_url

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# What systems put beside pictures, in lower case. Names that begin with a dot are hidden anyway.
_OF_SYSTEMS = frozenset(
    {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "lost+found"}
    | {"system volume information", "@eadir", "#recycle"}
)
# Pictures of other kinds, which people have beside those.
_NOT_READ = frozenset(
    {".heic", ".heif", ".avif", ".gif", ".jp2", ".jxl", ".jfif", ".svg", ".psd", ".dcm"}
    | {".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw"}
)
_FORMAT = 3  # of the file that keeps an index
_MOST_KINDS = 12  # of what is left out that are counted one by one

Identity = tuple[int, int]  # device and inode
Stamp = list[int] | None  # changes with a folder; None: unknown, or nothing is there

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Index:
    """The images in a folder.

    Attributes:
      images: sorted names of the images in each folder, by its path inside, "." for the outer one.
      left_out: how many things are no image of the dataset, by kind: "hidden", "no file", "listed
        before", "outside the classes", or the suffix of a file.
    """

    images: dict[str, list[str]]
    left_out: dict[str, int]


def read_index(folder: epath.Path, by_class: bool, cache_dir: epath.PathLike | None) -> Index:
    """The images in a folder, from the list of an earlier time where no folder in it has changed.

    At a URL, where folders carry no times, they are listed anew every time. The log warns of
    pictures that are left out since their kind is not read.

    Args:
      folder: local, or a URL.
      by_class: whether the images are those in its class folders, each of which must have one.
      cache_dir: for the list; None: flora_jax/index in $XDG_CACHE_HOME or ~/.cache. One that
        cannot be written is no error.

    Raises:
      InputError: there is no class folder, or a folder has no image or cannot be read; names it.
    """
    index = _read(folder, by_class, cache_dir)
    unread = [f"{n} {kind}" for kind, n in index.left_out.items() if kind in _NOT_READ]
    if unread:
        log.warning(
            "%s: left out are pictures of kinds that are not read, %s: convert them to JPEG or PNG",
            *(folder, ", ".join(unread)),
        )
    return index


def _read(folder: epath.Path, by_class: bool, cache_dir: epath.PathLike | None) -> Index:
    cache_dir = None if is_url(folder) else cache_dir or user_cache_dir("index")
    if cache_dir is None:
        return _scan(folder, by_class)[0]
    name = digest(f"{_FORMAT} {by_class} ".encode() + os.fsencode(folder)).hex()
    place = epath.Path(cache_dir) / name
    if kept := read_kept(place):
        images, left_out, stamps = json.loads(kept)
        if all(stamp_of(folder / inside) == stamp for inside, stamp in stamps.items()):
            return Index(images, left_out)
    index, stamps = _scan(folder, by_class)
    keep(place, json.dumps([index.images, index.left_out, stamps]).encode())
    return index


@dataclasses.dataclass
class _Folder:
    """Content of one folder, each kind sorted by name.

    Attributes:
      images: names of what is named like an image and is a file, or a link to one or to nothing.
      inodes: of those that are no links.
      linked_images: what the others lead to.
      dangling: links that lead to nothing.
    """

    stamp: Stamp = None
    identity: Identity | None = None
    images: list[str] = dataclasses.field(default_factory=list)
    inodes: array.array = dataclasses.field(default_factory=lambda: array.array("Q"))
    linked_images: dict[str, Identity] = dataclasses.field(default_factory=dict)
    folders: list[str] = dataclasses.field(default_factory=list)
    linked_folders: list[str] = dataclasses.field(default_factory=list)
    dangling: list[str] = dataclasses.field(default_factory=list)
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, entry: os.DirEntry[str]) -> None:
        status = None
        if is_link := entry.is_symlink():
            try:
                status = entry.stat()
            except OSError:
                self.dangling.append(entry.name)
        exists = status is not None or not is_link
        if exists and entry.is_dir():
            (self.linked_folders if is_link else self.folders).append(entry.name)
        elif not entry.name.lower().endswith(SUFFIXES):
            self.left_out[_suffix(entry.name)] += 1
        elif exists and not entry.is_file():  # a pipe would be read for ever
            self.left_out["no file"] += 1
        else:
            self.images.append(entry.name)  # where it leads to nothing, reading it says so
            if status:
                self.linked_images[entry.name] = _identity(status)
            elif not is_link:
                self.inodes.append(entry.inode())


def _scan(root: epath.Path, by_class: bool) -> tuple[Index, dict[str, Stamp]]:
    """Lists a folder, with the stamps of whatever makes the list stale when it changes."""
    log.info("listing the images in %s", root)
    found, left_out = _walk(root)
    _drop_linked_twice(list(found.values()), left_out)
    top = found["."]
    starts = ["."]
    if by_class:
        left_out["outside the classes"] += len(top.images)
        top.images = []
        starts = [name for name in (*top.folders, *top.linked_folders) if name in found]
        if not starts:
            raise InputError(
                f"no class folder in {root}: expected {root}/CLASS/*.jpeg; {contents(root)}; "
                f"images:{root} takes pictures without classes"
            )
    filled = {class_of(inside) if by_class else "." for inside in found if found[inside].images}
    if empty := next((start for start in starts if start not in filled), None):
        raise InputError(
            f"no image in the {'class ' * by_class}folder {root / empty}: expected files "
            f"*{', *'.join(SUFFIXES)}; {contents(root / empty)}"
        )
    stamps = {inside: folder.stamp for inside, folder in found.items()}
    for inside, folder in found.items():
        stamps |= {f"{inside}/{link}": None for link in folder.dangling}
    images = {inside: folder.images for inside, folder in found.items() if folder.images}
    kinds = dict((+left_out).most_common(_MOST_KINDS))
    if rare := left_out.total() - sum(kinds.values()):
        kinds["other"] = rare
    return Index(images, kinds), stamps


def _walk(root: epath.Path) -> tuple[dict[str, _Folder], collections.Counter[str]]:
    """Lists root and the folders in it; links wait until all others are listed.

    Returns:
      The folders by their paths inside root, "." for root itself; and how many things in them are
      no image.
    """
    top = _list(root, set())
    found, left_out, entered = {".": top}, collections.Counter(top.left_out), {top.identity}
    if not is_url(root):  # a link upwards comes down again on other ways, into other splits
        entered |= {_identity(os.stat(path)) for path in epath.Path(os.path.realpath(root)).parents}
    waiting, links = top.folders, collections.deque(top.linked_folders)
    with ThreadPoolExecutor(16) as pool:  # a listing waits for the disk or the network
        while waiting or links:
            places = waiting or [links.popleft()]
            waiting = []
            folders = pool.map(lambda inside: _list(root / inside, entered), places)
            for inside, folder in zip(places, folders, strict=True):
                if folder.identity and folder.identity in entered:
                    left_out["listed before"] += 1
                    continue
                entered.add(folder.identity)
                found[inside] = folder
                left_out += folder.left_out
                waiting += [f"{inside}/{name}" for name in folder.folders]
                links += [f"{inside}/{name}" for name in folder.linked_folders]
    return found, left_out


def _list(folder: epath.Path, entered: set[Identity | None]) -> _Folder:
    """Lists a folder, unless it was entered before."""
    listed = _Folder()
    if is_url(folder):
        for name in names_in(folder):
            if is_hidden(name):
                listed.left_out["hidden"] += 1
            elif name.lower().endswith(SUFFIXES):  # to look at it would be a request for each
                listed.images.append(name)
            elif (folder / name).is_dir():
                listed.folders.append(name)
            else:
                listed.left_out[_suffix(name)] += 1
        return listed
    try:
        # Where this fails, nothing inside can be looked at. The time comes before what it stands
        # for: a change during the listing makes the index stale.
        status = os.stat(os.path.join(folder, "."))
        listed.stamp, listed.identity = _stamp(status), _identity(status)
        if listed.identity in entered:
            return listed
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error}") from error
    for entry in found:
        if is_hidden(entry.name):
            listed.left_out["hidden"] += 1
        else:
            listed.add(entry)
    return listed


def _drop_linked_twice(folders: list[_Folder], left_out: collections.Counter[str]) -> None:
    """Takes out the images that are links to one that is listed elsewhere."""
    if not any(folder.linked_images for folder in folders):
        return
    listed = {(f.identity[0], inode) for f in folders if f.identity for inode in f.inodes}
    for folder in folders:
        for name, identity in folder.linked_images.items():
            if identity in listed:
                folder.images.remove(name)
                left_out["listed before"] += 1
            listed.add(identity)


def class_of(inside: str) -> str:
    """The class folder that a path inside a split begins with."""
    return inside.split("/", 1)[0]


def is_hidden(name: str) -> bool:
    """Whether a system hides such a file or folder, or put it there for itself."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def names_in(folder: epath.Path) -> list[str]:
    """Sorted; raises InputError for a folder that cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error}") from error


def contents(folder: epath.Path) -> str:
    """Names of what is in a folder, for an error message."""
    there = few(names_in(folder), 10) if folder.is_dir() else "nothing"
    return f"{folder} holds: {there}"


def check_folder(path: epath.Path) -> None:
    """Raises InputError unless this is a folder; says what lies beside it."""
    if not path.is_dir():
        raise InputError(f"no folder {path}; {contents(path.parent)}")


def stamp_of(path: epath.PathLike) -> Stamp:
    """Changes with a local file or folder, or where another as old takes its place; None: gone."""
    try:
        return _stamp(os.stat(path))
    except OSError:
        return None


def _stamp(status: os.stat_result) -> Stamp:
    # Archives, rsync and image layers set the first of the times, but not the second.
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size]


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no suffix"
