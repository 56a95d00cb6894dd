"""flora_jax --benchmark=FOLDER: milliseconds of finished models, and their real saving.

All models of an engine take turns, so that a machine that is busy slows them alike, and each is
compared with the dense one round by round.
"""

import dataclasses
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath

from flora_jax.commands.classifier import check_is_model, holds_model, spec_as_used
from flora_jax.commands.engines import Engine, Forward, Prepare, installed_engines, is_out_of_memory
from flora_jax.errors import InputError, MissingFileError
from flora_jax.io.files import write_json
from flora_jax.io.paths import absolute, as_text, user_path
from flora_jax.models.network import Network
from flora_jax.progress import Progress
from flora_jax.report.table import aligned, human_count
from flora_jax.runs.budgets import finished_models
from flora_jax.runs.workdir import Run, done_stages, has_run
from flora_jax.timing import describe_device, time_in_turn
from flora_jax.weights.folder import load_model
from flora_jax.weights.hub import is_repository, local_folder
from flora_jax.weights.metadata.preprocessing import read_preprocessing
from flora_jax.weights.pretrained import from_pretrained

BENCHMARK_FILE = "benchmark.json"
BATCH_SIZES = ("1", "8", "64")

_ROUNDS = 20  # at most, of one engine and batch size
_SECONDS = 10  # after which no further round of these begins
_TURN = 0.2  # seconds that a model is run in its turn, at least once
_PAUSE = 0.1  # seconds between two turns, in which threads of the one before stop spinning

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Row:
    """Time of one model for a batch in one engine.

    Attributes:
      batch: images.
      ms: milliseconds, the median of all rounds.
      ratio: to the dense model in the same round, the median.
      low, high: quartiles of that ratio.
      macs_share: multiply-adds as a share of the dense model's.
    """

    engine: str
    batch: int
    model: str
    ms: float
    ratio: float
    low: float
    high: float
    macs_share: float


def benchmark(
    folder: epath.PathLike,
    against: epath.PathLike | None = None,
    batch_sizes: Sequence[str] = BATCH_SIZES,
    as_json: bool = False,
) -> None:
    """Times models in every engine that is installed, prints a table, writes benchmark.json there.

    Args:
      folder: of a run, whose finished models are compared with its dense one; or of one model.
      against: the model that all are compared with.
      batch_sizes: images of a batch, whole numbers from 1.
      as_json: print what is written to the file.

    Raises:
      MissingFileError: no model and no run is there, or none of its models is finished.
      InputError: a supernet, a batch size below 1, or as `from_pretrained`.
      StorageError: the folder cannot be written.
    """
    sizes = _batch_sizes(batch_sizes)
    models = _models(folder, against)
    engines, hints = installed_engines()
    rows, too_large = measure(models, engines, sizes)
    found = {
        "machine": ", ".join((describe_device(), *map(str, engines[1:]))),
        "jax": jax.__version__,
        "rows": [dataclasses.asdict(row) for row in rows],
        "out_of_memory": too_large,
    }
    lines = [json.dumps(found)]
    if not as_json:
        macs = {name: model.spec.macs() for name, model in models.items()}
        lines = [str(found["machine"]), table(rows, macs)]
        fits = "{engine}: batches of {batch} do not fit into memory with {model}"
        lines += [fits.format(**each) for each in too_large] + hints
    print("\n".join(lines), flush=True)  # before the file, which may not be writable
    if not is_repository(folder):
        write_json(user_path(folder) / BENCHMARK_FILE, found)


def measure(
    models: Mapping[str, Network], engines: Sequence[Engine], batch_sizes: Sequence[int]
) -> tuple[list[Row], list[dict]]:
    """Times the models, the first of which is what the others are compared with.

    An engine that cannot take one of them is left out, with a line in the log.

    Returns:
      The rows, and {"engine", "batch", "model"} of what does not fit into memory. Where that is the
      first model, there is nothing to compare others with, so that all of this batch are left out.
    """
    rows, too_large, reference = list[Row](), list[dict](), next(iter(models))
    macs = {name: model.spec.macs() for name, model in models.items()}
    total = len(engines) * len(batch_sizes)
    with Progress("benchmark", total, unit="measurement") as progress:
        for engine in engines:
            try:
                opened = {name: engine.open(model) for name, model in models.items()}
            except InputError as error:
                log.warning("%s is left out: %s", engine.name, error)
                progress.update(len(batch_sizes))
                continue
            for batch in batch_sizes:
                times = _times(opened, batch)
                short = [name for name in models if name not in times]
                too_large += [{"engine": engine.name, "batch": batch, "model": n} for n in short]
                for name, ms in times.items() if reference in times else ():
                    low, middle, high = np.percentile(ms / times[reference], (25, 50, 75)).tolist()
                    share, median = macs[name] / macs[reference], float(np.median(ms))
                    rows.append(Row(engine.name, batch, name, median, middle, low, high, share))
                progress.update(1, batch=batch)
    return rows, too_large


