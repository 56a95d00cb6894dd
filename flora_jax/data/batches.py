"""Batches of images, as numpy arrays, for training and for evaluation."""

from collections.abc import Iterator

import grain
import numpy as np

from flora_jax.data import augment
from flora_jax.data.sources import Source

Batch = dict[str, np.ndarray]


def train_batches(
    source: Source,
    transform: augment.TrainTransform,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 1,
) -> Iterator[Batch]:
    """Endless shuffled, augmented batches, prepared ahead in background threads.

    A batch is a function of (source, transform, batch_size, seed, step) alone. Starting at
    `start_step` gives the batches that an uninterrupted run would see from there, and the local
    batches of a step, one after another in process order, are the global batch, for any number
    of processes. Every epoch is a new order and a new augmentation of all images; batches run
    across the end of an epoch.

    Args:
      batch_size: images a step over all processes, B_local * process_count.
      seed: at least 0.
      start_step: the step of the first batch.
      num_threads: each prepares whole batches. Decoding a photograph runs in parallel; digits,
        which cost Python time alone, are fastest with one.

    Returns:
      An iterator of {"image": uint8 [B_local, H, W, C], "label": int32 [B_local]}; its close()
      stops the threads.

    Raises:
      ValueError: batch_size is below 1, above len(source) or no multiple of process_count,
        process_index, seed or start_step is out of range, or an image does not fit the transform.
    """
    _check_batch_size(batch_size)
    if batch_size > len(source):
        raise ValueError(f"batch_size {batch_size} is larger than the {len(source)} images")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} lies outside 0..{process_count - 1}")
    if batch_size % process_count:
        nearest = max(1, round(batch_size / process_count)) * process_count
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of the {process_count} processes; "
            f"the nearest that is: {nearest}"
        )
    for name, value in (("seed", seed), ("start_step", start_step)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")

    def prepare(example, rng):
        image = transform(example["image"], rng)
        return {"image": image, "label": np.int32(example["label"])}

    _check_shape(transform(source[0]["image"], np.random.default_rng(seed)), transform)
    batches = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(prepare)
        # Sharding comes last: the order and the random numbers belong to the global position.
        .batch(batch_size // process_count, drop_remainder=True)[process_index::process_count]
    )
    return iter(batches[start_step:].to_iter_dataset(_read_options(num_threads)))


def eval_batches(
    source: Source, transform: augment.EvalTransform, batch_size: int, num_threads: int = 1
) -> Iterator[Batch]:
    """Every image once, in the order of the source; zeros fill the last batch.

    Returns:
      An iterator of {"image": uint8 [B, H, W, C], "label": int32 [B], "mask": float32 [B]},
      mask 1 for an image and 0 for filling.

    Raises:
      ValueError: batch_size is below 1, the source is empty, or an image does not fit the
        transform.
    """
    _check_batch_size(batch_size)
    if not len(source):
        raise ValueError("the source has no images")

    def prepare(example):
        image = transform(example["image"])
        return {"image": image, "label": np.int32(example["label"]), "mask": np.float32(1)}

    def stack(examples):
        return grain.experimental.batch_and_pad(examples, batch_size=batch_size)

    _check_shape(transform(source[0]["image"]), transform)
    batches = grain.MapDataset.source(source).map(prepare).batch(batch_size, batch_fn=stack)
    return iter(batches.to_iter_dataset(_read_options(num_threads)))


def _read_options(num_threads: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _check_shape(image: np.ndarray, transform) -> None:
    if image.shape != transform.image_shape:
        raise ValueError(
            f"the transform returned an image of shape {image.shape}, "
            f"expected {transform.image_shape}"
        )
