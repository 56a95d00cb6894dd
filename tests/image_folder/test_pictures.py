"""Pictures of every kind, bad ones, and folders that cannot be read."""

import logging
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image, ImageOps

from flora_jax.commands.classifier import CropOfColours
from flora_jax.configs import digits
from flora_jax.data import augment, batches, pictures, sources, splits, subsets
from flora_jax.data.decoding import decode_rgb
from flora_jax.data.image_folder import image_folder
from flora_jax.data.normalize import Normalization
from flora_jax.data.preprocessing import Preprocessing
from flora_jax.evaluation.evaluate import EvaluationSet
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings
from flora_jax.weights.metadata.preprocessing import save_preprocessing
from tests.helpers.pictures import keys, not_an_image, save

RAMP = np.arange(256, dtype=np.uint8).reshape(8, 32)
GREY = np.stack([RAMP] * 3, axis=-1)
COLOUR = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=-1)
GREY_16_BITS = RAMP.astype(np.uint16) * 256 + 77
EXIF = Image.Exif()
EXIF[0x0112] = 6  # turn by 90 degrees


def with_alpha(pixels):
    return np.concatenate([pixels, RAMP[..., None]], axis=-1)


PALETTE = Image.fromarray(COLOUR).quantize(256)

KINDS = {
    "rgb": ("x.png", COLOUR, COLOUR, {}),
    "grey": ("x.png", RAMP, GREY, {}),
    "16 bits": ("x.png", GREY_16_BITS, GREY, {}),
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
    "turned by exif data": ("x.png", COLOUR, np.rot90(COLOUR, -1), {"exif": EXIF}),
    "grey of 16 bits turned": ("x.png", GREY_16_BITS, np.rot90(GREY, -1), {"exif": EXIF}),
    "floats in 0..1": ("x.tif", np.float32(RAMP / 255), GREY, {}),
    "floats in 0..255": ("x.tif", np.float32(RAMP), GREY, {}),
    "32 bits in 0..255": ("x.tif", RAMP.astype(np.int32), GREY, {}),
    "32 bits in 0..65535": ("x.tif", GREY_16_BITS.astype(np.int32), GREY, {}),
    "16 bits in a pgm": ("x.pgm", RAMP.astype(np.int32) * 257, GREY, {}),
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


@pytest.mark.parametrize(
    "values", [np.float32(RAMP) - 1, np.float32(RAMP) * 2, RAMP.astype(np.int32) * 999]
)
def test_grey_on_no_known_scale_is_a_bad_image(values, tmp_path):
    save(tmp_path / "train/a/x.tif", values)
    with pytest.raises(sources.BadImageError, match=r"x\.tif .*its values, .* are not in 0\.\."):
        image_folder(tmp_path, "train")[0]


def test_12_bits_in_a_tiff_of_12_bits_and_in_one_of_16(tmp_path, caplog, monkeypatch):
    """Two values fill three bytes; in 16 bits they are nearly black, which is said once."""
    monkeypatch.setattr(pictures, "_nearly_black", [])
    values = RAMP.astype(np.uint16) * 16
    save(tmp_path / "train/a/0.tif", values)
    save(tmp_path / "train/a/1.tif", values)
    high, low = values.reshape(-1, 2).T
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], axis=1)
    tags = {256: 32, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: packed.size}
    content = struct.pack("<2sHI", b"II", 42, 8 + packed.size) + packed.astype(np.uint8).tobytes()
    content += struct.pack("<H", len(tags))
    for tag, value in tags.items():
        content += struct.pack("<HHII", tag, 4, 1, value)
    (tmp_path / "train/a/2.tif").write_bytes(content + bytes(4))
    source = image_folder(tmp_path, "train")
    assert [source[i]["image"].max() for i in range(2)] == [15, 15]
    np.testing.assert_array_equal(source[2]["image"], GREY)
    assert caplog.text.count("comes out nearly black") == 1
    assert "0.tif has 16 bits but no value above 4080" in caplog.text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "train/a/x.png", COLOUR, exif=exif)
    with Image.open(tmp_path / "train/a/x.png") as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    np.testing.assert_array_equal(image_folder(tmp_path, "train")[0]["image"], expected)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "squash_center"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name, picture, _, options", KINDS.values(), ids=KINDS)
