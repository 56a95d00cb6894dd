"""`flora_jax.train`: one training of a network, a supernet or a gated network, by a recipe."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import jax
import numpy as np
from etils import epath

from flora_jax.cluster.mesh import make_mesh
from flora_jax.cluster.processes import is_first
from flora_jax.data.labels import check_labels
from flora_jax.errors import InputError
from flora_jax.evaluation.evaluate import EvaluationSet, HeldOut
from flora_jax.io.json_lines import read_records
from flora_jax.io.paths import user_path
from flora_jax.models.functional import Parameters
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.training import loop
from flora_jax.training.image_set import ImageSet
from flora_jax.training.metrics import METRICS_FILE
from flora_jax.training.settings import Recipe, TrainSettings, seed_of
from flora_jax.training.stored_predictions import StoredTeacher, Teacher, describe
from flora_jax.training.watch import Watch

log = logging.getLogger(__name__)

PREDICTIONS = "predictions"  # stored ones, in the folder of a training
_SAME_LOSS = 0.98


class Wrapped(Protocol):
    """A `Supernet` or a gated network: a dataclass around the network that is trained."""

    @property
    def network(self) -> Network: ...


Model = TypeVar("Model", bound=Network | Wrapped)


def train(
    model: Model,
    images: ImageSet,
    recipe: Recipe = Recipe(),
    *,
    directory: epath.PathLike | None = None,
    name: str = "",
    teacher: Network | None = None,
    penalty: Callable[[Parameters], jax.Array] | None = None,
    sample: str | Callable[[int], np.ndarray] = "low_rank_aware",
    heldout: ImageSet | EvaluationSet | None = None,
    metric: str = "",
    seed: int = 0,
    fsdp: int = 1,
    profile_step: int = 0,
    watch: Watch | None = None,
) -> Model:
    """Trains by a recipe, a subnet a step where the model is a supernet; goes on where it stopped.

    Args:
      model: a network, a `Supernet`, or a gated network of `flora_jax.slim.add_gates`.
      recipe: by default that of FLORA's supernet, which takes 150 epochs.
      directory: receives checkpoints/ and metrics.jsonl, from which an interrupted training goes
        on, bit for bit; None: nothing is kept.
      name: of the training, from which its random numbers follow; by default the directory's.
      teacher: the uncompressed network; where `recipe.distill`, its predictions are the targets, or
        its features where the model has no classes. None: the labels are.
      penalty: of the parameters, added to the loss, such as `flora_jax.slim.SparsityPenalty()`.
      sample: which subnets of a supernet are trained: a sampling of `RankSpace.sample`, or a
        function step -> genes int32 [L].
      heldout: looked at once every `recipe.evaluate_epochs`; its metrics go to metrics.jsonl.
      metric: by which the best parameters are chosen; empty: top-1, or cosine.
      seed: of everything random.
      fsdp: devices that share one copy of the parameters and the optimiser's state.
      profile_step: a profile of this step is written to `directory`; 0 for none.
      watch: what else gets the metrics, as `watching` makes it.

    Raises:
      InputError: more images in a batch than there are, no teacher and labels that are no class of
        the model or all of one class, no teacher of a model without classes, an unknown sampling,
        or what needs a directory (stored predictions, the best parameters, a profile) without one.
      NonFiniteLossError: training diverged; the last good checkpoint is kept.
      Stopped: the process was told to end; the step it was at is saved.
    """
    network = model if isinstance(model, Network) else model.network
    space, spec = getattr(model, "space", None), network.spec
    folder = None if directory is None else user_path(directory)
    name = name or (folder.name if folder is not None else "train")
    measured = None if heldout is None else measured_by(heldout, spec, teacher)
    if not recipe.distill:
        teacher = None
    if teacher is None:
        _check_teaches(images, spec)
    batches = images.batches(recipe, spec.image_shape, seed_of(seed, f"{name}/batches"))
    if teacher is not None and recipe.stored_predictions:
        if folder is None:
            raise InputError("stored_predictions needs a directory to store them in")
        stored = stored_teacher(teacher, images, recipe, name, folder, seed)
        stored.write()
        teacher, batches = None, stored.taught_batches
    trained = loop.train(
        network,
        batches,
        steps_of(recipe, len(images), seed),
        directory=folder,
        name=name,
        normalization=images.normalization,
        draw_genes=None if space is None else _draw(space, sample, seed_of(seed, f"{name}/genes")),
        teacher=teacher,
        penalty=penalty,
        mesh=make_mesh(fsdp),
        evaluators=() if measured is None else [HeldOut(measured, space, metric)],
        evaluate_every=recipe.evaluate_every(len(images)),
        profile_step=profile_step,
        watch=watch,
    )
    if not recipe.distill and folder is not None and is_first():
        losses = [record["loss"] for record in read_records(folder / METRICS_FILE)]
        warn_if_nothing_is_learnt(name, losses)
    if isinstance(model, Network):
        return cast(Model, trained)
    return cast(Model, dataclasses.replace(cast(Any, model), network=trained))


def steps_of(recipe: Recipe, num_images: int, seed: int = 0) -> TrainSettings:
    """A recipe in steps; on TPU, whose programs are large, blocks are computed in a loop."""
    settings = recipe.settings(num_images, seed)
    return dataclasses.replace(settings, loop_over_blocks=jax.default_backend() == "tpu")


def stored_teacher(
    teacher: Network, images: ImageSet, recipe: Recipe, name: str, folder: epath.Path, seed: int
) -> StoredTeacher:
    """The teacher of the training `name` in `folder`, its predictions kept there on disk."""
    teaches = Teacher(teacher, images.normalization, recipe.compute_dtype)
    image_shape, batches_seed = teacher.spec.image_shape, seed_of(seed, f"{name}/batches")
    description = describe(
        images.name,
        images.source,
        teaches,
        batch_size=recipe.batch_size,
        steps=steps_of(recipe, len(images)).steps,
        seed=batches_seed,
        augmentation={
            "image_shape": image_shape,
            "name": images.augmentation.name,
            **images.augmentation.changes,
            "repeats": recipe.repeats,
        },
    )
    batches = images.batches(recipe, image_shape, batches_seed)
    return StoredTeacher(folder / PREDICTIONS, teaches, description, batches)


def _draw(space, sample: str | Callable[[int], np.ndarray], seed: int):
    if callable(sample):
        return sample
    space.sample(np.random.default_rng(seed), 1, sample)  # raises for an unknown one
    return lambda step: space.sample(np.random.default_rng([seed, step]), 1, sample)[0]


def measured_by(
    images: ImageSet | EvaluationSet,
    spec: Spec,
    teacher: Network | None,
    part: int | None = None,
) -> EvaluationSet:
    """Images on the devices by which a network is measured: labels, or its teacher's features.

    Args:
      images: an `EvaluationSet` is taken as it is.
      part: of so many images at most, shuffled; None: in order.
    """
    if isinstance(images, EvaluationSet):
        return images
    on_devices = images.on_devices if part is None else images.in_parts(part)
    if spec.num_classes:
        return on_devices
    if teacher is None:
        raise InputError(
            "a network without classes is measured by its teacher's features: give the "
            "uncompressed network as teacher="
        )
    return on_devices.compared_with(teacher)


def _check_teaches(images: ImageSet, spec: Spec) -> None:
    spec.check_classifies("training without a teacher", "give the uncompressed network as teacher=")
    if not isinstance(images.images, np.ndarray):
        return  # the labels of a source are checked as it is opened
    if images.labels is None:
        raise InputError("images without labels teach nothing: give a teacher, or labels")
    labels = images.labels
    check_labels(labels, spec.num_classes, "the images")
    if len(labels) and (labels == labels[0]).all():
        raise InputError(f"all images are of the class {labels[0]}, of which nothing can be learnt")


def warn_if_nothing_is_learnt(name: str, losses: Sequence[float]) -> None:
    """Warns of a training at whose end the loss [steps] is that of its beginning."""
    tenth = len(losses) // 10
    if not tenth:
        return
    first, last = np.mean(losses[:tenth]), np.mean(losses[-tenth:])
    if last > _SAME_LOSS * first:
        log.warning(
            "%s: the loss has not moved, %.4g in its first tenth and %.4g in its last: see "
            "learning rate, epochs and labels",
            *(name, first, last),
        )
