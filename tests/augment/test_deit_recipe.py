"""DeiT's training augmentation as a whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.data import augment, batches, pixels, sources

SHAPE = (32, 32, 3)


OFF = {"rand_augment": False, "color_jitter": 0, "erase_probability": 0}


repeatable = settings(derandomize=True, deadline=None, max_examples=25)


seeds = st.integers(0, 2**32)


@repeatable
@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 50), st.integers(1, 50), st.sampled_from([1, 3])),
)
def test_deit_gives_its_image_shape_and_the_same_for_the_same_seed(seed, shape):
    picture = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
    transform = augment.train_transform("deit", SHAPE)
    one, other = (transform(picture, np.random.default_rng(seed)) for _ in range(2))
    assert (one.dtype, one.shape) == (np.uint8, SHAPE)
    np.testing.assert_array_equal(one, other)


def test_deit_draws_anew_for_every_image(image):
    transform = augment.train_transform("deit", SHAPE)
    rng = np.random.default_rng(0)
    outputs = {transform(image, rng).tobytes() for _ in range(20)}
    assert len(outputs) == 20


@repeatable
@given(seeds)
def test_deit_is_crop_flip_rand_augment_jitter_and_erasing_in_this_order(image, seed):
    rng = np.random.default_rng(seed)
    expected = augment.random_resized_crop(image, rng, 32)
    expected = augment.horizontal_flip(expected, rng)
    expected = pixels.rand_augment(expected, rng)
    expected = pixels.color_jitter(expected, rng, 0.4)
    expected = pixels.random_erasing(expected, rng)
    output = augment.train_transform("deit", SHAPE)(image, np.random.default_rng(seed))
    np.testing.assert_array_equal(output, expected)


@repeatable
@given(seeds)
def test_deit_with_everything_off_is_inception(image, seed):
    outputs = [
        augment.train_transform(name, SHAPE, scale=(0.2, 1), **off)(
            image, np.random.default_rng(seed)
        )
        for name, off in (("deit", OFF), ("inception", {}))
    ]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize(
    "setting",
    [{"rand_augment": True, "num_operations": 8}, {"color_jitter": 0.4}, {"erase_probability": 1}],
)
def test_each_part_of_deit_changes_the_image_by_itself(image, setting):
    plain, changed = (
        augment.train_transform("deit", SHAPE, **options)(image, np.random.default_rng(3))
        for options in (OFF, {**OFF, **setting})
    )
    assert (plain != changed).any()


def test_the_magnitude_of_deit_reaches_the_operations(image, monkeypatch):
    magnitudes = []
    spy = pixels.Operation(lambda picture, m: magnitudes.append(m) or picture, lambda m: m)
    monkeypatch.setattr(pixels, "OPERATIONS", {"Spy": spy})
    options = {"magnitude": 4.0, "magnitude_std": 0.0, "num_operations": 3}
    transform = augment.train_transform("deit", SHAPE, **options)
    rng = np.random.default_rng(0)
    for _ in range(100):
        transform(image, rng)
    assert set(magnitudes) == {4.0}
    assert 125 < len(magnitudes) < 175  # of 100 images, 3 operations each, half of them kept


def test_deit_is_evaluated_as_inception(image):
    outputs = [augment.eval_transform(name, SHAPE)(image) for name in ("deit", "inception")]
    np.testing.assert_array_equal(*outputs)


def test_processes_augment_their_shares_of_a_batch_as_one_process_would(image):
    source = sources.ArraySource("same", np.stack([image] * 8), np.arange(8, dtype=np.int32), 8)
    transform = augment.train_transform("deit", SHAPE)

    def first_batch(**options):
        iterator = batches.train_batches(source, transform, 8, seed=5, **options)
        try:
            return next(iterator)["image"]
        finally:
            iterator.close()

    parts = [first_batch(process_index=i, process_count=2) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), first_batch(num_threads=2))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"magnitude": 11}, r"magnitude must lie in 0\.\.10, got 11"),
        ({"magnitude": float("nan")}, "magnitude must lie in .* got nan"),
        ({"magnitude_std": -0.5}, "magnitude_std .* got -0.5"),
        ({"num_operations": 0}, "num_operations .* got 0; rand_augment=False"),
        ({"num_operations": 1.5}, "num_operations .* integer .* got 1.5"),
        ({"color_jitter": 1.2}, r"color_jitter must lie in 0\.\.1, got 1.2"),
        ({"erase_probability": 25}, r"erase_probability must lie in 0\.\.1, got 25"),
        ({"erase_probabilty": 0.25}, "did you mean 'erase_probability'"),
        ({"scale": (0.5, 2)}, "scale must be"),
    ],
)
def test_deit_refuses_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        augment.train_transform("deit", SHAPE, **options)


def test_deit_refuses_a_model_of_grey_images():
    with pytest.raises(ValueError, match=r"image_shape \(32, 32, 1\); 'inception'"):
        augment.train_transform("deit", (32, 32, 1))
