"""The models of a run side by side, as plain text."""

from collections.abc import Mapping

_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))
_HEADER = ("model", "top-1 %", "change", "MACs", "fewer MACs", "params", "fewer params")
_LATENCY_HEADER = ("ms", "fewer ms")
_FIRST_ROWS = ("dense", "slim", "uniform", "subnet")
_FIELDS = ("top1", "macs", "params")


def count_unit(n: float) -> tuple[int, str]:
    """The (divisor, symbol) that writes a count of this size with two decimals."""
    for divisor, symbol in _UNITS:
        if abs(n) >= 0.999995 * divisor:  # what two decimals would round up to 1000.00
            return divisor, symbol
    return 1, ""


def human_count(n: float) -> str:
    """A large count as it is read: 8.12 M, 17.57 G; below a thousand the plain number."""
    divisor, symbol = count_unit(n)
    return f"{n / divisor:.2f} {symbol}" if symbol else f"{n:g}"


def comparison_table(result: Mapping) -> str:
    """Accuracy and cost of every model of result.json, and its change against the first one.

    Args:
      result: {model: {"top1": share in 0..1, "macs": int, "params": int}}, at least one. Where
        all have "ms", milliseconds, these are shown. Entries and keys of another form are ignored.

    Returns:
      One line a model: dense, slim, uniform, subnet, then the others in the order given. "change"
      is in percentage points of top-1.

    Raises:
      ValueError: no entry has all its numbers.
    """
    models = {
        name: entry
        for name, entry in result.items()
        if isinstance(entry, Mapping) and all(field in entry for field in _FIELDS)
    }
    if not models:
        raise ValueError(f"no entry has {', '.join(_FIELDS)}; entries: {', '.join(result)}")
    names = [name for name in _FIRST_ROWS if name in models]
    names += [name for name in models if name not in _FIRST_ROWS]
    first = models[names[0]]
    rows = [_HEADER] + [_row(name, models[name], first) for name in names]
    if all("ms" in entry for entry in models.values()):
        cells = [_LATENCY_HEADER] + [_latency_cells(models[name], first) for name in names]
        rows = [row + more for row, more in zip(rows, cells, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_align(row, widths) for row in rows)


def _row(name: str, model: Mapping, first: Mapping) -> tuple[str, ...]:
    compared = model is not first
    return (
        name,
        f"{100 * model['top1']:.2f}",
        f"{_rounded(100 * (model['top1'] - first['top1']), 2):+.2f}" if compared else "",
        human_count(model["macs"]),
        _saving(model["macs"], first["macs"]) if compared else "",
        human_count(model["params"]),
        _saving(model["params"], first["params"]) if compared else "",
    )


def _latency_cells(model: Mapping, first: Mapping) -> tuple[str, str]:
    saving = _saving(model["ms"], first["ms"]) if model is not first else ""
    return f"{model['ms']:.2f}", saving


def _saving(count: float, first_count: float) -> str:
    return f"{_rounded(100 * (1 - count / first_count), 1):.1f} %"


def _rounded(value: float, digits: int) -> float:
    return round(value, digits) + 0.0  # no "-0.00"


def _align(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "   ".join(cells).rstrip()
