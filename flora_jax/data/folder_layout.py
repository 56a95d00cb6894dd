"""Where the splits of a dataset in class folders are: beside one another, or nowhere yet."""

import dataclasses
import logging
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from flora_jax.data import sources
from flora_jax.data.folder_index import OUTSIDE, check_folder, contents
from flora_jax.data.image_folder import image_folder
from flora_jax.data.listing import SUFFIXES, is_hidden, names_in
from flora_jax.errors import InputError, few
from flora_jax.io.paths import absolute, user_path

_TEST_NAMES = ("test", "valid", "validation")  # taken where there is no val
_SPLIT_NAMES = {*_TEST_NAMES, "train", "training", "val", "testing", "dev", "eval"}
_LOOKED_INTO = 8  # folders in which splits may lie

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The folders of the splits inside `root`.

    Attributes:
      train: "." where the class folders lie in root itself.
      test: None where the images have no split to report on.
    """

    root: epath.Path
    train: str = "train"
    test: str | None = None


def find_layout(place: str, test_split: str | None = None) -> Layout:
    """Where the splits of a dataset are: PATH/{train,val}/CLASS, PATH/train/CLASS or PATH/CLASS.

    Args:
      place: the folder, local or a URL.
      test_split: the folder that is reported on; None: val, or the one of test, valid and
        validation that there is.

    Raises:
      InputError: it is no folder, holds no class folders, several folders could be val, or the
        splits lie elsewhere, or have other names; says where.
    """
    root = absolute(user_path(place))
    check_folder(root)
    if test_split:
        return Layout(root, test=test_split)
    if (root / "train").is_dir():
        if (root / "val").is_dir():
            return Layout(root, test="val")
        if not _is_class(root / "train"):
            return Layout(root, test=_other_than_val(root))
    _check_class_folders(root)
    return Layout(root, ".")


def open_folder(
    root: epath.Path,
    wanted: dict[str, str | None],
    least_side: int | None,
    decoding: dict[str, Any],
) -> dict[str, sources.Source]:
    """The images of the splits that are wanted, all with the labels of "training".

    Args:
      root: the folder.
      wanted: the folder of each part inside it; None: none. "test" is decoded at full size.
      least_side, decoding: for `image_folder`.

    Raises:
      InputError: as `image_folder`, or the splits have different classes.
    """
    opened = {
        part: image_folder(
            root, split, least_side=None if part == "test" else least_side, **decoding
        )
        for part, split in wanted.items()
        if split
    }
    train = opened["training"]
    for other in opened.values():
        if set(train.classes) != set(other.classes):
            raise InputError(
                f"{train.split} and {other.split} in {root} must have the same class folders; "
                f"only in {train.split}: {_missing(train.classes, other.classes)}; "
                f"only in {other.split}: {_missing(other.classes, train.classes)}{_too_deep(train)}"
            )
    return {part: source.numbered_as(train.classes) for part, source in opened.items()}


def check_several_classes(name: str, images: sources.Source) -> None:
    """Raises InputError for a dataset of a single class; says where others may be."""
    if images.num_classes != 1:
        return
    (single,), (kind, _, place) = images.class_names, name.partition(":")
    hint = _too_deep(images)
    if hint and images.key(0).startswith(f"{single}/"):
        hint += f"; did you mean '{kind}:{absolute(user_path(place)) / single}'?"
    if outside := images.left_out.get(OUTSIDE):
        hint = f"; {outside} images lie outside the class folders" + hint
    raise InputError(
        f"{name} has a single class, {single!r}, of which nothing can be learnt: at least 2 are "
        f"needed, or 'images:{place if kind == 'folder' else 'PATH'}' without any{hint}"
    )


def _too_deep(train: sources.Source) -> str:
    """A hint where all images lie in the folders of a single class folder, as classes would."""
    folders = {posixpath.dirname(train.key(i)) for i in range(len(train))}
    if train.num_classes != 1 or len(folders) < 2:
        return ""
    names = few({posixpath.basename(folder) for folder in folders})
    return f"; the classes seem to be one folder too deep: {train.class_names[0]} holds {names}"


def _other_than_val(root: epath.Path) -> str | None:
    found = [name for name in _TEST_NAMES if (root / name).is_dir()]
    usable = [name for name in found if any(_folders(root / name))]
    if len(usable) > 1:
        raise InputError(
            f"{root} holds {' and '.join(usable)} but no val: name the one to report on with "
            f"data.test_split={usable[0]}, and perhaps one to search with, "
            f"data.heldout_split={usable[1]}"
        )
    for name in set(found) - set(usable):
        log.warning("%s holds no class folders and is not used", root / name)
    for name in usable:
        log.info("%s has no val: %s is reported on; data.test_split names another", root, name)
    return usable[0] if usable else None


def _is_class(folder: epath.Path) -> bool:
    """Whether the folder is a class of that name, such as trains beside cars, and no split."""
    return not any(_folders(folder)) and bool(set(_folders(folder.parent)) - _SPLIT_NAMES)


def _check_class_folders(root: epath.Path) -> None:
    names, folders = names_in(root), list(_folders(root))
    if not folders and any(name.lower().endswith(SUFFIXES) for name in names):
        raise InputError(
            f"{root} holds pictures, but no class folders: expected {root}/CLASS/*.jpeg; "
            f"images:{root} takes pictures without classes, and folder:{root.parent} the folder "
            f"above, where {root.name} is one class of several"
        )
    if folders and {name.lower() for name in folders} <= _SPLIT_NAMES:
        raise InputError(
            f"{root} holds {few(folders)}, which seem to be splits and not classes: name the one "
            f"to train on train, and the one to report on val"
        )
    for name in folders[:_LOOKED_INTO]:
        if (root / name / "train").is_dir() and (
            len(folders) == 1 or (root / name / "val").is_dir()
        ):
            raise InputError(
                f"{contents(root)}, of which {name} holds the splits; did you mean "
                f"'folder:{root / name}'?"
            )
    if root.name == "train" and (root.parent / "val").is_dir():
        log.warning("%s is split, and val beside it not used: folder:%s is", root, root.parent)


def _folders(folder: epath.Path) -> Iterator[str]:
    """Names of the folders in one, each looked at when it is asked for: a request at a URL."""
    for name in names_in(folder):
        is_picture = name.lower().endswith(SUFFIXES)
        if not is_hidden(name) and not is_picture and (folder / name).is_dir():
            yield name


def _missing(classes: Sequence[str], others: Sequence[str], most: int = 5) -> str:
    names = sorted(set(classes) - set(others))
    shown = ", ".join(map(repr, names[:most])) or "none"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
