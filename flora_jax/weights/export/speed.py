"""Milliseconds of models in the engines that run them, and whether these can be told from noise.

All models of an engine take turns, so that a machine that is busy slows them alike, and each is
compared with the first one round by round.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from flora_jax.errors import InputError
from flora_jax.models.network import Network
from flora_jax.progress import Progress
from flora_jax.timing import Name, time_in_turn
from flora_jax.weights.export.engines import Engine, Forward, Prepare, is_out_of_memory

_ROUNDS = 20  # at most, of one engine and batch size
_SECONDS = 10  # after which no further round of these begins
_TURN = 0.2  # seconds that a model is run in its turn, at least once
_PAUSE = 0.1  # seconds between two turns, in which threads of the one before stop spinning
_SURE = 0.1  # of the saving that is promised
Turn = Callable[[], object]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Row:
    """Time of one model for a batch in one engine.

    Attributes:
      batch: images.
      ms: milliseconds, the median of all rounds.
      ratio: to the dense model in the same round, the median.
      low, high: quartiles of that ratio.
      error: of that median, twice its standard error.
      macs_share: multiply-adds as a share of the dense model's.
    """

    engine: str
    batch: int
    model: str
    ms: float
    ratio: float
    low: float
    high: float
    error: float
    macs_share: float

    @property
    def is_sure(self) -> bool:
        """Whether the rounds agree on the saving, to a tenth of what the multiply-adds promise."""
        return self.error <= _SURE * max(1 - self.macs_share, 0) or self.error == 0


def measure(
    models: Mapping[str, Network],
    engines: Sequence[Engine],
    batch_sizes: Sequence[int],
    repeats: int = 3,
) -> tuple[list[Row], list[dict]]:
    """Times the models, the first of which is what the others are compared with.

    An engine that cannot take one of them is left out, with a line in the log.

    Args:
      repeats: of all rounds, at most, where these do not agree.

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
                turns = _turns(opened, batch)
                short = [name for name in models if name not in turns]
                too_large += [{"engine": engine.name, "batch": batch, "model": n} for n in short]
                if reference in turns:
                    rows += _rows(engine.name, batch, turns, macs, repeats)
                progress.update(1, batch=batch)
    return rows, too_large


def time_networks(
    networks: Mapping[Name, Network], engine: Engine, batch_size: int, rounds: int
) -> dict[Name, np.ndarray]:
    """Milliseconds of networks for a batch in an engine, in each round, float64 [rounds]."""
    turns = {name: _turn(engine.open(n)(batch_size)) for name, n in networks.items()}
    return _time(turns, rounds)


def _time(
    turns: Mapping[Name, tuple[int, Turn]], rounds: int, seconds: float = math.inf
) -> dict[Name, np.ndarray]:
    work = {name: run for name, (_, run) in turns.items()}
    times = time_in_turn(work, rounds, _PAUSE, warm_up=0, seconds=seconds)
    return {name: ms / turns[name][0] for name, ms in times.items()}


def _turns(opened: Mapping[str, Prepare], batch: int) -> dict[str, tuple[int, Turn]]:
    """Of the models that memory holds: how often a turn runs a batch, and the turn."""
    turns: dict[str, tuple[int, Turn]] = {}
    for name, prepare in opened.items():
        try:
            turns[name] = _turn(prepare(batch))
        except Exception as error:  # each engine has its own
            if not is_out_of_memory(error):
                raise
    return turns


def _turn(run: Forward) -> tuple[int, Turn]:
    """Warms up, and returns how often a turn runs it, and the turn."""
    run()
    started = time.perf_counter()
    run()
    count = max(1, math.ceil(_TURN / (time.perf_counter() - started)))
    return count, lambda: [run() for _ in range(count)]


def _rows(
    engine: str,
    batch: int,
    turns: Mapping[str, tuple[int, Turn]],
    macs: Mapping[str, int],
    repeats: int,
) -> list[Row]:
    times = {name: np.empty(0) for name in turns}
    for _ in range(repeats):
        found = _time(turns, _ROUNDS, _SECONDS)
        times = {name: np.append(times[name], ms) for name, ms in found.items()}
        rows = [_row(engine, batch, name, times, macs) for name in times]
        if all(row.is_sure for row in rows):
            break
    return rows


def _row(
    engine: str, batch: int, name: str, times: Mapping[str, np.ndarray], macs: Mapping[str, int]
) -> Row:
    reference, ms = next(iter(macs)), times[name]
    low, middle, high = np.percentile(ms / times[reference], (25, 50, 75)).tolist()
    error = 2 * 1.253 / 1.349 * (high - low) / math.sqrt(len(ms))  # were the ratios normal
    share = macs[name] / macs[reference]
    return Row(engine, batch, name, float(np.median(ms)), middle, low, high, error, share)
