"""From JPEGs in class folders to batches: the same bits however a run is spread or resumed."""

import contextlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.data import augment, batches, splits
from tests.helpers.batches import assert_same_batches, of_all_processes, write_jpegs

DEIT = augment.train_transform("deit", (32, 32, 3))


@pytest.fixture(scope="module")
def train_split(tmp_path_factory):
    """What a run trains on: 18 of 24 JPEGs; two, which are damaged, are skipped."""
    root = tmp_path_factory.mktemp("pictures")
    counts = {"train/cat": 10, "train/dog": 14, "val/cat": 1, "val/dog": 1}
    write_jpegs(root, counts, least_size=(50, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        train = splits.load_splits(f"folder:{root}", 0.25, on_bad_image="skip").train
    for index in (3, 11):
        (root / train.key(index)).write_bytes(b"no picture")
    return train


def take(source, steps: range, batch_size: int, seed: int, **arguments) -> list[batches.Batch]:
    with contextlib.closing(
        batches.train_batches(source, DEIT, batch_size, seed, start_step=steps.start, **arguments)
    ) as iterator:
        return list(itertools.islice(iterator, len(steps)))


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    process_counts=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    batch_size=st.sampled_from([4, 8, 16]),
    resume=st.integers(0, 8),
    seed=st.integers(0, 2**31),
    num_threads=st.integers(0, 2),
)
def test_a_run_resumed_on_other_processes_sees_the_batches_of_an_unbroken_one(
    train_split, process_counts, batch_size, resume, seed, num_threads
):
    whole = take(train_split, range(resume + 2), batch_size, seed)
    before, after = (
        of_all_processes(take, count, train_split, steps, batch_size, seed, num_threads=num_threads)
        for count, steps in zip(
            process_counts, (range(resume), range(resume, resume + 2)), strict=True
        )
    )
    assert_same_batches(before + after, whole)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers, process_index, process_count", [(1, 1, 2), (2, 2, 4)])
def test_workers_of_a_process_resumed_in_mid_epoch_give_its_part_of_an_unbroken_run(
    train_split, num_workers, process_index, process_count
):
    whole = take(train_split, range(8), 8, seed=5)
    share = 8 // process_count
    part = slice(process_index * share, (process_index + 1) * share)
    mine = take(
        train_split,
        range(3, 8),
        8,
        seed=5,
        process_index=process_index,
        process_count=process_count,
        num_workers=num_workers,
    )
    assert_same_batches(mine, [{name: step[name][part] for name in step} for step in whole[3:]])


def test_damaged_images_are_skipped_and_every_image_is_augmented_anew(train_split):
    images = np.concatenate([batch["image"] for batch in take(train_split, range(4), 9, seed=5)])
    assert len(np.unique(images, axis=0)) == len(images)
    assert train_split.skipped == {train_split.key(3), train_split.key(11)}