def table(rows: Sequence[Row], macs: Mapping[str, int]) -> str:
    """The rows as plain text, a part for each engine and batch size.

    "realised" is the share of the saved multiply-adds that is saved in milliseconds.

    Args:
      macs: multiply-adds of an image, by model.
    """
    header = ["ms", "images/s", "share of ms", "quartiles", "MACs", "share of MACs", "realised"]
    lines: list[list[str]] = []
    for (engine, batch), group in itertools.groupby(rows, lambda row: (row.engine, row.batch)):
        lines += [[""] * (1 + len(header))] if lines else []
        lines.append([f"{engine}, batch {batch}", *header])
        for row in group:
            saved = 1 - row.macs_share
            line = [
                f"  {as_text(row.model)}",
                f"{row.ms:.2f}",
                f"{1000 * batch / row.ms:.1f}",
                f"{row.ratio:.3f}",
                f"{row.low:.3f}..{row.high:.3f}",
                human_count(macs[row.model]),
                f"{row.macs_share:.3f}",
                f"{round(100 * (1 - row.ratio) / saved)} %" if saved > 0 else "",
            ]
            lines.append(line)
    return aligned(lines)


def _times(opened: Mapping[str, Prepare], batch: int) -> dict[str, np.ndarray]:
    """Milliseconds of a batch in each round, float64 [rounds], of the models that memory holds."""
    turns: dict[str, tuple[int, Forward]] = {}
    for name, prepare in opened.items():
        try:
            turns[name] = _turn(prepare(batch))
        except Exception as error:  # each engine has its own
            if not is_out_of_memory(error):
                raise
    work = {name: run for name, (_, run) in turns.items()}
    times = time_in_turn(work, _ROUNDS, _PAUSE, warm_up=0, seconds=_SECONDS)
    return {name: ms / turns[name][0] for name, ms in times.items()}


def _turn(run: Forward) -> tuple[int, Forward]:
    """Warms up, and returns how often a turn runs it, and the turn."""
    run()
    started = time.perf_counter()
    run()
    count = max(1, math.ceil(_TURN / (time.perf_counter() - started)))
    return count, lambda: [run() for _ in range(count)]


def _batch_sizes(texts: Sequence[str]) -> list[int]:
    sizes = [int(text) if text.strip().isdecimal() else 0 for text in texts]
    if not sizes or min(sizes) < 1:
        raise InputError(
            f"--batch_sizes must be whole numbers from 1, such as {','.join(BATCH_SIZES)}; "
            f"got {','.join(texts)}"
        )
    return list(dict.fromkeys(sizes))


def _models(folder: epath.PathLike, against: epath.PathLike | None) -> dict[str, Network]:
    """The models to time by their names, first the one that the others are compared with."""
    models = {} if against is None else {_name(against): _open(against)}
    # Folders of models have a config.json, too.
    is_run = not is_repository(folder) and has_run(folder) and not holds_model(user_path(folder))
    found = dict(_of_run(user_path(folder))) if is_run else {_name(folder): _open(folder)}
    if models.keys() & found.keys():
        models = {os.fspath(against or ""): model for model in models.values()}
    return models | found


def _of_run(folder: epath.Path) -> Iterator[tuple[str, Network]]:
    """Every model that the run has finished so far, by the name that its table gives it."""
    run = Run.open(folder)
    done = done_stages(run)
    stages = tuple(stage for stage in run.settings.stages if stage in done)
    so_far = Run(dataclasses.replace(run.settings, stages=stages), folder)
    paths = [(name, folder / path) for _, name, path, _ in finished_models(so_far)]
    if not paths:
        raise MissingFileError(f"{folder}: no model of this run is finished yet")
    yield from ((name, load_model(path)) for name, path in paths)


def _open(path: epath.PathLike) -> Network:
    folder = local_folder(path)
    check_is_model(folder)
    return from_pretrained(folder, spec_as_used(folder, read_preprocessing(folder)))


def _name(path: epath.PathLike) -> str:
    return os.fspath(path) if is_repository(path) else absolute(user_path(path)).name
