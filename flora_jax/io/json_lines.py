"""JSON lines: records that are appended one by one and survive an interruption.

On a disk they are appended. In a bucket, where nothing can be appended to, the whole file is
written anew, and what was lost with an interruption are records that nobody asked to be kept.
"""

import json
import os
from collections.abc import Iterable

from etils import epath

from flora_jax.errors import StorageError
from flora_jax.io.files import replacing
from flora_jax.io.paths import is_url


def read_lines(path: epath.PathLike) -> list[bytes]:
    """The complete lines of a file, with their ends; none where there is no file."""
    path = epath.Path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def read_records(path: epath.PathLike) -> list[dict]:
    """The complete records of a file. Raises ValueError for a line that is not JSON."""
    return [json.loads(line) for line in read_lines(path)]


class JsonLines:
    """A file of records to append to. Use as a context manager.

    Args:
      path: of the file, made where there is none.
      kept: lines that it starts with, as `read_lines` gives them; whatever else it held goes.

    Raises:
      StorageError: the file cannot be written.
    """

    def __init__(self, path: epath.PathLike, kept: Iterable[bytes] = ()):
        self._path, self._lines = epath.Path(path), list(kept)
        self._write_anew()
        self._file = None if is_url(self._path) else self._path.open("ab")

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *exception) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, records: Iterable[dict], *, durable: bool) -> None:
        """Adds a line for each record.

        Args:
          durable: on return they survive a crash of the machine; False: on a disk that of this
            process, in a bucket none until the next durable ones.

        Raises:
          StorageError: they could not be written.
        """
        lines = [json.dumps(record).encode() + b"\n" for record in records]
        if self._file is None:
            self._lines += lines
            if durable:
                self._write_anew()
            return
        try:
            self._file.writelines(lines)
            self._file.flush()
            if durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise StorageError(f"writing {self._path} failed: {error}") from error

    def _write_anew(self) -> None:
        with replacing(self._path) as partial:
            partial.write_bytes(b"".join(self._lines))
