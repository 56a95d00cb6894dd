"""Images to train and to measure with: in memory, or read one by one out of a source."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.data.augment import Augmentation
from flora_jax.data.batches import Batches, eval_batches, train_batches
from flora_jax.data.labels import check_labels
from flora_jax.data.normalize import Normalization
from flora_jax.data.sources import ArraySource, Source
from flora_jax.data.subsets import shuffled
from flora_jax.errors import InputError
from flora_jax.evaluation.evaluate import EvaluationSet
from flora_jax.training.settings import Recipe

_EVALUATION_BATCH = 256


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of the size that the model takes, or a source of images of any size.

    Attributes:
      images: uint8 [n, H, W, C], or a `Source`, which has its own labels.
      labels: int [n], classes from 0; None where there are none: a teacher says what to learn, and
        a network without classes is measured by its teacher's features.
      normalization: what the model wants of pixels; ImageNet's by default.
      augmentation: of training; by default none.
      name: of the dataset.
      num_threads, num_workers: that prepare training batches, as in `train_batches`.

    Raises:
      InputError: images of another dtype or shape, not one label an image, or labels that are
        negative or not integers.
    """

    images: np.ndarray | Source
    labels: np.ndarray | None = None
    normalization: Normalization = Normalization()
    augmentation: Augmentation = Augmentation("shift", {"pixels": 0})
    name: str = "memory"
    num_threads: int = 1
    num_workers: int = 0

    def __post_init__(self):
        if not isinstance(self.images, np.ndarray):
            return
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise InputError(
                f"images must be uint8 [n, H, W, C], got {self.images.dtype} of shape "
                f"{self.images.shape}"
            )
        if self.labels is None:
            return
        if self.labels.shape != self.images.shape[:1]:
            raise InputError(f"{len(self.images)} images have labels of shape {self.labels.shape}")
        check_labels(self.labels, np.iinfo(np.int32).max, "the images")

    def __len__(self) -> int:
        return len(self.images)

    @functools.cached_property
    def source(self) -> Source:
        """The images one by one, labels -1 where there are none."""
        if not isinstance(self.images, np.ndarray):
            return self.images
        labels = np.full(len(self), -1) if self.labels is None else self.labels
        num_classes = int(labels.max(initial=-1)) + 1
        return ArraySource(self.name, self.images, labels.astype(np.int32), num_classes)

    @property
    def normalized(self) -> np.ndarray:
        """The images in memory as a model takes them, float32 [n, H, W, C]."""
        return np.asarray(self.normalization(jnp.asarray(self.images)))

    @functools.cached_property
    def on_devices(self) -> EvaluationSet:
        """The images to evaluate on, in order; they stay on the devices."""
        return self._on_devices(self.source, len(self))

    def in_parts(self, size: int) -> EvaluationSet:
        """The images to evaluate on, shuffled, in batches of at most this size."""
        return self._on_devices(shuffled(self.source, seed=0), size)

    def _on_devices(self, source: Source, most: int) -> EvaluationSet:
        size = min(_EVALUATION_BATCH, most)
        size = -(-size // jax.device_count()) * jax.device_count()
        transform = self.augmentation.evaluation(source[0]["image"].shape)
        return EvaluationSet(eval_batches(source, transform, size), self.normalization)

    def batches(
        self, recipe: Recipe, image_shape: tuple[int, int, int], seed: int
    ) -> Callable[[int], Batches]:
        """A function: step -> this process' shuffled, augmented batches from there on."""
        transform = self.augmentation.train(image_shape)

        def from_step(start: int) -> Batches:
            return train_batches(
                self.source,
                transform,
                recipe.batch_size,
                seed,
                start,
                jax.process_index(),
                jax.process_count(),
                self.num_threads,
                self.num_workers,
                recipe.repeats,
            )

        return from_step
