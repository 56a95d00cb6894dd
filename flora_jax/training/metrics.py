"""Files of a training beside its checkpoints: a line a step, the best parameters, a profile."""

import os
import time
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from flora_jax.cluster.mesh import replicate
from flora_jax.cluster.processes import is_first
from flora_jax.evaluation.quality import QUALITIES
from flora_jax.io.checkpoint import Checkpoints
from flora_jax.io.json_lines import JsonLines, read_lines
from flora_jax.models.functional import Parameters
from flora_jax.training.optimizer import learning_rate_schedule
from flora_jax.training.settings import TrainSettings
from flora_jax.training.watch import Write

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """A JSON line a step, which the first process writes. Use as a context manager.

    Lines that a resumed run repeats are dropped. All that is timing is "images_per_second", in the
    last line of each reading: everything else is the same whenever and wherever it is written.

    Args:
      path: None: nothing is written.
      watch: also takes the records that are written, such as `watching` makes it.
    """

    def __init__(
        self,
        path: epath.Path | None,
        start: int,
        settings: TrainSettings,
        clock: Callable[[], float] = time.monotonic,
        *,
        watch: Write = lambda records: None,
    ):
        self._watch = watch
        self._settings, self._clock, self._next = settings, clock, start
        self._rates = np.asarray(learning_rate_schedule(settings)(np.arange(settings.steps)))
        is_written = path is not None and is_first()
        self._file = JsonLines(path, read_lines(path)[:start]) if is_written else None
        self._records: list[dict] = []

    def __enter__(self) -> "MetricsFile":
        self._since = self._clock()
        return self

    def __exit__(self, *exception) -> None:
        if self._file is not None:
            self._file.__exit__(*exception)

    def read(self, values: np.ndarray) -> None:
        """Takes loss and gradient norm of the next steps, float32 [steps, 2], as they are read."""
        steps = range(self._next, self._next + len(values))
        rates = self._rates[steps.start : steps.stop].tolist()
        for step, (loss, norm), rate in zip(steps, values.tolist(), rates, strict=True):
            record = {"step": step, "loss": loss, "gradient_norm": norm, "learning_rate": rate}
            self._records.append(record)
        seconds = max(self._clock() - self._since, 1e-9)
        rate = len(values) * self._settings.batch_size / seconds
        self._records[-1]["images_per_second"] = round(rate, 1)
        self._next += len(values)

    def write(self, found: dict[str, float], *, durable: bool) -> dict[str, float]:
        """Writes what was read, and beside its last step what evaluators have found.

        Returns:
          What a progress display has room for: the mean loss, the last step's other values, the
          learning rate for 512 images as in a recipe, and of
          what was found the accuracies or cosines where there are any.
        """
        self._records[-1] |= found
        if self._file is not None:
            self._file.append(self._records, durable=durable)
        self._watch(self._records)
        loss = float(np.mean([record["loss"] for record in self._records]))
        last = self._records[-1]
        rate = last["learning_rate"] * 512 / self._settings.batch_size  # as a recipe states it
        shown = {"loss": loss, "rate": rate, "images/s": last["images_per_second"]}
        self._records, self._since = [], self._clock()
        return shown | ({name: v for name, v in found.items() if _is_shown(name)} or found)


def _is_shown(name: str) -> bool:
    return any(quality.shown.name in name for quality in QUALITIES)


class BestParameters:
    """The parameters that evaluated best, in a folder of their own. Use as a context manager.

    Args:
      like: arrays laid out as the parameters.
    """

    def __init__(self, directory: epath.Path, like: Parameters, mesh: Mesh):
        self._checkpoints = Checkpoints(directory, keep=1)
        self._none = {"score": replicate(np.float32(-np.inf), mesh), "parameters": like}
        self._score = float(self._checkpoints.restore(self._none)["score"])
        self._mesh = mesh

    def __enter__(self) -> "BestParameters":
        return self

    def __exit__(self, *exception) -> None:
        self._checkpoints.__exit__(*exception)

    def keep_better(self, step: int, parameters: Parameters, score: float) -> None:
        """Keeps these if nothing has scored as much; raises as `Checkpoints.save`."""
        if score > self._score:
            self._score = score
            scored = {"score": replicate(np.float32(score), self._mesh), "parameters": parameters}
            self._checkpoints.save(step, scored)

    def read(self) -> Parameters:
        """The best parameters so far."""
        return self._checkpoints.restore(self._none)["parameters"]


def profiled(step_function: Callable, directory: epath.Path) -> Callable:
    """Makes the same function, whose call leaves a profile for XProf in the directory."""

    def step(*arguments):
        with jax.profiler.trace(os.fspath(directory)):
            return jax.block_until_ready(step_function(*arguments))

    return step
