"""Which images lie in a folder: listed once, and kept in a cache until a folder changes."""

import collections
import dataclasses
import hashlib
import logging
import os

from etils import epath

from flora_jax.data.listing import SUFFIXES, Listing, Stamp, Tree, names_in, stamp_of
from flora_jax.errors import InputError
from flora_jax.io.files import read_json, user_cache_dir, write_json
from flora_jax.io.paths import is_url

OUTSIDE = "outside the classes"

_FORMAT = 2  # of the file that keeps an index
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx", ".txt")
_MOST_KINDS = 12  # of what is left out that are counted one by one

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
    """Lists the images in a folder, or reads the list of an earlier time.

    That is used as long as no folder in it has changed. At a URL, where folders carry no times,
    they are listed anew every time.

    Args:
      folder: local, or a URL.
      by_class: whether the images are those in its class folders, each of which must have one.
      cache_dir: for the list; None: flora_jax/index in $XDG_CACHE_HOME or ~/.cache. One that
        cannot be written is no error.

    Raises:
      InputError: there is no class folder, a folder has no image or cannot be read, or two class
        folders are one; names it.
    """
    cache_dir = None if is_url(folder) else cache_dir or user_cache_dir("index")
    if cache_dir is None:
        return _scan(folder, by_class)[0]
    name = hashlib.blake2b(os.fsencode(folder), digest_size=16).hexdigest()
    name = name if by_class else f"{name}-unlabelled"
    file = epath.Path(cache_dir) / f"{name}.json"
    if kept := _read(file, folder):
        return kept
    index, stamps = _scan(folder, by_class)
    folders = {inside: [stamp, index.images.get(inside, [])] for inside, stamp in stamps.items()}
    try:
        write_json(file, {"format": _FORMAT, "left_out": index.left_out, "folders": folders})
    except OSError as error:
        log.info("the index of %s is not kept: %s", folder, error)
    return index


def _read(file: epath.Path, folder: epath.Path) -> Index | None:
    try:
        content = read_json(file)
        if content["format"] == _FORMAT:
            folders = content["folders"]
            if all(stamp_of(folder / inside) == stamp for inside, (stamp, _) in folders.items()):
                images = {inside: names for inside, (_, names) in folders.items() if names}
                return Index(images, dict(content["left_out"]))
        log.info("%s has changed since its index was made", folder)
    except FileNotFoundError:  # the first time
        pass
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        log.warning("the index %s cannot be used and is made again: %s", file, error)
    return None


def _scan(folder: epath.Path, by_class: bool) -> tuple[Index, dict[str, Stamp]]:
    """Lists a folder, with the stamps of whatever makes the list stale when it changes."""
    log.info("listing the images in %s", folder)
    tree = Tree(folder)
    inside = tree.enter_top()
    if by_class and not inside:
        hint = f"; images:{folder} takes pictures without classes" * bool(tree.found["."].images)
        raise InputError(
            f"no class folder in {folder}: expected {folder}/CLASS/*.jpeg; {contents(folder)}{hint}"
        )
    tree.enter(inside)
    tree.follow_links([place for place in tree.found if place != "."])
    tree.drop_linked_twice()
    if by_class:
        tree.left_out[OUTSIDE] += len(tree.found["."].images)
        tree.found["."].images = []
    _check_not_empty(folder, tree.found, inside if by_class else [])
    stamps = {place: listing.stamp for place, listing in tree.found.items()}
    for place, listing in tree.found.items():
        stamps |= {f"{place}/{link}": None for link in listing.dangling}
    images = {place: listing.images for place, listing in tree.found.items() if listing.images}
    return Index(images, _by_kind(tree.left_out)), stamps


def _check_not_empty(folder: epath.Path, found: dict[str, Listing], classes: list[str]) -> None:
    counts: collections.Counter[str] = collections.Counter()
    for inside, listing in found.items():
        counts[class_of(inside) if classes else "."] += len(listing.images)
    for name in classes or ["."]:
        if not counts[name]:
            kind = "class folder" if classes else "folder"
            reason = "" if name in found else "; it is a link to a folder that is listed elsewhere"
            raise InputError(
                f"no image in the {kind} {folder / name}: expected files *{', *'.join(SUFFIXES)}"
                f"{reason}"
            )


def _by_kind(left_out: collections.Counter[str]) -> dict[str, int]:
    """The commonest kinds first; "other" stands for those that are rare."""
    kinds = sorted(kind for kind, count in left_out.items() if count)
    common = sorted(kinds, key=lambda kind: -left_out[kind])[:_MOST_KINDS]
    other = left_out.total() - sum(left_out[kind] for kind in common)
    return {kind: left_out[kind] for kind in common} | ({"other": other} if other else {})


def class_of(inside: str) -> str:
    """The class folder that a path inside a split begins with."""
    return inside.split("/", 1)[0]


def check_folder(path: epath.Path) -> None:
    """Raises InputError unless this is a folder; says what to do with an archive, or a file."""
    if path.is_dir():
        return
    if not path.exists():
        raise InputError(f"no folder {path}; {contents(path.parent)}")
    name = path.name.lower()
    if name.endswith(_ARCHIVES):
        raise InputError(f"{path} is an archive: unpack it, and give the folder that it makes")
    kind = "a single picture" if name.endswith(SUFFIXES) else "a file"
    hint = "; tables of labels are not read: sort the pictures by class" * name.endswith(_TABLES)
    raise InputError(
        f"{path} is {kind}: expected a folder of pictures, PATH/{{train,val}}/CLASS/*.jpeg or "
        f"PATH/CLASS/*.jpeg, or images:PATH without classes{hint}"
    )


def contents(folder: epath.Path, most: int = 10) -> str:
    """What is in a folder, for an error message."""
    if not folder.is_dir():
        return f"nor is there {folder}"
    names = names_in(folder)
    more = ", ..." if len(names) > most else ""
    return f"{folder} holds: {', '.join(names[:most]) or 'nothing'}{more}"
