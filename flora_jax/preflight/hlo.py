"""Collectives and kernels of a compiled program, read off its text."""

import collections
import dataclasses
import math
import re

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=([%\w.-]+))")
_NAME = re.compile(r"[\w.-]+")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_FIRST_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communication of all devices.

    Attributes:
      kind: one of KINDS.
      num_bytes: of what is reduced, gathered or moved, whole, as one device sees it.
      in_branch: whether only some branch of a conditional, or what it calls, reaches it.
    """

    kind: str
    num_bytes: int
    in_branch: bool


def collectives(text: str) -> list[Collective]:
    """Finds the collectives of a program in its `compiled.as_text()`.

    The compiler for TPU may spread one of them over a chain of fusions, a part in each: it counts
    once.
    """
    computations = _computations(text)
    in_branches = _reached_from_branches(computations)
    found, chains = [], set()
    for computation, lines in computations.items():
        for line in lines:
            if not (match := _COLLECTIVE.search(line)):
                continue
            result, kind, start = match.groups()
            if chain := _CHAIN.search(line):
                if (kind, chain[1]) in chains:
                    continue
                chains.add((kind, chain[1]))
            group = _FIRST_GROUP.search(line)
            size = int(group[2] or len(group[1].split(","))) if group else 1
            num_bytes = _whole_bytes(kind, bool(start), _shape_bytes(result), size)
            found.append(Collective(kind, num_bytes, computation in in_branches))
    return found


def num_kernels(text: str) -> int:
    """Counts the calls of Pallas kernels."""
    return text.count('custom_call_target="tpu_custom_call"')


def size_text(num_bytes: float) -> str:
    """Bytes as they are read: 8.10 GiB."""
    for divisor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= divisor:
            return f"{num_bytes / divisor:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def _computations(text: str) -> dict[str, list[str]]:
    """Name -> the instructions of every computation."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            instructions = found.setdefault(match[1], [])
        elif line.startswith(" "):
            instructions.append(line)
    return found


def _reached_from_branches(computations: dict[str, list[str]]) -> set[str]:
    calls: dict[str, set[str]] = collections.defaultdict(set)
    to_visit: list[str] = []
    for name, lines in computations.items():
        text = "\n".join(lines)
        branches = _NAME.findall(" ".join(map("".join, _BRANCHES.findall(text))))
        calls[name].update(_CALLED.findall(text), branches)
        to_visit += branches
    reached: set[str] = set()
    while to_visit:
        name = to_visit.pop()
        if name not in reached:
            reached.add(name)
            to_visit += calls[name]
    return reached


def _shape_bytes(result: str) -> int:
    """The bytes of "f32[8,128]{1,0}", or of a tuple of such."""
    return sum(
        math.prod(int(size) for size in sizes.split(",") if size) * int(bits or 8) // 8
        for _, bits, sizes in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", result))
    )


def _whole_bytes(kind: str, is_start: bool, result: int, group_size: int) -> int:
    """A reduce-scatter has a part as its result, the start of some the operand beside theirs."""
    if kind == "reduce-scatter":
        return result * group_size
    if is_start and kind == "all-gather":
        return result * group_size // (group_size + 1)
    if is_start and kind == "collective-permute":
        return (result - 8) // 2  # two 32-bit words of its own are there as well
    return result
