"""A teacher's predictions on disk: the top classes of every augmented image of a training run.

A batch is a function of (seed, step), so a record is found by its step and its place in the
global batch: no augmentation is stored, and any number of processes reads what any other number
wrote. In the folder are

  meta.json                               the Description, and how many processes wrote a part each
  epoch_0000.part_000_of_002.bin          the steps that begin in this epoch, one after another;
                                          of each step, the part's share of the global batch
  epoch_0000.part_000_of_002.bin.sha256   written once that file is complete, for `sha256sum -c`

and a record is the k largest probabilities, float16, followed by their classes, int16.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flora_jax.cluster.mesh import equal_share, make_mesh, replicate, spread
from flora_jax.cluster.processes import wait_for_all
from flora_jax.data.batches import Batch, Batches
from flora_jax.data.normalize import Normalization
from flora_jax.data.sources import Source
from flora_jax.errors import InputError, MissingFileError, differences, listed
from flora_jax.io.files import (
    matching,
    num_bytes,
    read_json,
    replacing,
    sha256,
    write_json_once,
)
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.models.spec_json import spec_to_json
from flora_jax.progress import Progress
from flora_jax.training.step import teacher_targets

FORMAT = 1
META_FILE = "meta.json"
TOP = 100  # classes kept of each image
CHECKED_STEPS = 8

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Description:
    """The description of predictions: a folder serves the runs that agree with all of it.

    Attributes:
      dataset: its name, for people: where the images lie changes no prediction.
      images: checksum of the training images' keys, in their order.
      num_images: of one epoch.
      batch_size: images a step over all processes.
      steps: of the whole training.
      seed: of the batches.
      k: classes kept of each image.
      num_classes: at most 65536.
      teacher: checksum of everything that its predictions depend on.
      augmentation: arguments of the `Augmentation`, JSON values or tuples of them.

    Raises:
      InputError: a number is out of range.
    """

    dataset: str
    images: str
    num_images: int
    batch_size: int
    steps: int
    seed: int
    k: int
    num_classes: int
    teacher: str
    augmentation: dict

    def __post_init__(self):
        for name, least, most in (
            ("batch_size", 1, self.num_images),
            ("steps", 1, None),
            ("seed", 0, None),
            ("num_classes", 1, 2**16),
            ("k", 1, self.num_classes),
        ):
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                bounds = f"at least {least}" if most is None else f"in {least}..{most}"
                raise InputError(f"{name} must be {bounds}, got {value}")

    @property
    def record(self) -> np.dtype:
        """The record of an image: probs float16 [k], index int16 [k] (uint16 for many classes)."""
        index = "<i2" if self.num_classes < 2**15 else "<u2"
        return np.dtype([("probs", "<f2", (self.k,)), ("index", index, (self.k,))])

    @property
    def num_bytes(self) -> int:
        """The size on disk of all epochs and parts together."""
        return self.steps * self.batch_size * self.record.itemsize

    @property
    def num_epochs(self) -> int:
        return self.epoch_of(self.steps - 1) + 1

    def epoch_of(self, step: int) -> int:
        """The epoch of the step's first image."""
        return step * self.batch_size // self.num_images

    def steps_of(self, epoch: int) -> range:
        """The steps whose first image is of this epoch."""
        first, stop = (-(-e * self.num_images // self.batch_size) for e in (epoch, epoch + 1))
        return range(first, min(stop, self.steps))

    def to_json(self) -> dict:
        return json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))


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
      augmentation: arguments of the `Augmentation`.
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


