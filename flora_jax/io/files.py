"""Files that are either the old version or the new one, never a part."""

import contextlib
import json
import os
from collections.abc import Iterator

from etils import epath


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


def write_json(path: epath.PathLike, value) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: epath.PathLike):
    """Raises ValueError with the file's name when it is not JSON."""
    path = epath.Path(path)
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
