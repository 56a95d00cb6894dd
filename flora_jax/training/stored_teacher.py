"""Learning from a teacher's predictions that a run has stored on disk."""

import dataclasses
import itertools
from collections.abc import Callable, Generator

import jax
from etils import epath

from flora_jax.cluster.processes import wait_for_all
from flora_jax.data.batches import Batch, Batches
from flora_jax.training.records import Description, StoredPredictions
from flora_jax.training.teacher import Difference, Teacher, compare_predictions, write_predictions

CHECKED_STEPS = 8


@dataclasses.dataclass(frozen=True)
class StoredTeacher:
    """A teacher whose predictions for one training's batches lie in `folder`.

    Attributes:
      batches: step -> the training's batches from that step on.
    """

    folder: epath.Path
    teacher: Teacher
    description: Description
    batches: Callable[[int], Batches]

    @property
    def _process(self) -> tuple[int, int]:
        return jax.process_index(), jax.process_count()

    def write(self) -> None:
        """Goes on with what an interruption has left to write."""
        write_predictions(self.folder, self.description, self.teacher, self.batches, *self._process)
        wait_for_all(f"{self.folder}")

    def taught_batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """The batches from `start_step` on, each with its predictions."""
        stored = StoredPredictions(self.folder, self.description, *self._process)
        return stored.attach(self.batches(start_step), start_step)

    def check(self) -> Difference:
        """Compares some predictions, spread over the training, with a fresh pass of the teacher."""
        stride = max(1, self.description.steps // CHECKED_STEPS)

        def some_batches():
            for step in range(0, self.description.steps, stride):
                yield from itertools.islice(self.taught_batches(step), 1)

        return compare_predictions(self.teacher, some_batches())