def test_exported_code_prepares_pictures_as_the_library(
    name, picture, _, options, channels, crop_mode, tmp_path
):
    """The file alone, as it lies in an export."""
    wanted = Preprocessing(6, (0.4,) * channels, (0.3,) * channels, 0.8, crop_mode, "bilinear")
    save_preprocessing(tmp_path, wanted, in_channels=channels)
    (tmp_path / "preprocess.py").write_bytes(Path(pictures.__file__).read_bytes())
    code = {"__file__": str(tmp_path / "preprocess.py"), "__name__": "preprocess"}
    exec((tmp_path / "preprocess.py").read_text(), code)
    path = tmp_path / f"pictures/{name}"
    save(path, picture, **options)
    pixels = decode_rgb(path.read_bytes(), name, **wanted.decoding)
    expected = wanted.normalization(CropOfColours(**vars(wanted.crop(channels)))(pixels))
    with Image.open(path) as opened:
        for given in (path, opened):
            found = code["preprocess"](given)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, np.transpose(expected, (2, 0, 1)), atol=1e-6)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0\0\x08\0\x09no more", b"Exif\0\0no more"])
def test_damaged_exif_data_turn_nothing(exif, tmp_path):
    save(tmp_path / "train/a/x.jpg", COLOUR, exif=exif)
    assert image_folder(tmp_path, "train")[0]["image"].shape == COLOUR.shape
    truncated(tmp_path / "train/a/x.jpg")
    with pytest.raises(sources.BadImageError):
        image_folder(tmp_path, "train")[0]


ONE_IS_CLEAR = np.where(RAMP == 9, 0, 255)
MIXED = Image.merge("LA", [Image.fromarray(RAMP[::-1].copy()), Image.fromarray(RAMP)])
TRANSPARENT = {
    "rgba": ("x.png", with_alpha(COLOUR), RAMP, COLOUR, {}),
    "webp": ("x.webp", with_alpha(COLOUR), RAMP, COLOUR, {"lossless": True}),
    "tiff": ("x.tif", with_alpha(COLOUR), RAMP, COLOUR, {}),
    "grey with alpha": ("x.png", MIXED, RAMP, GREY[::-1], {}),
    "palette": (
        *("x.png", PALETTE, np.array(PALETTE), np.array(PALETTE.convert("RGB"))),
        {"transparency": bytes(range(256))},
    ),
    "one clear grey": ("x.png", RAMP, ONE_IS_CLEAR, GREY, {"transparency": 9}),
    "one clear grey of 16 bits": (
        *("x.png", GREY_16_BITS, ONE_IS_CLEAR, GREY),
        {"transparency": 9 * 256 + 77},
    ),
    "one clear colour": (
        *("x.png", COLOUR, ONE_IS_CLEAR, COLOUR),
        {"transparency": tuple(map(int, COLOUR[0, 9]))},
    ),
}


@pytest.mark.parametrize(
    "name, picture, alpha, drawn, options", TRANSPARENT.values(), ids=TRANSPARENT
)
def test_what_is_transparent_shows_the_background(name, picture, alpha, drawn, options, tmp_path):
    save(tmp_path / "train/a" / name, picture, **options)
    image = image_folder(tmp_path, "train", background=(9, 200, 30))[0]["image"]
    share = alpha[..., None] / 255
    expected = share * drawn + (1 - share) * np.array((9, 200, 30))
    np.testing.assert_allclose(image, expected, atol=1)


def test_every_part_of_a_folder_is_turned_unless_the_settings_say_no(tmp_path):
    for name in ("train/a/0", "train/a/1", "train/b/0", "train/b/1", "val/a/0", "val/b/0"):
        save(tmp_path / f"{name}.jpg", COLOUR, exif=EXIF)
    for is_turned, shape in ((True, (32, 8, 3)), (False, (8, 32, 3))):
        config = digits.get_config()
        changes = {"data.name": f"folder:{tmp_path}", "data.exif_orientation": is_turned}
        config.update_from_flattened_dict({**changes, "data.heldout_fraction": 0.5})
        settings = Settings.from_config(config)
        assert settings.data.preprocessing(8).exif_orientation == is_turned
        loaded = Images(settings).splits
        for part in (loaded.train, loaded.heldout, loaded.test):
            assert part[0]["image"].shape == shape


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
        Preprocessing(8, background=(256, 0, 0))


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


def test_missing_folders_are_named_with_what_is_there(pets, tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*pets/validation; .*pets holds: train, val$"):
        image_folder(pets, "validation")
    with pytest.raises(ValueError, match=r"no folder .*/no/where; .*/no holds: nothing$"):
        image_folder(tmp_path / "no/where", "train")


@pytest.mark.parametrize("function, place", [("scandir", "train/dog"), ("stat", "train/dog/.")])
def test_an_unreadable_folder_is_named(function, place, pets, monkeypatch):
    """One that cannot be listed, and one that can but cannot be entered."""
    real = getattr(os, function)

    def refuse(path, **options):
        if str(path).endswith(place):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(os, function, refuse)  # the mode of a folder does not stop root
    with pytest.raises(ValueError, match=r"cannot read the folder .*train/dog: .*denied"):
        image_folder(pets, "train")


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    noise = np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)
    save(path, noise, format="JPEG")
    path.write_bytes(path.read_bytes()[:-400])


