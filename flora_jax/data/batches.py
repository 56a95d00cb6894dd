"""Batches of images, as numpy arrays, for training and for evaluation."""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Protocol

import grain
import jax
import numpy as np
from absl import flags

from flora_jax.cluster import interrupts
from flora_jax.cluster.mesh import equal_share
from flora_jax.data.augment import TrainTransform
from flora_jax.data.preprocessing import Crop
from flora_jax.data.sources import Source
from flora_jax.errors import InputError

Batch = dict[str, np.ndarray]


class Batches(Iterator[Batch], Protocol):
    """Batches one after another; `close` ends the threads and processes behind them."""

    def close(self) -> None: ...


def train_batches(
    source: Source,
    transform: TrainTransform,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 1,
    num_workers: int = 0,
    repeats: int = 1,
) -> Batches:
    """Endless shuffled, augmented batches, prepared ahead in background threads or processes.

    A batch is a function of (source, transform, batch_size, seed, step) alone. Starting at
    `start_step` gives the batches that an uninterrupted run would see from there, and the local
    batches of a step, one after another in process order, are the global batch, for any number
    of processes, threads and workers. Every epoch is a new order and a new augmentation of all
    images; batches run across the end of an epoch.

    Args:
      batch_size: images a step over all processes, B_local * process_count.
      start_step: the step of the first batch.
      num_threads: each prepares whole batches. Decoding a photograph runs in parallel; digits,
        which cost Python time alone, are fastest with one.
      num_workers: background processes that prepare whole batches in turn, in place of threads;
        0: threads. They take seconds to start, `source` and `transform` must pickle, and shared
        memory must have room for a few batches of each.
      repeats: times that an image comes in a row, each time with another augmentation (repeated
        augmentation, Hoffer et al. 2020). All images have then been seen after as many epochs.

    Returns:
      An iterator of {"image": uint8 [B_local, H, W, C], "label": int32 [B_local]}; its close()
      stops the threads and workers.

    Raises:
      InputError: batch_size is above len(source) or no multiple of process_count.
    """
    if batch_size > len(source):
        raise InputError(f"batch_size {batch_size} is larger than the {len(source)} images")
    local_size = equal_share("batch_size", batch_size, process_count, of="processes")

    def prepare(example, rng):
        image = transform(example["image"], rng)
        return {"image": image, "label": np.int32(example["label"])}

    order = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if repeats > 1:
        order = grain.MapDataset.source(_Repeated(order, repeats)).seed(seed)
    stack = _Stack(local_size, num_workers > 0)
    batches = order.random_map(prepare).batch(local_size, drop_remainder=True, batch_fn=stack)
    # Sharding comes last: the order and the random numbers belong to the global position.
    mine = batches[process_index::process_count]
    return _prefetched(mine[start_step:], num_threads, num_workers)


class _Repeated:
    """Endless examples, each of them several times in a row."""

    def __init__(self, examples: grain.MapDataset, repeats: int):
        self._examples, self._repeats = examples, repeats

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int):
        return self._examples[index // self._repeats]


def eval_batches(
    source: Source,
    transform: Crop,
    batch_size: int,
    num_threads: int = 1,
    num_workers: int = 0,
) -> Batches:
    """Every image once, in the order of the source; zeros fill the last batch.

    An image that a `SkippingSource` has put in the place of a bad one counts for nothing.

    Threads and workers are those of `train_batches`.

    Returns:
      An iterator of {"image": uint8 [B, H, W, C], "label": int32 [B], "mask": float32 [B]},
      mask 1 for an image and 0 for filling and in the place of a bad image.

    Raises:
      InputError: the source is empty.
    """
    if not len(source):
        raise InputError("the source has no images")

    def prepare(index, example):
        image, is_itself = transform(example["image"]), example["key"] == source.key(index)
        return {"image": image, "label": np.int32(example["label"]), "mask": np.float32(is_itself)}

    stack, examples = _Stack(batch_size, num_workers > 0), grain.MapDataset.source(source)
    batches = examples.map_with_index(prepare).batch(batch_size, batch_fn=stack)
    return _prefetched(batches, num_threads, num_workers)


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Stacks examples and fills up with zeros; in a worker straight into shared memory."""

    size: int
    shared: bool

    def __call__(self, examples: list[Batch]) -> Batch:
        empty = grain.multiprocessing.SharedMemoryArray if self.shared else np.empty
        batch = {}
        for name, first in examples[0].items():
            batch[name] = array = empty((self.size, *first.shape), first.dtype)
            np.stack([example[name] for example in examples], out=array[: len(examples)])
            array[len(examples) :] = 0
        return batch


def _prefetched(
    batches: grain.MapDataset, num_threads: int, num_workers: int
) -> grain.DatasetIterator:
    if num_workers:
        interrupts.leave_to_this_process()
        num_threads = 0  # a worker prepares its batches itself
        if not flags.FLAGS.is_parsed():  # Grain reads flags, which a notebook has not parsed
            flags.FLAGS.mark_as_parsed()
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    workers = grain.MultiprocessingOptions(num_workers=num_workers)
    return iter(batches.to_iter_dataset(options).mp_prefetch(workers, _start_worker))


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Ties a worker's life to the main process', and keeps its hands off the accelerators."""
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process' to answer
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
