"""Colour jitter and random erasing."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from flora_jax.data import pixels
from flora_jax.data.normalize import Normalization


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


def test_color_jitter_draws_over_its_range():
    rng = np.random.default_rng(0)
    grey = np.full((2, 2, 3), 100, np.uint8)  # contrast and saturation leave an even grey as it is
    values = np.array([pixels.color_jitter(grey, rng, 0.4)[0, 0, 0] for _ in range(500)])
    assert 60 <= values.min() < 63
    assert 137 < values.max() <= 140
    assert values.mean() == pytest.approx(100, abs=4)


def test_color_jitter_draws_every_order(image, monkeypatch):
    orders = set()

    class Recording:
        def __init__(self, name, picture):
            order.append(name)
            self.picture = picture

        def enhance(self, factor):
            return self.picture

    enhancers = [lambda picture, name=name: Recording(name, picture) for name in "bcs"]
    monkeypatch.setattr(pixels, "_ENHANCERS", enhancers)
    rng = np.random.default_rng(0)
    for _ in range(60):
        order = []
        pixels.color_jitter(image, rng, 0.4)
        orders.add("".join(order))
    assert orders == {"bcs", "bsc", "cbs", "csb", "sbc", "scb"}


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
