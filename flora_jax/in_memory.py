"""FLORA step by step on images in memory: what a notebook calls.

    supernet = flora.factorize(model, space, calibration=flora.calibrate(model, train.normalized))
    supernet = flora.train(supernet, train, recipe, directory="runs/nb/supernet", teacher=model)
    best = flora.evolve(supernet, heldout, macs=(low, high), directory="runs/nb/search")
    subnet = flora.extract(supernet, best.genes)

Each step resumes from its directory, as the stages of a run do.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flora_jax.data.augment import Augmentation
from flora_jax.data.batches import Batches, eval_batches, train_batches
from flora_jax.data.labels import check_labels
from flora_jax.data.normalize import Normalization
from flora_jax.data.sources import ArraySource, Source
from flora_jax.data.subsets import shuffled
from flora_jax.errors import InputError
from flora_jax.evaluation.evaluate import EvaluationSet, HeldOut
from flora_jax.flora import evolution, filter
from flora_jax.flora.block_scorer import local_supernet, score_block
from flora_jax.flora.evolution import EvolutionSettings
from flora_jax.flora.extras.halving import Window, looks_at
from flora_jax.flora.history import Candidate
from flora_jax.flora.image_scores import image_scores
from flora_jax.flora.sampling import space_law
from flora_jax.flora.space import RankSpace
from flora_jax.flora.supernet import Supernet
from flora_jax.io.paths import user_path
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.runs.sections import FILTER_TRAINING
from flora_jax.training.loop import train as train_network
from flora_jax.training.settings import Recipe

Model = TypeVar("Model", Network, Supernet)
_EVALUATION_BATCH = 256


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in memory, of the size that the model takes.

    Attributes:
      images: uint8 [n, H, W, C].
      labels: int [n], classes from 0; None where there are none: a teacher says what to learn, and
        a network without classes is measured by its teacher's features.
      normalization: what the model wants of pixels; ImageNet's by default.
      augmentation: of training, as in `train_transform`; by default none.

    Raises:
      InputError: images of another dtype or shape, not one label an image, or labels that are
        negative or not integers.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    normalization: Normalization = Normalization()
    augmentation: Augmentation = Augmentation("shift", {"pixels": 0})

    def __post_init__(self):
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

    @property
    def normalized(self) -> np.ndarray:
        """What a model takes, float32 [n, H, W, C]."""
        return np.asarray(self.normalization(jnp.asarray(self.images)))

    @functools.cached_property
    def on_devices(self) -> EvaluationSet:
        """To evaluate on; the images stay on the devices."""
        return self._on_devices(self._source, len(self))

    @functools.cached_property
    def in_parts(self) -> EvaluationSet:
        """The same, shuffled, in batches of the first part that a search looks at."""
        return self._on_devices(shuffled(self._source, seed=0), looks_at(len(self))[0])

    def _on_devices(self, source: Source, most: int) -> EvaluationSet:
        size = min(_EVALUATION_BATCH, most)
        size = -(-size // jax.device_count()) * jax.device_count()
        transform = self.augmentation.evaluation(self.images.shape[1:])
        return EvaluationSet(eval_batches(source, transform, size), self.normalization)

    def batches(self, recipe: Recipe, seed: int = 0) -> Callable[[int], Batches]:
        """Makes a function: step -> shuffled, augmented batches from there on."""
        transform = self.augmentation.train(self.images.shape[1:])

        def from_step(start: int) -> Batches:
            processes = jax.process_index(), jax.process_count()
            size, repeats = recipe.batch_size, recipe.repeats
            return train_batches(
                self._source, transform, size, seed, start, *processes, repeats=repeats
            )

        return from_step

    @property
    def _source(self) -> ArraySource:
        labels = np.full(len(self), -1) if self.labels is None else self.labels
        return ArraySource(
            "memory", self.images, labels.astype(np.int32), num_classes=int(labels.max()) + 1
        )


def train(
    model: Model,
    images: ImageSet,
    recipe: Recipe = Recipe(),
    *,
    directory: epath.PathLike,
    teacher: Network | None = None,
    heldout: ImageSet | None = None,
    law: str = "low_rank_aware",
    seed: int = 0,
) -> Model:
    """Trains a network, or a supernet by a subnet a step, or goes on where `directory` says.

    Args:
      recipe: by default that of FLORA's supernet, which takes 150 epochs.
      directory: receives checkpoints/ and metrics.jsonl.
      teacher: its predictions are the targets, or its features where the model has no classes;
        None: the labels are.
      heldout: looked at once every `recipe.evaluate_epochs`; its metrics go to metrics.jsonl.
      law: of `RankSpace.sample`, by which the subnets of a supernet are drawn.

    Raises:
      InputError: more images in a batch than there are, no teacher and labels that are no class of
        the model or all of one class, or no teacher of a model without classes.
      NonFiniteLossError, Stopped: as `flora_jax.training.loop.train`.
    """
    space = model.space if isinstance(model, Supernet) else None
    spec = (model if space is None else space).spec
    if teacher is None:
        _check_teaches(images, spec)
    measured = None if heldout is None else _measured(heldout.on_devices, spec, teacher)
    trained = train_network(
        model.network if isinstance(model, Supernet) else model,
        images.batches(recipe, seed),
        recipe.settings(len(images), seed),
        directory=user_path(directory),
        name=user_path(directory).name,
        normalization=images.normalization,
        draw_genes=None if space is None else space_law(space, law, seed),
        teacher=teacher,
        evaluators=() if measured is None else [HeldOut(measured, space)],
        evaluate_every=recipe.evaluate_every(len(images)),
    )
    return cast(Model, trained if space is None else Supernet(trained, space))


def _measured(images: EvaluationSet, spec: Spec, teacher: Network | None) -> EvaluationSet:
    """What a network of this spec is measured by: labels, or its teacher's features."""
    if spec.num_classes:
        return images
    if teacher is None:
        raise InputError(
            "a network without classes is measured by its teacher's features: give the "
            "uncompressed network as teacher="
        )
    return images.compared_with(teacher)


