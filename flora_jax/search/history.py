"""The history of a search: JSON lines, what the search is and then one line a generation."""

import dataclasses
import json
import logging
import os

from etils import epath

from flora_jax.io.files import is_url, replacing
from flora_jax.processes import by_the_first, wait_for_all

log = logging.getLogger(__name__)

_COLUMNS = ("genes", "cost", "score", "top1")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A scored subnet.

    Attributes:
      genes: L of them.
      cost: in the unit of the search, which the first line of its history names.
      score: what the search maximises.
      top1: accuracy in 0..1 on the same images.
    """

    generation: int
    genes: tuple[int, ...]
    cost: int
    score: float
    top1: float


def read_history(path: epath.PathLike) -> list[Candidate]:
    """Every candidate scored so far, in order; an unfinished last line is left out."""
    _, generations, _ = _parse(epath.Path(path).read_bytes())
    return [candidate for members in generations for candidate in members]


def resume(path: epath.Path, header: str) -> list[list[Candidate]]:
    """The complete generations of a history, which is cut behind the last of them."""
    if not path.exists():
        return []
    content = path.read_bytes()
    wait_for_all("history is read")  # the first process may cut it
    if header.encode().startswith(content):  # stopped while the first line was written
        content = header.encode()
    found, generations, good_bytes = _parse(content)
    wanted = json.loads(header)["search"]
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        told = ", ".join(f"{key} {found.get(key)} instead of {wanted[key]}" for key in differing)
        raise ValueError(f"history {path} belongs to another search ({told}); use another path")
    if good_bytes < len(content):
        log.warning("history %s is cut behind its %d complete generations", path, len(generations))
        _cut(path, content[:good_bytes])
    return generations


def _parse(content: bytes) -> tuple[dict, list[list[Candidate]], int]:
    """What the search is, its complete generations, and the bytes up to the end of them."""
    header, *lines = content.splitlines(keepends=True) or [b""]
    try:
        search = json.loads(header)["search"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("not the history of a search: its first line does not say so") from error
    generations, good_bytes = [], 0
    for line in lines:
        members = _from_line(line, generation=len(generations))
        if members is None:
            break
        generations.append(members)
        good_bytes = (good_bytes or len(header)) + len(line)
    return search, generations, good_bytes


def to_line(generation: int, members: list[Candidate]) -> str:
    columns = {name: [getattr(c, name) for c in members] for name in _COLUMNS}
    return json.dumps({"generation": generation, **columns}) + "\n"


def _from_line(line: bytes, generation: int) -> list[Candidate] | None:
    """The candidates of a complete line of this generation, None for anything else."""
    try:
        record = json.loads(line)
        columns = zip(*(record[name] for name in _COLUMNS), strict=True)
        members = [Candidate(generation, tuple(genes), *values) for genes, *values in columns]
        is_complete = line.endswith(b"\n") and record["generation"] == generation
    except (ValueError, KeyError, TypeError):
        return None
    return members if is_complete else None


@by_the_first
def append(path: epath.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_url(path):
        _replace(path, (path.read_bytes() if path.exists() else b"") + text.encode())
        return
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


@by_the_first
def _cut(path: epath.Path, content: bytes) -> None:
    _replace(path, content)


def _replace(path: epath.Path, content: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(content)
