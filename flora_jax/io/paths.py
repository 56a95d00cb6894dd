"""Paths as users give them; read without JAX, since the command line needs them first."""

import os
import re
import sys
from collections.abc import Iterable

from etils import epath

from flora_jax.errors import InputError, did_you_mean

_MODEL = "config.pretrained|predict|evaluate|benchmark|against|class_embeddings"
_NAMED = rf"--?(?:(?:{_MODEL})=|(?:config.data.name|data)=(?:folder|images):)(?!hf:)(.+)"


def user_path(path: epath.PathLike) -> epath.Path:
    """A path as a user gives it, in which ~ is the home folder.

    Raises:
      InputError: the user has no home folder, or it is a URL of an unknown kind, or would be taken
        for one.
    """
    text = os.path.expanduser(path)
    if text.partition("/")[0] == "~":
        raise InputError(f"{text}: this user has no home folder; give the whole path, or set HOME")
    try:
        expanded = epath.Path(text)
    except KeyError as scheme:
        raise InputError(f"{text}: unknown {scheme}; give a folder on disk or gs://...") from None
    if is_url(expanded) and not is_url(text):
        raise InputError(f"{text} would be taken for {expanded}; give another name to the folder")
    return expanded


def as_text(name: str) -> str:
    """A file name to show: bytes that are no text become replacement characters."""
    return os.fsencode(name).decode(errors="replace")


def is_url(path: epath.PathLike) -> bool:
    """True for a path on a service such as gs://, where no file can be locked or appended to."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path; a URL stays, before which epath would put the working directory."""
    if is_url(path):
        return epath.Path(path)
    return epath.Path("/" + os.path.abspath(path).lstrip("/"))  # POSIX keeps two slashes


def check_are_there(arguments: Iterable[str]) -> None:
    """Ends the program where a flag names what is not on disk, before JAX takes its seconds."""
    for argument in arguments:
        found = re.fullmatch(_NAMED, argument)
        path = os.path.expanduser(found[1]) if found else ""
        if path and not is_url(path) and not os.path.exists(path):
            folder, name = os.path.split(os.path.abspath(path))
            others = os.listdir(folder) if os.path.isdir(folder) else ()
            sys.exit(f"error: {path} is not there{did_you_mean(name, others)}")
