"""The history of a search: JSON lines, what the search is and then one line a generation."""

import dataclasses
import json
import logging
from collections.abc import Mapping

from etils import epath

from flora_jax.errors import InputError, differences
from flora_jax.io.files import num_bytes
from flora_jax.io.json_lines import read_lines

log = logging.getLogger(__name__)

_COLUMNS = ("genes", "cost", "score")  # beside those of the metrics
_SHARE = "share"  # a column of the generations in which a candidate has not seen all images


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A scored subnet.

    Attributes:
      genes: L of them.
      cost: in the unit of the search, which the first line of its history names.
      score: what the search maximises.
      metrics: what is shown of it, on the same images, by name, such as "top1" in 0..1.
      share: of the images, that it was scored on; below 1 it was behind and did not see the others.
    """

    generation: int
    genes: tuple[int, ...]
    cost: int
    score: float
    metrics: Mapping[str, float]
    share: float = 1.0

    @property
    def has_seen_all(self) -> bool:
        """Whether its score can stand beside that of another."""
        return self.share == 1

    @property
    def top1(self) -> float:
        """Accuracy in 0..1, of a network with classes."""
        return self.metrics["top1"]


def read_history(path: epath.PathLike) -> list[Candidate]:
    """Every candidate scored so far, in order; an unfinished last line is left out."""
    lines = read_lines(path)
    _search_of(path, lines)
    return [candidate for members in _generations(lines) for candidate in members]


def resume(path: epath.Path, search: dict) -> tuple[list[bytes], list[list[Candidate]]]:
    """The lines of a history that count, and the complete generations in them.

    Args:
      search: what tells one search from another, JSON values.

    Raises:
      InputError: the file is no history, or that of another search.
    """
    header = json.dumps({"search": search}).encode() + b"\n"
    lines = read_lines(path)
    if not lines and header.startswith(path.read_bytes() if path.exists() else b""):
        return [header], []  # stopped while the first line was written, or before
    differing = list(differences(_search_of(path, lines), search))
    if differing:
        told = ", ".join(f"{name} {there} instead of {here}" for name, there, here in differing)
        advice = "use another path"
        if [name for name, there, _ in differing if there is None] == ["halving"]:
            advice = "it goes on with halving set to False, or use another path"
        raise InputError(f"history {path} belongs to another search ({told}); {advice}")
    generations = _generations(lines)
    complete = lines[: 1 + len(generations)]
    if sum(map(len, complete)) < num_bytes(path):
        log.warning("history %s is cut behind its %d complete generations", path, len(generations))
    return complete, generations


def to_record(generation: int, members: list[Candidate]) -> dict:
    """The line of a generation."""
    columns = {name: [getattr(c, name) for c in members] for name in _COLUMNS}
    if not all(candidate.has_seen_all for candidate in members):
        columns[_SHARE] = [candidate.share for candidate in members]
    metrics = {name: [c.metrics[name] for c in members] for name in members[0].metrics}
    return {"generation": generation, **columns, **metrics}


def _search_of(path: epath.PathLike, lines: list[bytes]) -> dict:
    try:
        return json.loads(lines[0])["search"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{path} is not the history of a search: its first line does not say so"
        ) from error


def _generations(lines: list[bytes]) -> list[list[Candidate]]:
    """Reads the generations behind the first line, up to a line that is damaged."""
    generations: list[list[Candidate]] = []
    for line in lines[1:]:
        members = _from_line(line, generation=len(generations))
        if members is None:
            break
        generations.append(members)
    return generations


def _from_line(line: bytes, generation: int) -> list[Candidate] | None:
    """The candidates of a line of this generation, None for anything else."""
    try:
        record = json.loads(line)
        is_next = record.pop("generation") == generation
        columns = [record.pop(name) for name in _COLUMNS]
        shares = record.pop(_SHARE, [1.0] * len(columns[0]))
        metrics = [
            dict(zip(record, row, strict=True)) for row in zip(*record.values(), strict=True)
        ]
        members = [
            Candidate(generation, tuple(genes), cost, score, own, share)
            for genes, cost, score, own, share in zip(*columns, metrics, shares, strict=True)
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return members if is_next else None
