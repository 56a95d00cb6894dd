"""Batches: the same for any number of processes and from any step on."""

import contextlib
import itertools
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.data import augment, batches, sources, subsets
from tests.helpers.batches import (
    SHAPE,
    assert_same_batches,
    numbered_source,
    of_all_processes,
    take_eval,
)

few = settings(max_examples=25)


class AddNoise:
    """Leaves the number of the image in its first pixel and a random number in the last one."""

    image_shape = SHAPE

    def __call__(self, image, rng):
        image = image.copy()
        image[-1, -1, 0] = rng.integers(256)
        return image


def take_train(source, steps, batch_size, seed=0, transform=None, **kwargs):
    transform = transform or AddNoise()
    with contextlib.closing(
        batches.train_batches(source, transform, batch_size, seed, **kwargs)
    ) as iterator:
        return list(itertools.islice(iterator, steps))


def test_train_batches_have_the_promised_shapes_and_types(digits):
    transform = augment.Augmentation("digits").train((16, 16, 3))
    (batch,) = take_train(digits, 1, 6, transform=transform, process_index=1, process_count=2)
    assert batch.keys() == {"image", "label"}
    assert (batch["image"].shape, batch["image"].dtype) == ((3, 16, 16, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((3,), np.int32)


@few
@given(
    process_count=st.sampled_from([1, 2, 4]),
    start_step=st.integers(0, 12),
    seed=st.integers(0, 2**32),
    num_threads=st.integers(1, 3),
)
def test_local_batches_in_process_order_are_the_global_batch(
    process_count, start_step, seed, num_threads
):
    source = numbered_source(21)
    whole = take_train(source, start_step + 3, 8, seed)
    options = {"start_step": start_step, "num_threads": num_threads}
    together = of_all_processes(take_train, process_count, source, 3, 8, seed, **options)
    assert_same_batches(together, whole[start_step:])


def test_every_epoch_holds_each_image_once_in_a_new_order_with_new_augmentation():
    source = numbered_source(21)
    steps = take_train(source, 9, 7)
    images = np.concatenate([batch["image"] for batch in steps])
    labels = np.concatenate([batch["label"] for batch in steps])
    order, noise = images[:, 0, 0, 0].reshape(3, 21), images[:, -1, -1, 0].reshape(3, 21)
    np.testing.assert_array_equal(labels, order.reshape(-1) % 3)
    for epoch in order:
        assert sorted(epoch) == list(range(21))
    for one, other in itertools.combinations(range(3), 2):
        assert (order[one] != order[other]).any()
        same_image = noise[one][np.argsort(order[one])] == noise[other][np.argsort(order[other])]
        assert same_image.mean() < 0.2


def test_batches_run_across_the_end_of_an_epoch():
    steps = take_train(numbered_source(10), 5, 4)
    numbers = np.concatenate([batch["image"][:, 0, 0, 0] for batch in steps])
    assert Counter(numbers.tolist()) == dict.fromkeys(range(10), 2)


@pytest.mark.parametrize("process_count", [1, 2])
def test_repeated_augmentation_shows_an_image_several_times_in_a_row(process_count):
    """Each time augmented anew; the images of three epochs are those of one, three times."""
    parts = [
        take_train(
            numbered_source(6), 9, 2, repeats=3, process_index=i, process_count=process_count
        )
        for i in range(process_count)
    ]
    batches = itertools.chain(*zip(*parts, strict=True))
    images = np.concatenate([batch["image"] for batch in batches]).reshape(18, -1)
    numbers, noise = images[:, 0].reshape(6, 3), images[:, -1].reshape(6, 3)
    assert (numbers == numbers[:, :1]).all()
    assert sorted(numbers[:, 0]) == list(range(6))
    assert all(len(set(row)) == 3 for row in noise.tolist())


def test_close_stops_the_threads(digits):
    def prefetch_threads():
        return {t for t in threading.enumerate() if t.name.startswith("grain-prefetch")}

    before = prefetch_threads()
    transform = augment.Augmentation("digits").train(SHAPE)
    iterator = batches.train_batches(digits, transform, 32, seed=0, num_threads=2)
    next(iterator)
    started = prefetch_threads() - before
    assert started
    iterator.close()
    deadline = time.monotonic() + 10
    while any(thread.is_alive() for thread in started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in started)


def test_train_batches_errors():
    with pytest.raises(ValueError, match="batch_size 10 is larger than the 9 images"):
        batches.train_batches(numbered_source(9), AddNoise(), 10, seed=0)
    with pytest.raises(ValueError, match=r"8 cannot be shared by 3 processes.*: 9"):
        batches.train_batches(numbered_source(9), AddNoise(), 8, seed=0, process_count=3)


@few
@given(size=st.integers(1, 20), batch_size=st.integers(1, 24))
def test_eval_batches_cover_every_image_once_in_order(size, batch_size):
    source = numbered_source(size)
    steps = take_eval(source, batch_size)
    assert len(steps) == -(-size // batch_size)
    joined = {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}
    assert len(joined["mask"]) == len(steps) * batch_size
    assert joined["mask"].tolist() == [1] * size + [0] * (len(steps) * batch_size - size)
    np.testing.assert_array_equal(joined["image"][:size], source.images)
    np.testing.assert_array_equal(joined["label"][:size], source.labels)
    assert not joined["image"][size:].any()
    assert not joined["label"][size:].any()
    dtypes = {name: array.dtype for name, array in joined.items()}
    assert dtypes == {"image": np.uint8, "label": np.int32, "mask": np.float32}


def test_eval_batches_errors(digits):
    transform = augment.Augmentation("digits").evaluation(SHAPE)
    with pytest.raises(ValueError, match="no images"):
        batches.eval_batches(subsets.subset(digits, []), transform, 8)
    colour = sources.ArraySource("colour", np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4), 1)
    with pytest.raises(ValueError, match="does not fit a model of 1 input channels"):
        list(batches.eval_batches(colour, transform, 2))
