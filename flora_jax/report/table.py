"""The models of a run side by side, in cells and as plain text."""

from collections.abc import Mapping, Sequence
from typing import Any

from flora_jax.evaluation.comparison import Interval, budget_name, kind_of
from flora_jax.evaluation.quality import QUALITIES, RELATIVE_ERROR, TOP1, Metric
from flora_jax.timing import busy_elsewhere

DATA = "data"  # in result.json, what the models were tested on
_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))
_FIRST_ROWS = ("dense", "probe", "slim", "uniform", "allocated", "subnet")
_OPTIONAL_COLUMNS = ("95 % interval", "against uniform (95 %)", "agreement", "relative error")


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


def named_entries(result: Mapping) -> dict[str, Any]:
    """What result.json holds by name of its row; a list of entries under the name of each budget.

    Items of lists that have no "budget" are left out, and what is said of the data.
    """
    named: dict[str, Any] = {}
    for name, value in result.items():
        if isinstance(value, list):
            entries = [item for item in value if isinstance(item, Mapping) and "budget" in item]
            named |= {budget_name(name, entry["budget"]): entry for entry in entries}
        elif name != DATA:
            named[name] = value
    return named


def in_points(difference: Interval, metric: Metric = TOP1) -> Interval:
    """A difference with its interval as the metric is shown: of shares in percentage points."""
    mean, low, high = difference
    return metric.scale * mean, metric.scale * low, metric.scale * high


def difference_text(difference: Interval, digits: int = 2) -> str:
    """A difference with its interval: +0.22 (-0.67..+1.11)."""
    return f"{_signed(difference[0], digits)} ({_interval_text(difference, digits)})"


def by_engine(benchmark: Mapping) -> dict[str, dict[str, Mapping]]:
    """The rows of benchmark.json by engine and batch, and by model."""
    found: dict[str, dict[str, Mapping]] = {}
    for row in benchmark.get("rows", ()):
        found.setdefault(f"{row['engine']}, batch {row['batch']}", {})[row["model"]] = row
    return found


def ms_cells(found: Mapping[str, Mapping], models: Sequence[str]) -> list[str]:
    """Milliseconds of these models in one of `by_engine`; "" where one was not timed."""
    return [f"{found[name]['ms']:.2f}" if name in found else "" for name in models]


def timed_on(benchmark: Mapping) -> str:
    """What the milliseconds of benchmark.json were measured on, and beside."""
    busy = busy_elsewhere(benchmark.get("busy_cores", 0.0))
    return f"{benchmark.get('machine', '')}{busy and ', while '}{busy}"


def comparison_table(result: Mapping) -> str:
    """Quality and cost of every model as plain text, a line each; as `comparison_rows`."""
    return aligned(comparison_rows(result))


def comparison_rows(result: Mapping) -> list[list[str]]:
    """Quality and cost of every model of result.json, and its change against the first one.

    Args:
      result: {model: {"top1": share in 0..1, "macs": int, "params": int}}, or with "cosine" and
        "relative_error" in the place of "top1", at least one; a list of such entries, each with its
        "budget", for several budgets. Where all have "ms", milliseconds, these are shown; "against"
        and "agreement" are where some entry has them. Entries and keys of another form are ignored.

    Returns:
      The titles of the columns, then the cells of each model: dense, probe, slim, uniform,
      allocated, subnet, then the others in the order given. "change" and its interval are in
      percentage points of top-1, or of the cosine, as is the difference to uniform; "agreement" is
      how often a model predicts the same class as the dense one.

    Raises:
      ValueError: no entry has all its numbers.
    """
    metric, models = _complete(result)
    first = next(iter(models))
    rows = [_row(metric, name, model, first, models[first]) for name, model in models.items()]
    empty = {title for title in _OPTIONAL_COLUMNS if not any(row[title] for row in rows)}
    if not all("ms" in model for model in models.values()):
        empty |= {"ms", "fewer ms"}
    header = [title for title in rows[0] if title not in empty]
    return [header] + [[row[title] for title in header] for row in rows]


