"""What lies in a tree of folders: every folder is entered once, wherever links lead.

Links are followed, as torchvision does, but one that leads in a circle ends where it began, and an
image to which several links lead is listed once.
"""

import array
import collections
import dataclasses
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from flora_jax.errors import InputError
from flora_jax.io.paths import is_url

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LISTED_BEFORE = "listed before"

# What systems put beside pictures, in lower case. Names that begin with a dot are hidden anyway.
_OF_SYSTEMS = frozenset(
    {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "lost+found"}
    | {"system volume information", "@eadir", "#recycle"}
)

Identity = tuple[int, int]  # device and inode
Stamp = list[int] | None  # changes with a folder; None: unknown, or nothing is there


@dataclasses.dataclass
class Listing:
    """What one folder holds, each kind sorted by name.

    Attributes:
      images: names of what is named like an image and is a file, or a link to one or to nothing.
      left_out: how many other things there are, by kind: "hidden", "no file", or the suffix of a
        file.
      linked_images: those of the images that are links, with what they lead to.
      inodes: of the other images.
      dangling: links that lead to nothing.
    """

    stamp: Stamp = None
    identity: Identity | None = None
    images: list[str] = dataclasses.field(default_factory=list)
    folders: list[str] = dataclasses.field(default_factory=list)
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    linked_images: dict[str, Identity] = dataclasses.field(default_factory=dict)
    linked_folders: list[str] = dataclasses.field(default_factory=list)
    inodes: array.array = dataclasses.field(default_factory=lambda: array.array("Q"))
    dangling: list[str] = dataclasses.field(default_factory=list)


class Tree:
    """The folders inside `root`, a local folder or a URL.

    Attributes:
      found: what each of them holds, by its path inside root, which is "." for root itself.
      left_out: how many things in them are no image, by kind, as in a `Listing`; "listed before"
        are folders and images to which another way leads.
    """

    def __init__(self, root: epath.Path):
        self.found: dict[str, Listing] = {}
        self.left_out: collections.Counter[str] = collections.Counter()
        self._root = root
        self._entered: set[Identity | None] = set()
        if not is_url(root):  # a link upwards comes down again on other ways, into other splits
            real = epath.Path(os.path.realpath(root))
            self._entered = {_identity(os.stat(path)) for path in real.parents}

    def enter_top(self) -> list[str]:
        """Lists root alone; returns the folders in it, those that links lead to behind the rest."""
        top = self._list(".")
        self._take({".": top})
        return top.folders + [link for link in top.linked_folders if self._is_new(link)]

    def enter(self, starts: Sequence[str]) -> None:
        """Lists these folders and those inside; one in several of them belongs to the first."""
        with ThreadPoolExecutor(16) as pool:  # a listing waits for the disk or the network
            for folders in pool.map(self._walk, starts):
                self._take(folders)

    def follow_links(self, inside: Sequence[str]) -> None:
        """Lists the folders that links in these folders lead to, and those in them in turn."""
        waiting = collections.deque(self._links(inside))
        while waiting:
            if self._is_new(link := waiting.popleft()):
                waiting += self._links(self._take(self._walk(link)))

    def drop_linked_twice(self) -> None:
        """Takes out the images that are links to one that is listed elsewhere."""
        links = [listing for listing in self.found.values() if listing.linked_images]
        if not links:
            return
        listed = {
            (listing.identity[0], inode)
            for listing in self.found.values()
            if listing.identity
            for inode in listing.inodes
        }
        for listing in links:
            twice = set()
            for name, identity in listing.linked_images.items():
                if identity in listed:
                    twice.add(name)
                listed.add(identity)
            listing.images = [name for name in listing.images if name not in twice]
            self.left_out[LISTED_BEFORE] += len(twice)

    def _walk(self, start: str) -> dict[str, Listing]:
        folders, waiting = {}, [start]
        while waiting:
            inside = waiting.pop()
            folders[inside] = listing = self._list(inside)
            waiting += [_join(inside, name) for name in listing.folders]
        return folders

    def _list(self, inside: str) -> Listing:
        folder = self._root / inside
        return _list_url(folder) if is_url(folder) else _list(folder)

    def _links(self, inside: Sequence[str]) -> list[str]:
        return [
            _join(folder, link) for folder in inside for link in self.found[folder].linked_folders
        ]

    def _is_new(self, link: str) -> bool:
        is_new = _identity(os.stat(self._root / link)) not in self._entered
        self.left_out[LISTED_BEFORE] += not is_new
        return is_new

    def _take(self, folders: dict[str, Listing]) -> list[str]:
        """Keeps those that were not entered before, and returns them."""
        new = []
        for folder, listing in folders.items():
            if listing.identity and listing.identity in self._entered:
                self.left_out[LISTED_BEFORE] += 1
                continue
            new.append(folder)
            self._entered.add(listing.identity)
            self.found[folder] = listing
            self.left_out += listing.left_out
        return new


def stamp_of(folder: epath.PathLike) -> Stamp:
    """What changes when a local folder does, or is replaced by one that is as old; None: gone."""
    try:
        return _stamp(os.stat(folder))
    except FileNotFoundError:
        return None


def names_in(folder: epath.Path) -> list[str]:
    """Sorted; raises InputError for a folder that cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error}") from error


def _list(folder: epath.Path) -> Listing:
    try:
        # Where this fails, nothing inside can be looked at. The time comes before what it stands
        # for: a change during the listing makes the index stale.
        status = os.stat(os.path.join(folder, "."))
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error}") from error
    listing = Listing(_stamp(status), _identity(status))
    for entry in found:
        if is_hidden(entry.name):
            listing.left_out["hidden"] += 1
        elif entry.is_symlink():
            _add_link(listing, entry)
        elif entry.is_dir():
            listing.folders.append(entry.name)
        elif not entry.name.lower().endswith(SUFFIXES):
            listing.left_out[_suffix(entry.name)] += 1
        elif entry.is_file():
            listing.images.append(entry.name)
            listing.inodes.append(entry.inode())
        else:  # a pipe would be read for ever
            listing.left_out["no file"] += 1
    return listing


def _add_link(listing: Listing, link: os.DirEntry[str]) -> None:
    try:
        status = link.stat()
    except OSError:
        status = None
        listing.dangling.append(link.name)
    if status and stat.S_ISDIR(status.st_mode):
        listing.linked_folders.append(link.name)
    elif not link.name.lower().endswith(SUFFIXES):
        listing.left_out[_suffix(link.name)] += 1
    elif status and not stat.S_ISREG(status.st_mode):
        listing.left_out["no file"] += 1
    else:
        listing.images.append(link.name)  # where it leads to nothing, reading it says so
        if status:
            listing.linked_images[link.name] = _identity(status)


def _list_url(folder: epath.Path) -> Listing:
    """What is named like an image is not looked at, which would be a request for each."""
    listing = Listing()
    for name in names_in(folder):
        if is_hidden(name):
            listing.left_out["hidden"] += 1
        elif name.lower().endswith(SUFFIXES):
            listing.images.append(name)
        elif (folder / name).is_dir():
            listing.folders.append(name)
        else:
            listing.left_out[_suffix(name)] += 1
    return listing


def is_hidden(name: str) -> bool:
    """Whether a system hides such a file or folder, or put it there for itself."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no suffix"


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def _stamp(status: os.stat_result) -> Stamp:
    # Archives, rsync and image layers set the first of the times, but not the second.
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size]


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"
