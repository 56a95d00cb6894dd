"""Files that are either the old version or the new one, never a part."""

import contextlib
import fcntl
import fnmatch
import functools
import hashlib
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import IO

from etils import epath

from flora_jax.cluster.processes import by_the_first
from flora_jax.errors import InputError, RunError, StorageError, UserError
from flora_jax.io.paths import is_url, user_path

log = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: epath.PathLike, is_folder: bool = False) -> Iterator[epath.Path]:
    """Yields a hidden path beside `path` to write to; on success it becomes `path`, in one piece.

    Args:
      is_folder: what is yielded is an empty folder to fill; nothing may be at `path`.

    Raises:
      StorageError: the disk is full, or the folder cannot be written; `path` is as it was.
    """
    path = epath.Path(path)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        (partial if is_folder else path.parent).mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except UserError:
        raise
    except OSError as error:
        raise StorageError(f"writing {path} failed: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            (partial.rmtree if is_folder else partial.unlink)(missing_ok=True)


making_folder = functools.partial(replacing, is_folder=True)


def write_json(path: epath.PathLike, value) -> None:
    """Replaces the file in one piece. Raises as `replacing`."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")


write_json_once = by_the_first(write_json)


def sha256(path: epath.PathLike) -> str:
    """The sha256 of the file's content, in hexadecimal."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: epath.PathLike) -> Iterator[None]:
    """Holds the lock file `path`, which the system lets go of however the process ends.

    Raises:
      RunError: another process holds it; names that process.
      StorageError: the folder cannot be written.
    """
    path = epath.Path(path)
    with _opened_to_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise RunError(f"{path.parent} is in use by another run: {holder}") from None
        except OSError as error:  # Lustre, NFS and FUSE may lack locks, each in words of its own
            reason = error.strerror
            log.warning("%s cannot be locked (%s): start no second run there", path.parent, reason)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _opened_to_lock(path: epath.Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+")  # a mode that epath lacks
    except OSError as error:
        raise StorageError(f"{path.parent} cannot be written: {error}") from error


def user_cache_dir(name: str) -> epath.Path | None:
    """A folder for what can be made again: $XDG_CACHE_HOME/flora_jax/name, or in ~/.cache.

    None, with a line in the log, where this user can keep nothing.
    """
    try:
        base = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        folder = base / "flora_jax" / name
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else f"{folder} cannot be written"
    except (OSError, InputError) as error:
        reason = str(error)
    if reason:
        log.info("no cache of %s: %s; set XDG_CACHE_HOME to a folder for it", name, reason)
        return None
    return folder


@contextlib.contextmanager
def on_disk(path: epath.PathLike) -> Iterator[epath.Path]:
    """The file, or a copy of one at a URL for as long as it is read, by what knows disks only."""
    path = epath.Path(path)
    if not is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield path.copy(epath.Path(folder) / path.name)


def num_bytes(path: epath.Path) -> int:
    """The size of a file; on a disk epath's `stat` fails where the owner is an unknown user."""
    return path.stat().length if is_url(path) else os.stat(path).st_size


def matching(folder: epath.Path, pattern: str) -> list[epath.Path]:
    """Paths in a folder such as "finetune/*/metrics.jsonl", sorted; at gs:// epath's glob fails."""
    paths = [folder]
    for part in pattern.split("/"):
        if "*" in part:
            inside = (child for path in paths if path.is_dir() for child in path.iterdir())
            paths = sorted(child for child in inside if fnmatch.fnmatch(child.name, part))
        else:
            paths = [path / part for path in paths if (path / part).exists()]
    return paths


def read_json(path: epath.PathLike):
    """Reads a JSON file in UTF-8, or in UTF-16 or UTF-32, with a byte order mark or without.

    Raises:
      InputError: it is not JSON, or in another encoding; names the file.
    """
    path = epath.Path(path)
    try:
        return json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid JSON: save it as UTF-8 ({error})") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
