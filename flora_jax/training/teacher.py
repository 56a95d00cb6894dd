"""A teacher runs once over a training's batches; its predictions are kept for all its students."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flora_jax.cluster.mesh import make_mesh, replicate, spread
from flora_jax.data.batches import Batch, Batches
from flora_jax.data.normalize import Normalization
from flora_jax.data.sources import Source
from flora_jax.errors import InputError
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.models.spec_json import spec_to_json
from flora_jax.progress import Progress
from flora_jax.training.records import Description, parts_to_write
from flora_jax.training.step import teacher_targets

TOP = 100


class Teacher:
    """Images uint8 [B, H, W, C] -> probabilities float32 [B, classes], as in a training step.

    Every process runs it for itself, on its own devices.
    """

    def __init__(
        self, model: Network, normalization: Normalization, compute_dtype: str = "float32"
    ):
        self.num_classes = model.spec.num_classes
        self._spec, self._normalization, self._dtype = model.spec, normalization, compute_dtype
        self._mesh = make_mesh(devices=jax.local_devices())
        self._structure, parameters = functional.split(model)
        self._parameters = replicate(jax.tree.map(np.asarray, parameters), self._mesh)

    def __call__(self, images: np.ndarray) -> jax.Array:
        spread_images = spread(images, self._mesh)
        settings = (self._structure, self._normalization, self._dtype)
        return _predict(*settings, self._parameters, spread_images)

    @functools.cached_property
    def checksum(self) -> str:
        """The sha256 of everything that the predictions depend on."""
        n = self._normalization
        settings = [spec_to_json(self._spec), n.mean, n.std, self._dtype]
        described = json.dumps(settings, sort_keys=True).encode()
        return functional.checksum(self._parameters, described)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _predict(structure, normalization, dtype, parameters, images):
    return teacher_targets(structure, parameters, normalization(images, jnp.dtype(dtype)))


def describe(
    dataset: str,
    source: Source,
    teacher: Teacher,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    augmentation: dict,
    k: int = TOP,
) -> Description:
    """The description of a teacher's predictions on the batches that a training will see.

    Args:
      dataset: its name.
      source: the training images.
      batch_size, seed: of `train_batches`.
      steps: of the training.
      augmentation: arguments of `train_transform`.
      k: classes to keep of each image, or all of them if there are fewer.
    """
    keys = hashlib.sha256()
    for index in range(len(source)):
        keys.update(source.key(index).encode(errors="surrogateescape") + b"\0")
    return Description(
        dataset=dataset,
        images=keys.hexdigest(),
        num_images=len(source),
        batch_size=batch_size,
        steps=steps,
        seed=seed,
        k=min(k, teacher.num_classes),
        num_classes=teacher.num_classes,
        teacher=teacher.checksum,
        augmentation=augmentation,
    )


def write_predictions(
    folder: epath.PathLike,
    description: Description,
    teacher: Teacher,
    batches: Callable[[int], Batches],
    process_index: int = 0,
    process_count: int = 1,
) -> None:
    """Writes this process' share, going on after what an interrupted run has written.

    Processes do not wait for one another.

    Args:
      batches: step -> this process' training batches from that step on.

    Raises:
      InputError: as `parts_to_write`, or a prediction is not finite.
    """
    parts = parts_to_write(folder, description, process_index, process_count)
    to_do = sum(len(part.missing_steps()) for part in parts)
    if not parts:
        return
    with Progress("teacher", description.steps, start=description.steps - to_do) as progress:
        for part in parts:
            steps = part.missing_steps()
            with contextlib.closing(batches(steps.start)) as stream, part.appending() as append:
                for step, batch in zip(steps, stream, strict=False):
                    top = jax.lax.top_k(teacher(batch["image"]), description.k)
                    probs, index = map(np.asarray, top)
                    if not np.isfinite(probs).all():
                        raise InputError(f"the teacher's predictions at step {step} are not finite")
                    append(probs, index)
                    progress.update()


class Difference(NamedTuple):
    """How far probabilities lie apart, absolute."""

    largest: float
    mean: float


def compare_predictions(teacher: Teacher, batches: Iterable[Batch]) -> Difference:
    """Compares stored predictions with those of a fresh pass, over the stored classes.

    float16 rounds a probability by at most 2.5e-4; more is another teacher, or other images.

    Args:
      batches: some that `StoredPredictions.attach` made.

    Raises:
      ValueError: there is no batch.
    """
    differences = []
    for batch in batches:
        index = batch["target_index"].astype(np.int32)
        fresh = np.take_along_axis(np.asarray(teacher(batch["image"])), index, axis=-1)
        differences.append(np.abs(fresh - batch["target_probs"]))
    if not differences:
        raise ValueError("there is no batch to compare")
    return Difference(
        largest=float(max(d.max() for d in differences)),
        mean=float(np.mean([d.mean() for d in differences])),
    )
