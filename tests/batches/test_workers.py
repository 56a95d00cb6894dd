"""Batches that worker processes prepare."""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax._src import xla_bridge

from flora_jax.data import augment, batches, image_folder, sources, subsets
from flora_jax.data.sources import BadImageError
from tests.helpers.batches import assert_same_batches, of_all_processes, write_jpegs
from tests.helpers.commands import ROOT, is_running

pytestmark = pytest.mark.processes


SHAPE = (16, 16, 3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folder of 22 JPEGs to train on, in two classes, and 3 to test on."""
    root = tmp_path_factory.mktemp("pictures")
    counts = {"train/cat": 9, "train/dog": 13, "val/cat": 1, "val/dog": 2}
    write_jpegs(root, counts, least_size=(24, 20))
    return root


def take_train(source, steps, batch_size=4, **arguments):
    transform = augment.Augmentation("deit").train(SHAPE)
    with contextlib.closing(
        batches.train_batches(source, transform, batch_size, seed=3, **arguments)
    ) as iterator:
        return list(itertools.islice(iterator, steps))


@pytest.mark.parametrize(
    "num_workers, process_count, start_step",
    [(1, 1, 0), (2, 1, 7), (2, 2, 3), (1, 4, 5), (0, 4, 2)],
)
def test_workers_and_processes_give_the_batches_of_one_thread(
    pictures, num_workers, process_count, start_step, tmp_path
):
    """Steps 5 and 11 run across the end of an epoch of 22 images, two of which are bad."""
    shutil.copytree(pictures / "train", tmp_path / "train")
    for name in ("cat/3", "dog/7"):
        (tmp_path / f"train/{name}.jpg").write_bytes(b"no picture")
    folder = image_folder.image_folder(tmp_path, "train", tmp_path / "index")
    source = sources.SkippingSource(folder)
    whole = take_train(source, start_step + 6)
    options = {"start_step": start_step, "num_workers": num_workers}
    together = of_all_processes(take_train, process_count, source, 6, **options)
    assert_same_batches(together, whole[start_step:])


def test_eval_batches_of_workers(pictures):
    source = image_folder.image_folder(pictures, "train", pictures / "index")
    transform = augment.Augmentation("deit").evaluation(SHAPE)
    one, other = (list(batches.eval_batches(source, transform, 8, num_workers=n)) for n in (0, 2))
    assert [batch["mask"].sum() for batch in one] == [8, 8, 6]
    assert_same_batches(one, other)


class Witness:
    """Writes where it runs into the image: the process' number, and whether JAX is kept to CPU."""

    image_shape = (1, 2, 4)

    def __call__(self, image, rng):
        on_cpu = jax.config.jax_platforms == "cpu" and not xla_bridge.backends_are_initialized()
        seen = np.array([os.getpid(), on_cpu], np.uint32)
        return seen.view(np.uint8).reshape(self.image_shape)


def witnessed(batch):
    """(number of the process, whether JAX was kept to CPU), for each image."""
    return batch["image"].copy().view(np.uint32).reshape(-1, 2)


def test_workers_take_turns_leave_the_accelerators_alone_and_end_on_close():
    source = sources.digits()
    iterator = batches.train_batches(source, Witness(), 4, seed=0, num_workers=2)
    seen = np.stack([witnessed(next(iterator)) for _ in range(4)])
    numbers = seen[:, 0, 0].tolist()
    assert (seen[:, :, 0] == seen[:, :1, 0]).all()  # a batch is the work of one process
    assert numbers[:2] == numbers[2:]
    assert len({*numbers, os.getpid()}) == 3
    assert seen[:, :, 1].all()
    assert set(numbers) <= {process.pid for process in multiprocessing.active_children()}
    iterator.close()
    assert not set(numbers) & {process.pid for process in multiprocessing.active_children()}


def test_a_bad_image_in_a_worker_is_the_error_that_it_is_without(pictures, tmp_path):
    shutil.copytree(pictures / "train", tmp_path / "train")
    (tmp_path / "train/dog/12.jpg").write_bytes(b"no picture")
    source = image_folder.image_folder(tmp_path, "train", tmp_path / "index")
    for num_workers in (0, 1):
        with pytest.raises(BadImageError, match=r"12\.jpg cannot be decoded: not an image"):
            take_train(source, 6, num_workers=num_workers)


ORPHAN = """
import multiprocessing, os, signal
from flora_jax.data import augment, batches, sources

if __name__ == "__main__":
    transform = augment.Augmentation("digits").train((8, 8, 1))
    iterator = batches.train_batches(sources.digits(), transform, 4, seed=0, num_workers=1)
    next(iterator)
    (worker,) = multiprocessing.active_children()
    print(worker.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_ends_when_its_main_process_is_killed(tmp_path):
    """In a program that has parsed no flags, as a notebook."""
    (tmp_path / "orphan.py").write_text(ORPHAN)
    done = subprocess.run(
        [sys.executable, tmp_path / "orphan.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while is_running(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(int(done.stdout))


def test_sources_arrive_whole_in_another_process(pictures, tiny_tfds):
    folder = image_folder.image_folder(pictures, "train", pictures / "index")
    part = subsets.subset(folder, [3, 14, 15])
    for source in (
        folder,
        part,
        subsets.Subset(folder, np.flatnonzero(folder.labels == 1), (1,)),
        sources.SkippingSource(part),
        sources.tfds("tiny_pictures", "train", tiny_tfds[0]),
    ):
        copy = pickle.loads(pickle.dumps(source))
        assert len(copy) == len(source)
        assert copy.num_classes == source.num_classes
        np.testing.assert_array_equal(copy.labels, source.labels)
        for index in range(len(source)):
            mine, other = source[index], copy[index]
            assert (mine["key"], mine["label"]) == (other["key"], other["label"])
            np.testing.assert_array_equal(mine["image"], other["image"])
