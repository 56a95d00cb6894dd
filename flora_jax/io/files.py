"""Files that are either the old version or the new one, never a part."""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator

from etils import epath

from flora_jax.processes import by_the_first


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a path beside `path` to write to; on success it takes the place of `path`."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def dump_json(path: epath.PathLike, value) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")


write_json = by_the_first(dump_json)


def sha256(path: epath.PathLike) -> str:
    """Of the file's content, in hexadecimal."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: epath.PathLike) -> Iterator[None]:
    """Holds the lock file `path`, which the system lets go of however the process ends.

    Raises:
      RuntimeError: another process holds it; names that process.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:  # a mode that epath lacks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise RuntimeError(f"{path.parent} is in use by another run: {holder}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def user_cache_dir(name: str) -> epath.Path:
    """Where to keep what can be made again: $XDG_CACHE_HOME/flora_jax/name, or in ~/.cache."""
    base = epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return base.expanduser() / "flora_jax" / name


def is_url(path: epath.PathLike) -> bool:
    """A folder of a service such as gs://, where files can be neither locked nor appended to."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def on_disk(path: epath.PathLike) -> Iterator[epath.Path]:
    """The file, or a copy of one at a URL for as long as it is read, by what knows disks only."""
    path = epath.Path(path)
    if not is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield path.copy(epath.Path(folder) / path.name)


def absolute(path: epath.PathLike) -> epath.Path:
    """epath would put the working directory before a URL."""
    return epath.Path(path) if is_url(path) else epath.Path(path).resolve()


def read_json(path: epath.PathLike):
    """Raises ValueError with the file's name when it is not JSON."""
    path = epath.Path(path)
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
