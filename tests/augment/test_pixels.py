"""Changes of pixel values: RandAugment against timm's pixels, jitter, erasing, DeiT's recipe."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from flora_jax.data import augment, pixels
from flora_jax.data.normalize import Normalization
from flora_jax.data.pixels import OPERATIONS

few = settings(max_examples=25)


seeds = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def calls(golden):
    """[(operation, magnitude with its sign, what timm made of it, output)]"""
    return [
        (
            call["op"],
            -call["magnitude"] if call["negated"] else call["magnitude"],
            call["args"],
            golden[f"op{index}"],
        )
        for index, call in enumerate(json.loads(str(golden["calls_json"])))
    ]


def test_the_operations_are_those_of_timms_increasing_set(golden, calls):
    assert len(OPERATIONS) == 15
    assert {name for name, *_ in calls} == OPERATIONS.keys()
    for call in json.loads(str(golden["calls_json"])):
        assert OPERATIONS[call["op"]].signed == (call["negated"] is not None)


def test_operations_agree_with_timm_pixel_for_pixel(image, calls):
    assert len(calls) == 95
    for name, magnitude, _, expected in calls:
        output = np.asarray(OPERATIONS[name](Image.fromarray(image), magnitude))
        np.testing.assert_array_equal(output, expected, err_msg=f"{name} at {magnitude}")


def test_magnitudes_become_timms_arguments(calls):
    for name, magnitude, arguments, _ in calls:
        argument = OPERATIONS[name].argument
        resolved = [] if argument is None else [argument(magnitude)]
        assert resolved == pytest.approx(arguments, abs=1e-12), f"{name} at {magnitude}"


def test_posterize_keeps_one_bit_at_the_largest_magnitude(image):
    posterize = OPERATIONS["PosterizeIncreasing"]
    assert posterize.argument(10) == 1
    assert set(np.unique(posterize(Image.fromarray(image), 10))) <= {0, 128}


def test_two_operations_are_drawn_uniformly_and_each_is_kept_with_probability_one_half():
    rng = np.random.default_rng(0)
    draws = [pixels.draw_operations(rng, 9, 0.5, 2) for _ in range(6000)]
    counts = Counter(len(draw) for draw in draws)
    for number, share in enumerate((1 / 4, 1 / 2, 1 / 4)):
        assert counts[number] / 6000 == pytest.approx(share, abs=0.03)
    names = Counter(name for draw in draws for name, _ in draw)
    for name in OPERATIONS:
        assert names[name] == pytest.approx(6000 / 15, rel=0.2)
    pairs = [draw for draw in draws if len(draw) == 2]
    repeated = np.mean([first == second for (first, _), (second, _) in pairs])
    assert repeated == pytest.approx(1 / 15, abs=0.025)


def test_magnitudes_are_normal_about_nine_and_half_of_the_signed_ones_negative():
    rng = np.random.default_rng(0)
    drawn = [pair for _ in range(6000) for pair in pixels.draw_operations(rng, 9, 0.5, 2)]
    signed = [magnitude for name, magnitude in drawn if OPERATIONS[name].signed]
    unsigned = [magnitude for name, magnitude in drawn if not OPERATIONS[name].signed]
    assert np.mean(np.array(signed) < 0) == pytest.approx(0.5, abs=0.04)
    assert min(unsigned) >= 0
    magnitudes = np.abs([*signed, *unsigned])
    assert magnitudes.max() == 10
    assert np.median(magnitudes) == pytest.approx(9, abs=0.05)
    # One deviation to either side of the mean, and what is clipped beyond the second.
    assert np.quantile(magnitudes, [0.1587, 0.8413]) == pytest.approx([8.5, 9.5], abs=0.05)
    assert np.mean(magnitudes == 10) == pytest.approx(0.0228, abs=0.008)


@few
@given(seeds)
def test_rand_augment_does_the_drawn_operations_in_order(image, seed):
    drawn = pixels.draw_operations(np.random.default_rng(seed), 9, 0.5, 3)
    expected = Image.fromarray(image)
    for name, strength in drawn:
        expected = OPERATIONS[name](expected, strength)
    output = pixels.rand_augment(image, np.random.default_rng(seed), 9, 0.5, 3)
    assert (output.dtype, output.shape) == (np.uint8, image.shape)
    np.testing.assert_array_equal(output, np.asarray(expected))


class FixedFactors:
    """Stands for a random generator: the order brightness, contrast, saturation; given factors."""

    def __init__(self, *factors):
        self.factors = iter(factors)
        self.ranges = []

    def permutation(self, n):
        return np.arange(n)

    def uniform(self, low, high):
        self.ranges.append((low, high))
        return next(self.factors)


def test_color_jitter_scales_brightness_contrast_and_saturation(image):
    rng = FixedFactors(0.7, 1.3, 0.6)
    expected = ImageEnhance.Brightness(Image.fromarray(image)).enhance(0.7)
    expected = ImageEnhance.Contrast(expected).enhance(1.3)
    expected = ImageEnhance.Color(expected).enhance(0.6)
    np.testing.assert_array_equal(pixels.color_jitter(image, rng, 0.4), np.asarray(expected))
    assert rng.ranges == [(0.6, 1.4)] * 3


def erased_boxes(shape, count, **options) -> np.ndarray:
    """int [count, 4]: top, left, height, width of what each draw erased; zeros where nothing."""
    rng = np.random.default_rng(0)
    marked = np.zeros((*shape, 3), np.uint8)  # noise is nowhere 0 over a row or column
    boxes = []
    for _ in range(count):
        erased = pixels.random_erasing(marked, rng, **options).any(axis=-1)
        rows, columns = erased.any(axis=1).nonzero()[0], erased.any(axis=0).nonzero()[0]
        if rows.size:
            boxes.append((rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1))
        else:
            boxes.append((0, 0, 0, 0))
    return np.array(boxes)


def test_erased_boxes_lie_in_the_published_ranges_of_area_and_aspect():
    top, left, height, width = erased_boxes((64, 80), 600, probability=1).T
    share, aspect = height * width / (64 * 80), height / width
    assert 0.018 < share.min() < 0.03
    assert 0.31 < share.max() < 0.34
    assert 0.27 < aspect.min() < 0.36
    assert 2.8 < aspect.max() < 3.6
    assert top.min() == left.min() == 0
    assert (top + height).max() == 64
    assert (left + width).max() == 80


def test_a_quarter_of_the_images_is_erased():
    heights = erased_boxes((16, 16), 1200)[:, 2]
    assert np.mean(heights > 0) == pytest.approx(0.25, abs=0.04)
    assert not erased_boxes((16, 16), 50, probability=0).any()


def test_a_box_that_fits_nowhere_leaves_the_image_as_it_is():
    assert not erased_boxes((4, 100), 20, probability=1, area=(0.3, 0.3), aspect=(1, 1)).any()


def test_erasing_changes_the_box_alone_and_not_its_input(image):
    before = image.copy()
    erased = pixels.random_erasing(image, np.random.default_rng(1), 1, area=(0.1, 0.1))
    np.testing.assert_array_equal(image, before)
    assert (erased.dtype, erased.shape) == (np.uint8, image.shape)
    changed = (erased != image).any(axis=-1).mean()
    assert changed == pytest.approx(0.1, abs=0.01)


def test_the_noise_is_close_to_standard_normal_once_normalised():
    image = np.zeros((200, 200, 3), np.uint8)
    rng = np.random.default_rng(0)
    erased = pixels.random_erasing(image, rng, 1, area=(1 / 3, 1 / 3), aspect=(1, 1))
    box = erased[erased.any(axis=-1)]
    noise = np.asarray(Normalization()(box))
    # Clipping to 0..255 takes some of the deviation and moves the mean of blue.
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.04)
    np.testing.assert_allclose(noise.std(axis=0), 1, atol=0.05)
    correlation = np.corrcoef(noise.T) - np.eye(3)
    assert np.abs(correlation).max() < 0.04


SHAPE = (32, 32, 3)


@few
@given(seeds)
def test_deit_is_crop_flip_rand_augment_jitter_and_erasing_in_this_order(image, seed):
    rng = np.random.default_rng(seed)
    expected = augment.random_resized_crop(image, rng, 32)
    expected = augment.horizontal_flip(expected, rng)
    expected = pixels.rand_augment(expected, rng, 4.0, 0.1, 3)
    expected = pixels.color_jitter(expected, rng, 0.3)
    expected = pixels.random_erasing(expected, rng, 0.8)
    changes = {"magnitude": 4.0, "magnitude_std": 0.1, "num_operations": 3}
    changes |= {"color_jitter": 0.3, "erase_probability": 0.8}
    transform = augment.Augmentation("deit", changes).train(SHAPE)
    output = transform(image, np.random.default_rng(seed))
    np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"magnitude": 11}, r"magnitude must lie in 0\.\.10, got 11"),
        ({"magnitude_std": float("nan")}, "magnitude_std must lie in .* got nan"),
        ({"num_operations": -1}, "num_operations .* got -1"),
        ({"erase_probability": 25}, r"erase_probability must lie in 0\.\.1, got 25"),
        ({"erase_probabilty": 0.25}, "did you mean 'erase_probability'"),
        ({"scale": (0.5, 2)}, "scale must be"),
    ],
)
def test_deit_refuses_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        augment.Augmentation("deit", options).train(SHAPE)


def test_deit_refuses_a_model_of_grey_images():
    with pytest.raises(ValueError, match=r"image_shape \(32, 32, 1\); 'inception'"):
        augment.Augmentation("deit").train((32, 32, 1))