class Difference(NamedTuple):
    """The absolute difference of probabilities."""

    largest: float
    mean: float


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

    def write(self) -> None:
        """Goes on with what an interruption has left to write."""
        process = jax.process_index(), jax.process_count()
        write_predictions(self.folder, self.description, self.teacher, self.batches, *process)
        wait_for_all(f"{self.folder}")

    def taught_batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """The batches from `start_step` on, each with its predictions."""
        process = jax.process_index(), jax.process_count()
        stored = StoredPredictions(self.folder, self.description, *process)
        return stored.attach(self.batches(start_step), start_step)

    def check(self) -> Difference:
        """Compares some predictions, spread over the training, with a fresh pass of the teacher."""
        stride = max(1, self.description.steps // CHECKED_STEPS)

        def some_batches():
            for step in range(0, self.description.steps, stride):
                yield from itertools.islice(self.taught_batches(step), 1)

        return compare_predictions(self.teacher, some_batches())


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


class StoredPredictions:
    """Predictions to read, for one of any number of processes.

    The files of an epoch are held in memory while its steps are read: 0.5 GB for ImageNet with
    k = 100, shared out evenly if as many processes read as wrote.

    Raises:
      MissingFileError: the folder holds no predictions.
      InputError: they are not finished, or others than described, or batch_size is no multiple
        of process_count. Reading raises it for a damaged file.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        description: Description,
        process_index: int = 0,
        process_count: int = 1,
    ):
        folder = epath.Path(folder)
        if not (folder / META_FILE).exists():
            raise MissingFileError(f"{folder} has no {META_FILE}: no predictions are stored there")
        _check_meta(folder, description.to_json())
        share = description.batch_size // read_json(folder / META_FILE)["parts"]
        local = _share(description.batch_size, process_index, process_count)
        first = process_index * local
        # Positions in the global batch that this process reads lie in these parts.
        indices = range(first // share, -(-(first + local) // share))
        self._rows = slice(first - indices.start * share, first - indices.start * share + local)
        self._parts = [
            [_part(folder, description, epoch, index, share) for index in indices]
            for epoch in range(description.num_epochs)
        ]
        for part in itertools.chain.from_iterable(self._parts):
            if not part.is_complete():
                raise InputError(f"{part.path} is missing or not complete; go on with writing")
        self._description = description
        self._epoch = -1
        self._records: list[np.ndarray] = []

    def read(self, step: int) -> Batch:
        """Returns {"target_probs": float16 [B_local, k], "target_index": int16 or uint16 alike}."""
        if not 0 <= step < self._description.steps:
            raise ValueError(f"step {step} lies outside 0..{self._description.steps - 1}")
        epoch = self._description.epoch_of(step)
        if epoch != self._epoch:
            self._records = [part.load() for part in self._parts[epoch]]
            self._epoch = epoch
        at = step - self._description.steps_of(epoch).start
        records = np.concatenate([part[at] for part in self._records])[self._rows]
        return {"target_probs": records["probs"], "target_index": records["index"]}

    def attach(self, batches: Batches, start_step: int = 0) -> Generator[Batch, None, None]:
        """The batches from `start_step` on, each with its predictions; closes them at the end."""
        with contextlib.closing(batches):
            for step, batch in zip(itertools.count(start_step), batches, strict=False):
                yield {**batch, **self.read(step)}


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


@dataclasses.dataclass(frozen=True)
class Part:
    """The file of one epoch and one writing process."""

    path: epath.Path
    steps: range
    record: np.dtype
    share: int  # images of a step in this part

    @property
    def _block_bytes(self) -> int:
        return self.share * self.record.itemsize

    @property
    def _checksum_path(self) -> epath.Path:
        return self.path.parent / f"{self.path.name}.sha256"

    def stored_bytes(self) -> int:
        return num_bytes(self.path) if self.path.exists() else 0

    def is_complete(self) -> bool:
        whole = self.stored_bytes() == len(self.steps) * self._block_bytes
        return whole and self._checksum_path.exists()

    def missing_steps(self) -> range:
        """The steps after the last one that was stored whole."""
        return self.steps[self.stored_bytes() // self._block_bytes :]

    @contextlib.contextmanager
    def appending(self) -> Iterator[Callable[[np.ndarray, np.ndarray], None]]:
        """Yields append(probs [share, k], index [share, k]) for each missing step in turn.

        On success the checksum is written.
        """
        self._checksum_path.unlink(missing_ok=True)
        with self.path.open("ab") as file:
            # A block that an interruption tore is written anew.
            file.truncate((len(self.steps) - len(self.missing_steps())) * self._block_bytes)

            def append(probs: np.ndarray, index: np.ndarray) -> None:
                records = np.empty(self.share, self.record)
                records["probs"], records["index"] = probs, index
                file.write(records.tobytes())

            yield append
        with replacing(self._checksum_path) as partial:
            partial.write_text(f"{sha256(self.path)}  {self.path.name}\n")

    def load(self) -> np.ndarray:
        """Reads all its records [steps, share]; InputError where they are not as written."""
        content = self.path.read_bytes()
        if hashlib.sha256(content).hexdigest() not in self._checksum_path.read_text():
            raise InputError(
                f"{self.path} is damaged: its checksum is not the one in "
                f"{self._checksum_path.name}; delete it, and writing again replaces it alone"
            )
        return np.frombuffer(content, self.record).reshape(len(self.steps), self.share)


def parts_to_write(
    folder: epath.PathLike, description: Description, process_index: int, process_count: int
) -> list[Part]:
    """This process' files that are not complete yet, in a folder that is made where need be.

    Logs the size of the whole.

    Args:
      folder: on a disk that can append to files, shared by all processes or not.

    Raises:
      InputError: the folder holds other predictions or was begun by another number of processes,
        batch_size is no multiple of process_count, or the disk is too full.
    """
    folder = epath.Path(folder)
    share = _share(description.batch_size, process_index, process_count)
    meta = {**description.to_json(), "parts": process_count}
    if (folder / META_FILE).exists():
        _check_meta(folder, meta)
    folder.mkdir(parents=True, exist_ok=True)
    _check_disk(folder, description)
    write_json_once(folder / META_FILE, meta)
    parts = [
        _part(folder, description, epoch, process_index, share)
        for epoch in range(description.num_epochs)
    ]
    return [part for part in parts if not part.is_complete()]


def _part(folder: epath.Path, description: Description, epoch: int, index: int, share: int) -> Part:
    count = description.batch_size // share
    path = folder / f"epoch_{epoch:04d}.part_{index:03d}_of_{count:03d}.bin"
    return Part(path, description.steps_of(epoch), description.record, share)


def _share(batch_size: int, process_index: int, process_count: int) -> int:
    """Images of a step in each process."""
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} lies outside 0..{process_count - 1}")
    return equal_share("batch_size", batch_size, process_count, of="processes")


def _check_meta(folder: epath.Path, expected: dict) -> None:
    there = {**read_json(folder / META_FILE), "dataset": expected["dataset"]}
    differing = listed(differences({name: there.get(name) for name in expected}, expected))
    if differing:
        raise InputError(
            f"{folder} holds other predictions; choose another folder or undo:{differing}"
        )


def _check_disk(folder: epath.Path, description: Description) -> None:
    stored = sum(map(num_bytes, matching(folder, "epoch_*.bin")))
    needed, free = description.num_bytes - stored, shutil.disk_usage(folder).free
    sizes = (
        f"predictions of {description.steps} steps take {description.num_bytes / 1e9:.3g} GB "
        f"({description.num_bytes / description.num_epochs / 1e9:.3g} GB an epoch)"
    )
    if needed > free:
        raise InputError(
            f"{sizes}: {needed / 1e9:.3g} GB are still to write, but {folder} has "
            f"{free / 1e9:.3g} GB free; a smaller k (here {description.k}) takes less"
        )
    log.info("%s, of which %.3g GB are still to write to %s", sizes, needed / 1e9, folder)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _predict(structure, normalization, dtype, parameters, images):
    return teacher_targets(structure, parameters, normalization(images, jnp.dtype(dtype)))
