"""Decoding pictures of every kind."""

import io
import logging
import threading

import numpy as np
import pytest
from PIL import Image

from flora_jax.configs import digits
from flora_jax.data import decoding, splits
from flora_jax.data.image_folder import image_folder
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings
from tests.helpers.pictures import save

RAMP = np.arange(256, dtype=np.uint8).reshape(8, 32)
GREY = np.stack([RAMP] * 3, axis=-1)
COLOUR = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=-1)
EXIF = Image.Exif()
EXIF[0x0112] = 6  # turn by 90 degrees


def with_alpha(pixels):
    return np.concatenate([pixels, RAMP[..., None]], axis=-1)


PALETTE = Image.fromarray(COLOUR).quantize(256)

KINDS = {
    "rgb": ("x.png", COLOUR, COLOUR, {}),
    "grey": ("x.png", RAMP, GREY, {}),
    "16 bits": ("x.png", RAMP.astype(np.uint16) * 256 + 77, GREY, {}),
    "black and white": ("x.png", RAMP > 99, 255 * (GREY > 99), {}),
    "palette": ("x.png", PALETTE, np.array(PALETTE.convert("RGB")), {}),
    "transparent palette": (
        "x.png",
        PALETTE,
        np.array(PALETTE.convert("RGB")),
        {"transparency": bytes(range(256))},
    ),
    "rgba": ("x.png", with_alpha(COLOUR), COLOUR, {}),
    "grey with alpha": ("x.png", Image.fromarray(with_alpha(COLOUR)).convert("LA"), None, {}),
    "bmp": ("x.bmp", COLOUR, COLOUR, {}),
    "webp": ("x.webp", COLOUR, COLOUR, {"lossless": True}),
    "1 pixel high": ("x.png", COLOUR[:1], COLOUR[:1], {}),
    "1 pixel": ("x.png", COLOUR[:1, :1], COLOUR[:1, :1], {}),
    "exif rotation is ignored": ("x.png", COLOUR, COLOUR, {"exif": EXIF}),
    "wrong suffix": ("x.jpg", COLOUR, COLOUR, {"format": "PNG"}),
}


@pytest.mark.parametrize("name, picture, expected, options", KINDS.values(), ids=KINDS)
def test_every_kind_of_picture_becomes_rgb(name, picture, expected, options, tmp_path):
    save(tmp_path / "train/a" / name, picture, **options)
    image = image_folder(tmp_path, "train", background=())[0]["image"]
    if expected is None:
        expected = np.array(picture.convert("RGB"))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected)


def on_page(alpha, page, drawn=COLOUR):
    """What is to be seen of `drawn` [8, 32, 3] with alpha uint8 [8, 32] in front of a colour."""
    share = alpha[..., None] / 255
    return share * drawn + (1 - share) * np.array(page)


ONE_IS_CLEAR = np.where(RAMP == 9, 0, 255)
TRANSPARENT = {
    "rgba": ("x.png", with_alpha(COLOUR), on_page(RAMP, (9, 200, 30)), {}),
    "webp": ("x.webp", with_alpha(COLOUR), on_page(RAMP, (9, 200, 30)), {"lossless": True}),
    "tiff": ("x.tif", with_alpha(COLOUR), on_page(RAMP, (9, 200, 30)), {}),
    "grey with alpha": (
        "x.png",
        Image.merge("LA", [Image.fromarray(RAMP[::-1].copy()), Image.fromarray(RAMP)]),
        on_page(RAMP, (9, 200, 30), GREY[::-1]),
        {},
    ),
    "palette": (
        "x.png",
        PALETTE,
        on_page(np.array(PALETTE), (9, 200, 30), np.array(PALETTE.convert("RGB"))),
        {"transparency": bytes(range(256))},
    ),
    "one clear grey": (
        "x.png",
        RAMP,
        on_page(ONE_IS_CLEAR, (9, 200, 30), GREY),
        {"transparency": 9},
    ),
    "one clear grey of 16 bits": (
        "x.png",
        RAMP.astype(np.uint16) * 256 + 77,
        on_page(ONE_IS_CLEAR, (9, 200, 30), GREY),
        {"transparency": 9 * 256 + 77},
    ),
    "one clear colour": (
        "x.png",
        COLOUR,
        on_page(ONE_IS_CLEAR, (9, 200, 30)),
        {"transparency": tuple(map(int, COLOUR[0, 9]))},
    ),
}


