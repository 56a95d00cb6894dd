"""One-image transforms and the recipes made of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flora_jax.data import augment, sources

SHAPE = (8, 8, 1)


few = settings(max_examples=25)


@pytest.fixture(scope="module")
def digits():
    return sources.digits()


@pytest.fixture(scope="module")
def photograph(data_dir):
    with np.load(data_dir / "eval_transform.npz") as archive:
        return dict(archive)


def test_eval_transform_equals_the_published_one(photograph):
    transform = augment.Augmentation("inception").evaluation((224, 224, 3))
    np.testing.assert_array_equal(transform(photograph["image"]), photograph["cropped"])


@few
@given(
    short=st.integers(1, 9),
    length=st.integers(1000, 1400),
    channels=st.sampled_from([1, 3]),
    upright=st.booleans(),
)
def test_eval_transform_of_a_very_long_image_equals_the_published_one(
    short, length, channels, upright
):
    columns, rows = np.meshgrid(np.arange(length), np.arange(short))
    waves = 128 + 60 * np.sin(columns / 3) + 60 * np.cos(rows / 2)
    image = np.repeat(waves.astype(np.uint8)[..., None], channels, axis=2)
    size, offset = (36 * length // short, 36), (round((36 * length // short - 32) / 2), 2)
    if upright:
        image, size, offset = image.swapaxes(0, 1), size[::-1], offset[::-1]
    picture = Image.fromarray(image.squeeze(2) if channels == 1 else image)
    whole = picture.resize(size, Image.Resampling.BICUBIC)
    cropped = whole.crop((*offset, offset[0] + 32, offset[1] + 32))
    expected = np.array(cropped).reshape(32, 32, channels)
    out = augment.Augmentation("inception").evaluation((32, 32, channels))(image)
    np.testing.assert_allclose(out.astype(int), expected, atol=1)


@pytest.mark.parametrize("shape", [(3, 20_000, 3), (20_000, 3, 3), (1, 1_000_000, 1)])
def test_a_very_long_image_is_not_resized_as_a_whole(shape, monkeypatch):
    resize = Image.Image.resize

    def resize_to_little(picture, size, *arguments):
        assert size[0] * size[1] < 10**6
        return resize(picture, size, *arguments)

    monkeypatch.setattr(Image.Image, "resize", resize_to_little)
    out = augment.Augmentation("inception").evaluation((224, 224, 3))(np.full(shape, 7, np.uint8))
    assert (out == 7).all()


@few
@given(
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    channels=st.sampled_from([1, 3]),
    name=st.sampled_from(["digits", "shift", "inception", "deit"]),
    seed=st.integers(0, 2**32),
)
def test_every_recipe_returns_its_image_shape(height, width, channels, name, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(256, size=(height, width, channels), dtype=np.uint8)
    for out in (
        augment.Augmentation(name).train((16, 16, 3))(image, rng),
        augment.Augmentation(name).evaluation((16, 16, 3))(image),
    ):
        assert out.shape == (16, 16, 3)
        assert out.dtype == np.uint8


@few
@given(pixels=st.integers(0, 7), seed=st.integers(0, 2**32))
def test_shift_moves_whole_pixels_and_fills_with_zeros(pixels, seed):
    image = np.arange(1, 65, dtype=np.uint8).reshape(SHAPE)
    shifted = augment.shift(image, np.random.default_rng(seed), pixels)
    padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)))
    windows = [
        padded[y : y + 8, x : x + 8] for y in range(2 * pixels + 1) for x in range(2 * pixels + 1)
    ]
    assert any(np.array_equal(shifted, window) for window in windows)


class FixedRng:
    """Returns the given uniform numbers; 0.5 is the middle of every symmetric range."""

    def __init__(self, *numbers):
        self.numbers = np.array(numbers)

    def random(self, size):
        assert size == len(self.numbers)
        return self.numbers


def test_affine_with_nothing_to_do_is_the_identity(digits):
    image = digits.images[5]
    out = augment.affine(image, FixedRng(0.5, 0.5, 0.5, 0.5), 30, 2, (0.5, 1.5))
    np.testing.assert_array_equal(out, image)


def test_affine_turns_moves_and_scales_about_the_centre(digits):
    image = digits.images[5]
    quarter = augment.affine(image, FixedRng(1, 0.5, 0.5, 0.5), 90, 0, (1, 1))
    np.testing.assert_allclose(quarter.astype(int), np.rot90(image, k=-1), atol=1)
    moved = augment.affine(image, FixedRng(0.5, 0, 1, 0.5), 0, 2, (1, 1))
    np.testing.assert_array_equal(moved[:, 2:], image[:, :-2])
    assert not moved[:, :2].any()
    doubled = augment.affine(np.full(SHAPE, 9, np.uint8), FixedRng(0.5, 1, 0.5, 0.5), 0, 0, (1, 2))
    assert (doubled == 9).all()
    halved = augment.affine(np.full(SHAPE, 9, np.uint8), FixedRng(0.5, 0, 0.5, 0.5), 0, 0, (0.5, 1))
    assert (halved[2:6, 2:6] == 9).all()
    assert halved.sum() == 9 * 16


@few
@given(seed=st.integers(0, 2**32), share=st.floats(0.2, 0.5), aspect=st.floats(0.6, 1.6))
def test_random_resized_crop_takes_a_box_of_the_asked_area_and_ratio(seed, share, aspect):
    # In a picture whose value is its column (row), the spread of values is the width (height).
    columns, rows = np.meshgrid(np.arange(60), np.arange(50))
    image = np.stack([columns, rows, rows], axis=-1).astype(np.uint8) * 4
    crop = augment.random_resized_crop(
        image, np.random.default_rng(seed), 64, (share, share), (aspect, aspect)
    )
    assert crop.shape == (64, 64, 3)
    width, height, _ = np.ptp(crop.astype(int), axis=(0, 1)) / 4 + 1
    area = share * 60 * 50
    assert abs(width - np.sqrt(area * aspect)) < 1.2
    assert abs(height - np.sqrt(area / aspect)) < 1.2


def test_random_resized_crop_draws_areas_ratios_and_places_over_their_ranges():
    columns, rows = np.meshgrid(np.arange(60), np.arange(60))
    image = np.stack([columns, rows, rows], axis=-1).astype(np.uint8) * 4
    rng = np.random.default_rng(0)
    crops = np.array([augment.random_resized_crop(image, rng, 64) for _ in range(300)], int)
    width, height = (np.ptp(crops, axis=(1, 2)) / 4 + 1)[:, :2].T
    share, aspect = width * height / 60**2, width / height
    assert 0.06 < share.min() < 0.15
    assert share.max() > 0.85
    assert 0.65 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.5
    assert abs(np.log(aspect).mean()) < 0.05
    centres = crops.mean(axis=(1, 2))[:, :2] / 4
    assert (centres.min(axis=0) < 18).all()
    assert (centres.max(axis=0) > 41).all()


def test_random_resized_crop_of_a_very_long_image_falls_back_to_its_centre():
    image = np.zeros((4, 400, 1), np.uint8)
    image[:, 198:202] = 200
    crop = augment.random_resized_crop(image, np.random.default_rng(0), 4, scale=(1.0, 1.0))
    assert crop[:, 1:3].min() > 100


def test_horizontal_flip_mirrors_half_of_the_images():
    image = np.arange(64, dtype=np.uint8).reshape(SHAPE)
    rng = np.random.default_rng(0)
    outs = [augment.horizontal_flip(image, rng) for _ in range(200)]
    flipped = sum(np.array_equal(out, image[:, ::-1]) for out in outs)
    kept = sum(np.array_equal(out, image) for out in outs)
    assert flipped + kept == 200
    assert 70 < flipped < 130


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: augment.Augmentation("cutout").train(SHAPE),
            "'cutout'; choose one of digits",
        ),
        (lambda: augment.Augmentation("digits", {"degree": 3}).train(SHAPE), "'degrees'"),
        (lambda: augment.Augmentation("digits", {"degrees": -3}).train(SHAPE), "degrees .* -3"),
        (lambda: augment.Augmentation("digits").evaluation((8, 9, 1)), "square"),
        (lambda: augment.shift(np.zeros(SHAPE, np.uint8), None, 8), "shift of 8 pixels"),
        (
            lambda: augment.Augmentation("digits").evaluation(SHAPE)(np.zeros((8, 8, 3), np.uint8)),
            "does not fit a model of 1 input channels",
        ),
    ],
)
def test_augmentation_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