def damaged(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 9] ^= 255
    path.write_bytes(content)


DAMAGES = (not_an_image, empty, truncated, damaged)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_image_is_named_when_it_is_read(damage, pets):
    damage(pets / "train/dog/2.png")
    source = image_folder(pets, "train")
    assert source[7]["image"].shape == (20, 30, 3)
    with pytest.raises(sources.BadImageError, match=r"pets/train/dog/2\.png cannot be decoded: "):
        source[8]


@pytest.mark.parametrize("options, limit", [({}, 0.03), ({"progressive": True}, 1.92)])
def test_an_image_above_the_limit_is_bad_and_the_limit_named(options, limit, tmp_path):
    """What counts is what is decoded, of a progressive JPEG all of it."""
    picture = np.zeros((1200, 1600, 3), np.uint8)
    save(tmp_path / "train/a/x.jpeg", picture, **options)
    image = image_folder(tmp_path, "train", least_side=150, max_megapixels=limit)[0]["image"]
    assert image.shape == (150, 200, 3)
    source = image_folder(tmp_path, "train", least_side=150, max_megapixels=0.99 * limit)
    message = r"x\.jpeg cannot be decoded: its .*pixels, .* more than max_megapixels=\S+ allows"
    with pytest.raises(sources.BadImageError, match=message):
        source[0]


def test_a_bomb_of_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    """A few bytes that say they are 400 megapixels."""
    path = save(tmp_path / "train/a/x.bmp")
    content = path.read_bytes()
    path.write_bytes(content[:18] + struct.pack("<ii", 20_000, 20_000) + content[26:])
    with pytest.raises(sources.BadImageError, match=r"400 megapixels.*max_megapixels=179"):
        image_folder(tmp_path, "train")[0]


@pytest.mark.parametrize("problem", ["circle", "nothing", "permission"])
def test_a_file_that_cannot_be_read_is_a_bad_image(problem, pets, monkeypatch):
    path = pets / "train/dog/2.png"
    if problem == "permission":
        real = type(epath.Path()).read_bytes

        def refuse(self):
            if self.name == "2.png":
                raise PermissionError(13, "Permission denied", str(self))
            return real(self)

        monkeypatch.setattr(type(epath.Path()), "read_bytes", refuse)  # no mode stops root
    else:
        path.unlink()
        path.symlink_to(path if problem == "circle" else "gone.png")
    source = image_folder(pets, "train")
    with pytest.raises(sources.BadImageError, match=r"train/dog/2\.png cannot be read: \w+"):
        source[8]
    skipping = sources.SkippingSource(source)
    assert skipping[8]["key"] == "train/dog/3.png"


def test_a_disk_that_is_gone_is_no_bad_image(pets):
    source = sources.SkippingSource(image_folder(pets, "train"))
    shutil.rmtree(pets)
    with pytest.raises(FileNotFoundError):
        source[0]


def test_bad_images_are_replaced_by_the_next_good_one_and_counted(pets, caplog):
    for name, damage in zip(("dog/1", "dog/2", "dog/5", "cat/0"), DAMAGES, strict=True):
        damage(pets / "train" / f"{name}.png")
    source = sources.SkippingSource(image_folder(pets, "train"))
    expected = keys(source)
    for bad, instead in ((7, 9), (8, 9), (11, 1), (0, 1)):
        expected[bad] = expected[instead]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            examples = [source[i] for i in range(12)]
    assert [example["key"] for example in examples] == expected
    assert [example["image"][0, 0, 0] for example in examples[6:]] == [0, 3, 3, 3, 4, 1]
    assert source.skipped == {f"train/{name}.png" for name in ("dog/1", "dog/2", "dog/5", "cat/0")}
    assert sorted(message.split(" cannot")[0][-9:] for message in caplog.messages) == [
        *("cat/0.png", "dog/1.png", "dog/2.png", "dog/5.png")
    ]


def test_skipped_images_count_in_no_batch_of_an_evaluation(pets):
    for name in ("cat/0", "cat/1", "dog/3", "dog/5"):
        empty(pets / "train" / f"{name}.png")
    source = subsets.subset(sources.SkippingSource(image_folder(pets, "train")), range(1, 12))
    transform = augment.Augmentation("inception").evaluation((16, 16, 3))
    for options in ({}, {"num_threads": 2}):
        found = list(batches.eval_batches(source, transform, 4, **options))
        masks = [batch["mask"].tolist() for batch in found]
        assert masks == [[0, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]]
    images = EvaluationSet(found, Normalization())
    assert images.num_images == len(images.labels) == 8
    assert images.labels.tolist() == [0] * 4 + [1] * 4