@pytest.mark.parametrize("name, picture, expected, options", TRANSPARENT.values(), ids=TRANSPARENT)
def test_what_is_transparent_shows_the_background(name, picture, expected, options, tmp_path):
    save(tmp_path / "train/a" / name, picture, **options)
    image = image_folder(tmp_path, "train", background=(9, 200, 30))[0]["image"]
    np.testing.assert_allclose(image, expected, atol=1)


def test_the_log_says_once_where_transparent_pictures_are_put(caplog, monkeypatch):
    monkeypatch.setattr(decoding, "_unsaid", threading.Lock())
    caplog.set_level(logging.INFO)

    def decode(name, alpha, **options):
        content = io.BytesIO()
        Image.new("RGBA", (4, 3), (10, 20, 30, alpha)).save(content, "PNG")
        return decoding.decode_rgb(content.getvalue(), name, **options)[0, 0].tolist()

    assert decode("opaque", 255) == [10, 20, 30]
    assert decode("ignored", 0, background=()) == [10, 20, 30]
    assert not caplog.messages
    assert decode("clear", 0) == [255, 255, 255]
    assert decode("other", 0, background=(1, 2, 3)) == [1, 2, 3]
    (line,) = caplog.messages
    assert "clear" in line
    assert "white" in line
    assert "data.background" in line


def test_every_part_of_a_folder_shows_the_background(tmp_path):
    for name in ("train/a/0", "train/a/1", "train/b/0", "train/b/1", "val/a/0", "val/b/0"):
        save(tmp_path / f"{name}.png", Image.new("RGBA", (4, 3), (10, 20, 30, 0)))
    for background, seen in (((1, 2, 3), [1, 2, 3]), ((), [10, 20, 30])):
        loaded = splits.load_splits(f"folder:{tmp_path}", 0.5, background=background)
        for part in (loaded.train, loaded.heldout, loaded.test):
            assert part[0]["image"][0, 0].tolist() == seen
        every = splits.load_splits(f"images:{tmp_path}", 0.5, background=background)
        assert every.train[0]["image"][0, 0].tolist() == seen
        config = digits.get_config()
        changes = {"data.name": f"folder:{tmp_path}", "data.background": background}
        config.update_from_flattened_dict({**changes, "data.heldout_fraction": 0.5})
        of_a_run = Images(Settings.from_config(config))
        assert of_a_run.train[0]["image"][0, 0].tolist() == seen
    with pytest.raises(ValueError, match="background must be red, green and blue"):
        splits.load_splits(f"folder:{tmp_path}", 0.5, background=(256, 0, 0))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "least_side, divisor", [(None, 1), (151, 1), (150, 2), (76, 2), (75, 4), (37, 8), (1, 8)]
)
def test_a_jpeg_that_is_larger_than_needed_is_decoded_smaller(least_side, divisor, mode, tmp_path):
    smooth = Image.fromarray(COLOUR).resize((400, 300), Image.Resampling.BICUBIC).convert(mode)
    save(tmp_path / "train/a/x.jpeg", smooth, quality=98)
    image = image_folder(tmp_path, "train", least_side=least_side)[0]["image"]
    expected = np.array(smooth.convert("RGB").reduce(divisor), int)
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 4


def test_least_side_leaves_test_images_and_other_kinds_of_pictures_whole(tmp_path):
    smooth = Image.fromarray(COLOUR).resize((64, 48))
    for i in range(4):
        for split in ("train", "val"):
            save(tmp_path / split / f"a/{i}.jpeg", smooth)
            save(tmp_path / split / f"b/{i}.png", smooth)
    loaded = splits.load_splits(f"folder:{tmp_path}", 0.5, least_side=20)
    for part in (loaded.train, loaded.heldout):
        heights = {part[i]["key"][-4:]: part[i]["image"].shape[0] for i in range(len(part))}
        assert heights == {"jpeg": 24, ".png": 48}
    assert {loaded.test[i]["image"].shape[0] for i in range(8)} == {48}
