"""What is stored: the records, and the description of them."""

import dataclasses
import hashlib
import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.training.stored_predictions import Description
from tests.helpers.predictions import (
    BATCH_SIZE,
    NORMALIZATION,
    PART,
    a_model,
    first_batches,
    read_all,
)


def test_records_are_the_top_classes_of_each_augmented_image(stored, description, teacher):
    for batch, record in zip(first_batches(), read_all(stored, description), strict=True):
        probs, index = record["target_probs"], record["target_index"]
        assert probs.dtype == np.float16
        assert index.dtype == np.int16
        wanted = np.asarray(teacher(batch["image"]))
        order = np.argsort(-wanted, axis=-1)[:, :4]
        np.testing.assert_array_equal(index, order)
        np.testing.assert_array_equal(
            probs, np.take_along_axis(wanted, order, -1).astype(np.float16)
        )


def test_the_teacher_is_the_model_on_normalised_images(teacher):
    images = first_batches(1)[0]["image"]
    model = a_model(seed=1)
    logits = jax.jit(lambda images: model(NORMALIZATION(images)))(images)
    np.testing.assert_allclose(teacher(images), jax.nn.softmax(logits), atol=1e-5)


def test_a_file_holds_the_steps_that_begin_in_its_epoch(stored, description):
    assert [description.steps_of(epoch) for epoch in range(3)] == [
        range(4),
        range(4, 7),
        range(7, 8),
    ]
    sizes = [path.stat().st_size for path in sorted(stored.glob("*.bin"))]
    assert sizes == [steps * BATCH_SIZE * 4 * 4 for steps in (4, 3, 1)]
    assert description.num_bytes == sum(sizes)
    meta = json.loads((stored / "meta.json").read_text())
    assert meta["parts"] == 1
    assert meta["augmentation"]["scale"] == [0.9, 1.1]
    checksum, name = (stored / f"{PART}.sha256").read_text().split()
    assert (checksum, name) == (hashlib.sha256((stored / PART).read_bytes()).hexdigest(), PART)


@given(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.integers(1, 60),
)
@settings(derandomize=True, deadline=None)
def test_every_step_lies_in_one_epoch(images_and_batch, steps):
    num_images, batch_size = images_and_batch
    description = dataclasses.replace(
        IMAGENET, num_images=num_images, batch_size=batch_size, steps=steps
    )
    epochs = [description.steps_of(epoch) for epoch in range(description.num_epochs)]
    assert list(itertools.chain(*epochs)) == list(range(steps))
    for epoch, its_steps in enumerate(epochs):
        assert {description.epoch_of(step) for step in its_steps} == {epoch}


IMAGENET = Description(
    dataset="imagenet",
    images="",
    num_images=1_281_167,
    batch_size=1024,
    steps=1252,
    seed=0,
    k=100,
    num_classes=1000,
    teacher="",
    augmentation={},
)


def test_size_of_imagenet():
    assert IMAGENET.num_bytes == 1252 * 1024 * 400
    assert dataclasses.replace(IMAGENET, num_classes=32767).record["index"].base == np.int16
    many = dataclasses.replace(IMAGENET, num_classes=65536)
    assert many.record["index"].base == np.uint16
    assert many.num_bytes == IMAGENET.num_bytes


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("k", 0, "k must be in 1..1000, got 0"),
        ("k", 1001, "k must be in 1..1000, got 1001"),
        ("num_classes", 65537, "num_classes must be in 1..65536, got 65537"),
        ("batch_size", 1_281_168, "batch_size must be in 1..1281167"),
        ("steps", 0, "steps must be at least 1"),
        ("seed", -1, "seed must be at least 0"),
    ],
)
def test_numbers_out_of_range(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(IMAGENET, **{field: value})
