"""Table of a check: a column for each program, a row for each thing that it needs."""

import collections
import math

from jax.sharding import Mesh

from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.preflight.programs import Program
from flora_jax.report import table
from flora_jax.report.table import human_count

GIB = 2**30


def count_parameters(network: Network) -> int:
    return sum(math.prod(p.shape) for p in functional.split(network)[1].values())


def column(
    name: str, parameters: int, macs: int, program: Program, mesh: Mesh, memory: float
) -> dict[str, str]:
    """The cells of a column by their titles, from top to bottom; `memory` is a device's, bytes."""
    cells = {
        "": name,
        "parameters": human_count(parameters),
        "images a step": str(program.images * mesh.size),
        "images a device": str(program.images),
        "multiply-adds an image": human_count(macs),
        "multiply-adds a device": human_count(macs * program.images),
        "arguments": size_text(program.arguments),
        "temporaries": size_text(program.temporaries),
        "program": size_text(program.code),
        **({"held-out images": size_text(program.resident)} if program.resident else {}),
        "all together": size_text(program.total),
        "of the memory": f"{100 * program.total / memory:.0f} %",
        "Pallas kernels": str(program.kernels),
    }
    by_kind = collections.defaultdict(list)
    for collective in program.collectives:
        kind = collective.kind + (" in a branch" if collective.in_branch else "")
        by_kind[kind].append(collective.num_bytes)
    for kind, sizes in by_kind.items():
        cells[kind] = f"{len(sizes)} of {size_text(sum(sizes))}"
    return cells | {"compiled in": f"{program.seconds:.0f} s"}


def lines_of(columns: list[dict[str, str]]) -> list[str]:
    """The rows of all columns; those of one alone are empty in the others."""
    titles = sorted({t: None for c in columns for t in c}, key=lambda t: t == "compiled in")
    rows = [[title, *(column.get(title, "") for column in columns)] for title in titles]
    return aligned(rows)


def aligned(rows: list[list[str]]) -> list[str]:
    """The rows as lines, the first column to the left and the others to the right."""
    return table.aligned(rows).splitlines()


def size_text(num_bytes: float) -> str:
    for divisor, unit in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= divisor:
            return f"{num_bytes / divisor:.2f} {unit}"
    return f"{num_bytes:.0f} B"