def _check_teaches(images: ImageSet, spec: Spec) -> None:
    spec.check_classifies("training without a teacher", "give the uncompressed network as teacher=")
    if images.labels is None:
        raise InputError("images without labels teach nothing: give a teacher, or labels")
    labels = images.labels
    check_labels(labels, spec.num_classes, "the images")
    if len(labels) and (labels == labels[0]).all():
        raise InputError(f"all images are of the class {labels[0]}, of which nothing can be learnt")


def filter_space(
    supernet: Supernet,
    images: ImageSet,
    heldout: ImageSet,
    macs: int | Sequence[int],
    recipe: Recipe = FILTER_TRAINING,
    *,
    directory: epath.PathLike,
    teacher: Network | None = None,
    drop: float = 0.7,
    seed: int = 0,
) -> RankSpace:
    """Keeps the best rank triples of each block, as FLORA's candidate filtering does.

    Args:
      images: that the local supernet of each block is trained on, a tenth of all in the paper.
      heldout: that its triples are scored on.
      macs: budgets of the whole network, one or several; they set the price of a MAC.
      recipe: of the local supernets.
      directory: receives a training of each block.
      drop: share of each block's triples to drop.
    """
    measured, scores = _measured(heldout.on_devices, supernet.space.spec, teacher), []
    for block in range(supernet.space.num_blocks):
        local = train(
            local_supernet(supernet, block),
            images,
            recipe,
            directory=user_path(directory) / f"block_{block:02d}",
            teacher=teacher,
            law="uniform",
            seed=seed,
        )
        found = score_block(local, block, measured)
        scores.append(found[measured.quality.ranks_by])
    kept, _ = filter.filter_space(supernet.space, scores, np.atleast_1d(macs).tolist(), drop)
    return kept


def evolve(
    supernet: Supernet,
    heldout: ImageSet,
    macs: Window,
    settings: EvolutionSettings = EvolutionSettings(),
    *,
    directory: epath.PathLike,
    metric: str = "",
    teacher: Network | None = None,
    first: np.ndarray | None = None,
    halving: bool = True,
    seed: int = 0,
) -> Candidate:
    """Finds the subnet inside a window of MACs that does best on held-out images.

    Args:
      macs: (least, most) of the whole network.
      settings: sizes of the search; the defaults are FLORA's.
      directory: receives history.jsonl, from which an interrupted search goes on.
      metric: "top1" or "log_likelihood"; of a network without classes "cosine" or
        "relative_error". Empty: the log-likelihood, or the cosine.
      teacher: the uncompressed network, whose features those of subnets are compared with; it is
        needed where there are no classes.
      first: genes int32 [F, L] to begin with, such as those of `allocate`.
      halving: whether a candidate that is behind on a part of the images is not scored on the
        others.

    Returns:
      The best candidate; its `genes` are what `extract` takes.
    """
    space = supernet.space
    images = _measured(heldout.in_parts, space.spec, teacher)
    scores, shown = image_scores(supernet, images, metric, halving=halving), images.quality.shown
    history = user_path(directory) / "history.jsonl"
    [best] = evolution.evolve(
        *(space, scores, space.macs_cost, [macs], settings, seed, history),
        first=first,
        shown=shown.name,
    )
    return best
