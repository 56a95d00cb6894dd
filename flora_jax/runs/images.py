"""The images of a run: to train with, to search with and to report on."""

import contextlib
import functools
import hashlib
import logging
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from flora_jax.closed_form.calibrate import BATCH_SIZE
from flora_jax.cluster.processes import is_first, true_in_all
from flora_jax.data.batches import eval_batches
from flora_jax.data.copies import copies_across
from flora_jax.data.sources import BadImageError, Source
from flora_jax.data.splits import Splits, load_splits
from flora_jax.data.subsets import hold_out, shuffled, subset
from flora_jax.evaluation.evaluate import EvaluationSet, evaluate_images
from flora_jax.flora.extras.halving import rungs_of
from flora_jax.models.network import Network
from flora_jax.runs.settings import Settings, network_spec
from flora_jax.training.image_set import ImageSet
from flora_jax.weights.metadata.class_names import read_class_names

log = logging.getLogger(__name__)
_SIZES = 16  # so many images' sizes tell a dataset from a smaller copy of it


class Images:
    """The splits of a run's dataset. Raises as `load_splits`."""

    def __init__(self, settings: Settings):
        data, self._settings = settings.data, settings
        self.spec = spec = network_spec(settings)
        preprocessing = data.preprocessing(spec.image_size)
        self._crop = preprocessing.crop(spec.in_channels)
        self.splits: Splits = load_splits(
            data.name,
            heldout_fraction=data.heldout_fraction,
            seed=settings.seed,
            data_dir=data.data_dir or None,
            test_split=data.test_split or None,
            heldout_split=data.heldout_split or None,
            heldout_by=data.heldout_by,
            on_bad_image=data.on_bad_image,
            classes=data.classes,
            least_side=data.augmentation.train(spec.image_shape).least_side,
            max_megapixels=data.max_megapixels,
            **preprocessing.decoding,
        )

    @property
    def train(self) -> Source:
        return self.splits.train

    @functools.cached_property
    def train_set(self) -> ImageSet:
        """The training images, augmented as the settings say."""
        return self._image_set(self.train)

    def part_of_train_set(self, fraction: float) -> ImageSet:
        """A part of the training images, such as local supernets see."""
        return self._image_set(hold_out(self.train, fraction, self.seed_of("filter/part"))[1])

    def _image_set(self, source: Source) -> ImageSet:
        data = self._settings.data
        return ImageSet(
            source,
            normalization=data.normalization,
            augmentation=data.augmentation,
            name=data.name,
            num_threads=data.num_threads,
            num_workers=data.num_workers,
        )

    def seed_of(self, purpose: str) -> int:
        return self._settings.seed_of(purpose)

    @property
    def are_labelled(self) -> bool:
        """Whether there are labels, and a network that has classes."""
        return bool(self.splits.num_classes and self.spec.classifies)

    def looked_at(self, dense: Network | None = None) -> EvaluationSet | None:
        """The held-out images that a model is looked at while it trains; `dense` as in `measured`.

        None where a network has classes and the images have no labels.
        """
        if self.spec.classifies and not self.are_labelled:
            return None
        return self.measured(self.heldout_set, dense)

    def measured(self, images: EvaluationSet, dense: Network | None) -> EvaluationSet:
        """Images of the run, with what models are measured by on them.

        Where there are no labels the dense model stands for them: its outputs where it has no
        classes, otherwise its predictions.
        """
        if self.are_labelled or dense is None:
            return images
        if not dense.spec.classifies:
            return images.compared_with(dense)
        log.info("the images have no labels: the dense model's predictions stand for them")
        return images.relabelled(evaluate_images(dense, images)["predicted"])

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the network's outputs: of the images' classes, or those its weights know."""
        if self.are_labelled:
            return tuple(self.splits.class_names)
        known = read_class_names(self._settings.pretrained) if self._settings.pretrained else ()
        return known if len(known) == self.spec.num_classes else ()

    @functools.cached_property
    def copies(self) -> tuple[int, int] | None:
        """As `copies_across`."""
        return copies_across(self.splits.train, self.splits.heldout, self.splits.test)

    @functools.cached_property
    def signature(self) -> str:
        """Tells these images from others, wherever they lie: names and labels, and some sizes.

        The first process reads them for all, which call it together.
        """
        digest = np.frombuffer(self._digest() if is_first() else bytes(32), np.uint8)
        return bytes(multihost_utils.broadcast_one_to_all(digest)).hex()

    def _digest(self) -> bytes:
        digest = hashlib.sha256()
        splits = self.splits
        for source in (splits.train, splits.heldout, splits.test):
            names = "\0".join(map(source.key, range(len(source))))
            digest.update(
                f"{source.num_classes} {len(source)} {names}".encode(errors="surrogateescape")
            )
        for source in (splits.train, splits.heldout):  # to know those of a TFDS test
            digest.update(np.asarray(source.labels, "<i4").tobytes())  # split, all of it is read
        for index in np.linspace(0, len(splits.test) - 1, _SIZES).astype(int):
            with contextlib.suppress(BadImageError):
                digest.update(str(splits.test[int(index)]["image"].shape).encode())
        return digest.digest()

    @functools.cached_property
    def heldout_set(self) -> EvaluationSet:
        """The held-out images, which stay on the devices while the run goes on.

        They are shuffled, once and for all: sources are often sorted by class.
        """
        return self._heldout_in(self._settings.data.eval_batch_size)

    @functools.cached_property
    def heldout_parts(self) -> EvaluationSet:
        """The same in batches no larger than the first part that a search looks at."""
        size = rungs_of(len(self.splits.heldout))[0]
        if size >= self._settings.data.eval_batch_size:
            return self.heldout_set
        return self._heldout_in(size)

    def _heldout_in(self, batch_size: int) -> EvaluationSet:
        seed = self.seed_of("heldout/order")
        return self.evaluation_set(shuffled(self.splits.heldout, seed), batch_size)

    def evaluation_set(self, source: Source, batch_size: int | None = None) -> EvaluationSet:
        """Every image of a source that can be decoded, on the devices.

        Args:
          batch_size: at most; by default that of the settings.
        """
        data = self._settings.data
        size = min(batch_size or data.eval_batch_size, len(source))
        size = -(-size // jax.device_count()) * jax.device_count()
        found = EvaluationSet(eval_batches(source, self._crop, size), data.normalization)
        if skipped := len(source) - found.num_images:
            log.warning(
                "%d of %d images cannot be decoded and count in no mean", skipped, len(source)
            )
        return found

    def without_augmentation(self, number: int, purpose: str) -> Iterator[np.ndarray]:
        """Batches uint8 [B, H, W, C] of at most so many training images, the same on each call.

        Those that cannot be decoded are left out.
        """
        return (images for images, _ in self.labelled(number, purpose))

    def labelled(self, number: int, purpose: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The batches of `without_augmentation`, each with its labels int32 [B]."""
        return self._some_of(self.train, number, purpose)

    def unseen(self, number: int, purpose: str) -> Iterator[np.ndarray]:
        """As `without_augmentation`, but held-out images, and training ones if these are too few.

        How far a subnet is from a model that knows its training images by heart, these do not say.
        """
        missing = max(0, number - len(self.splits.heldout))
        parts = [self._some_of(self.splits.heldout, number, purpose)]
        if missing:
            parts.append(self.labelled(missing, purpose))
        return (images for part in parts for images, _ in part)

    def of_test(self, number: int, purpose: str) -> Iterator[np.ndarray]:
        """As `without_augmentation`, but test images, and none where there are none."""
        if len(self.splits.test):
            yield from (images for images, _ in self._some_of(self.splits.test, number, purpose))

    def labelled_test(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every test image that can be decoded, with its label, for one process alone: in batches
        uint8 [B, H, W, C] and int32 [B]."""
        data = self._settings.data
        for batch in eval_batches(self.splits.test, self._crop, BATCH_SIZE, data.num_threads):
            is_image = batch["mask"] > 0
            yield batch["image"][is_image], batch["label"][is_image]

    def _some_of(
        self, source: Source, number: int, purpose: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        seed = self.seed_of(purpose)
        order = np.random.default_rng(seed).permutation(len(source))[:number]
        data, some = self._settings.data, subset(source, np.sort(order))
        size = min(data.eval_batch_size, BATCH_SIZE)
        for batch in eval_batches(some, self._crop, size, data.num_threads):
            is_image = true_in_all(batch["mask"] > 0)
            if is_image.any():
                yield batch["image"][is_image], batch["label"][is_image]