def conclusions(result: Mapping) -> list[str]:
    """What came of a run, a sentence for each of its smallest models. As `comparison_rows`."""
    metric, models = _complete(result)
    first = next(iter(models))
    kinds = [kind for kind in map(kind_of, reversed(models)) if kind != "probe"]
    kind = next((kind for kind in kinds if kind in _FIRST_ROWS), kind_of(first))
    return [
        _conclusion(metric, name, model, first, models[first])
        for name, model in models.items()
        if kind_of(name) == kind
    ]


def _conclusion(metric: Metric, name: str, model: Mapping, first_name: str, first: Mapping) -> str:
    shown = f"{metric.title} {metric.scale * model[metric.name]:.{metric.digits}f}"
    shown += " %" if metric.in_percent else ""
    if model is first:
        return f"{name}: {shown}, {human_count(model['macs'])} MACs."
    change = metric.scale * (model[metric.name] - first[metric.name])
    text = f"{name}: {_saving(model['macs'], first['macs'])} fewer MACs than {first_name}; {shown}"
    text += f", change {_signed(change, metric.digits)}{' points' * metric.in_percent}"
    if difference := model.get("against", {}).get(first_name):
        interval = in_points(difference[metric.name], metric)
        text += f" (95 % interval {_interval_text(interval, metric.digits)})"
    return f"{text}."


def _complete(result: Mapping) -> tuple[Metric, dict[str, Mapping]]:
    """The metric that models are shown by, and those that have all their numbers, in order."""
    entries = {n: entry for n, entry in named_entries(result).items() if isinstance(entry, Mapping)}
    shown = (quality.shown for quality in QUALITIES)
    metric = next((m for m in shown if any(m.name in e for e in entries.values())), TOP1)
    fields = {metric.name, "macs", "params"}
    models = [name for name, entry in entries.items() if fields <= set(entry)]
    if not models:
        raise ValueError(f"no entry has {', '.join(sorted(fields))}; entries: {', '.join(result)}")
    places = {kind: place for place, kind in enumerate(_FIRST_ROWS)}
    models.sort(key=lambda name: places.get(kind_of(name), len(places)))
    return metric, {name: entries[name] for name in models}


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of as many cells each as plain text: the first column from the left, others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        texts.append("   ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(texts)


def _row(
    metric: Metric, name: str, model: Mapping, first_name: str, first: Mapping
) -> dict[str, str]:
    """The cells of a model by the title of their column."""
    compared, digits, has_ms = model is not first, metric.digits, "ms" in model and "ms" in first
    against = {
        other: in_points(differences[metric.name], metric)
        for other, differences in model.get("against", {}).items()
    }
    change = metric.scale * (model[metric.name] - first[metric.name])
    error, interval = model.get(RELATIVE_ERROR.name), against.get(first_name)
    uniform = next((other for other in against if kind_of(other) == "uniform"), None)
    return {
        "model": name,
        metric.column: f"{metric.scale * model[metric.name]:.{digits}f}",
        "change": _signed(change, digits) if compared else "",
        "95 % interval": _interval_text(interval, digits) if interval else "",
        "against uniform (95 %)": difference_text(against[uniform], digits) if uniform else "",
        "relative error": "" if error is None else f"{error:.{RELATIVE_ERROR.digits}f}",
        "agreement": f"{100 * model['agreement']:.2f} %" if "agreement" in model else "",
        "MACs": human_count(model["macs"]),
        "fewer MACs": _saving(model["macs"], first["macs"]) if compared else "",
        "params": human_count(model["params"]),
        "fewer params": _saving(model["params"], first["params"]) if compared else "",
        "ms": f"{model['ms']:.2f}" if "ms" in model else "",
        "fewer ms": _saving(model["ms"], first["ms"]) if compared and has_ms else "",
    }


def _interval_text(difference: Interval, digits: int = 2) -> str:
    _, low, high = difference
    return f"{_signed(low, digits)}..{_signed(high, digits)}"


def _signed(value: float, digits: int = 2) -> str:
    return f"{_rounded(value, digits):+.{digits}f}"


def _saving(count: float, first_count: float) -> str:
    return f"{_rounded(100 * (1 - count / first_count), 1):.1f} %"


def _rounded(value: float, digits: int) -> float:
    return round(value, digits) + 0.0  # no "-0.00"
