"""Images in class folders: index, cache, decoding, bad files, and a run on them."""

import contextlib
import itertools
import json
import logging
import os
import pathlib
import shutil

import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from flora_jax.data import augment, batches, sources, splits
from flora_jax.data.image_folder import image_folder
from tests.conftest import run_flora


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder that holds the indices."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/flora_jax/index"


def save(path: pathlib.Path, picture=None, **options) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if picture is None:
        picture = np.zeros((3, 5, 3), np.uint8)
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture)
    picture.save(path, **options)
    return path


def keys(source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


@pytest.fixture
def pets(tmp_path):
    """train: 6 + 6 pictures, val: 2 + 2. The red of a picture is its number in its class."""
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                picture = np.full((20, 30, 3), (i, 0, 0), np.uint8)
                save(tmp_path / "pets" / split / name / f"{i}.png", picture)
    return tmp_path / "pets"


# --- the index -----------------------------------------------------------------------------------


def test_classes_and_images_are_in_the_order_of_torchvision(tmp_path):
    train = tmp_path / "train"
    names = ["b/2.jpg", "b/10.jpg", "B/1.bmp", "a b/x.webp", "a/z.png", "a/sub/deep/y.JPEG"]
    for name in [*names, "a/sub b/w.PNG", "a/sub/v.Jpg", "a/Z.jpeg"]:
        save(train / name)
    (train / "a/notes.txt").write_text("no image")
    (train / "README.md").write_text("no class")
    save(train / "stray.png")
    # What torchvision.datasets.folder does, with our suffixes.
    expected = [
        (pathlib.Path(folder, name).relative_to(tmp_path).as_posix(), label)
        for label, kind in enumerate(sorted(p.name for p in train.iterdir() if p.is_dir()))
        for folder, _, files in sorted(os.walk(train / kind, followlinks=True))
        for name in sorted(files)
        if not name.endswith(".txt")
    ]
    source = image_folder(tmp_path, "train")
    assert source.classes == ("B", "a", "a b", "b")
    assert source.num_classes == 4
    assert list(zip(keys(source), source.labels.tolist(), strict=True)) == expected
    assert len(source) == len(names) + 3
    assert source.labels.dtype == np.int32
    assert [source[i]["label"] for i in range(len(source))] == source.labels.tolist()
    assert [source[i]["key"] for i in range(len(source))] == keys(source)


def test_keys_do_not_depend_on_the_place_of_the_folder(pets, cache, tmp_path, monkeypatch):
    expected = keys(image_folder(pets, "train"))
    shutil.copytree(pets, tmp_path / "elsewhere/copy")
    assert keys(image_folder(tmp_path / "elsewhere/copy", "train")) == expected
    monkeypatch.chdir(tmp_path)
    assert keys(image_folder("pets", "train")) == expected
    assert len(list(cache.glob("*.json"))) == 2  # a relative path is the same folder


def no_listing(*_):
    raise AssertionError("a folder was listed")


def test_second_time_the_index_comes_from_the_cache(pets, cache, monkeypatch):
    first = image_folder(pets, "train")
    assert len(list(cache.glob("*.json"))) == 1
    monkeypatch.setattr(type(epath.Path()), "iterdir", no_listing)
    second = image_folder(pets, "train")
    assert keys(second) == keys(first)
    assert second.classes == first.classes
    np.testing.assert_array_equal(second.labels, first.labels)
    with pytest.raises(AssertionError, match="listed"):
        image_folder(pets, "val")


CHANGES = {
    "image added": lambda train: save(train / "cat/9.png"),
    "image added in a nested folder": lambda train: save(train / "dog/more/9.png"),
    "image removed": lambda train: (train / "dog/0.png").unlink(),
    "image renamed": lambda train: (train / "dog/0.png").rename(train / "dog/a.png"),
    "class added": lambda train: save(train / "emu/0.png"),
    "class renamed": lambda train: (train / "dog").rename(train / "wolf"),
    "class removed": lambda train: shutil.rmtree(train / "dog"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_makes_the_cached_index_stale(change, pets, tmp_path):
    save(pets / "train/dog/more/8.png")
    for folder in (pets / "train").rglob("**/"):
        os.utime(folder, (10**9, 10**9))  # clocks of file systems are coarse
    before = keys(image_folder(pets, "train"))
    change(pets / "train")
    after = keys(image_folder(pets, "train"))
    assert after != before
    assert after == keys(image_folder(pets, "train", cache_dir=tmp_path / "fresh"))


@pytest.mark.parametrize("content", ["{", "[]", '{"cat": 3}', '{"cat": [0, ["0.png"]]}'])
def test_a_damaged_index_is_made_again(content, pets, cache):
    expected = keys(image_folder(pets, "train"))
    (file,) = cache.glob("*.json")
    good = file.read_text()
    file.write_text(content)
    assert keys(image_folder(pets, "train")) == expected
    assert file.read_text() == good


def test_a_cache_that_cannot_be_written_is_no_error(pets, tmp_path):
    (tmp_path / "file").touch()
    assert len(image_folder(pets, "train", cache_dir=tmp_path / "file/cache")) == 12


def test_nothing_is_written_into_the_dataset(pets):
    before = sorted(pets.rglob("*"))
    image_folder(pets, "train")
    assert sorted(pets.rglob("*")) == before


class FakeBucket(MemoryFileSystem):
    protocol = "gs"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("gs://", "/"))


def test_an_object_store(pets, cache, monkeypatch):
    bucket = FakeBucket()
    monkeypatch.setattr(FakeBucket, "store", {})
    monkeypatch.setattr(FakeBucket, "pseudo_dirs", [""])
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: bucket)
    bucket.put(str(pets), "gs://bucket/pets", recursive=True)
    source = image_folder("gs://bucket/pets", "train")
    local = image_folder(pets, "train")
    assert keys(source) == keys(local)
    np.testing.assert_array_equal(source[7]["image"], local[7]["image"])
    bucket.put(str(pets / "train/cat/0.png"), "gs://bucket/pets/train/cat/9.png")
    assert len(image_folder("gs://bucket/pets", "train")) == 13  # no times there: no cache
    assert len(list(cache.glob("*.json"))) == 1


# --- pictures of every kind ----------------------------------------------------------------------

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
    image = image_folder(tmp_path, "train")[0]["image"]
    if expected is None:
        expected = np.array(picture.convert("RGB"))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs(mode, tmp_path):
    smooth = Image.fromarray(COLOUR).resize((64, 48), Image.Resampling.BICUBIC).convert(mode)
    save(tmp_path / "train/a/x.jpeg", smooth, quality=98, exif=EXIF)
    image = image_folder(tmp_path, "train")[0]["image"]
    assert image.shape == (48, 64, 3)
    difference = np.abs(image.astype(int) - np.array(smooth.convert("RGB"), int))
    assert difference.mean() < 4


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


@pytest.mark.parametrize("kind", ["rgb", "grey", "16 bits", "rgba", "1 pixel high", "1 pixel"])
def test_every_kind_goes_through_the_recipe(kind, tmp_path):
    name, picture, _, options = KINDS[kind]
    save(tmp_path / "train/a" / name, picture, **options)
    image = image_folder(tmp_path, "train")[0]["image"]
    for out in (
        augment.train_transform("inception", (16, 16, 3))(image, np.random.default_rng(0)),
        augment.eval_transform("inception", (16, 16, 3))(image),
    ):
        assert out.shape == (16, 16, 3)
        assert out.dtype == np.uint8


# --- bad input -----------------------------------------------------------------------------------


def test_missing_folders_are_named_with_what_is_there(pets, tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*pets/validation; .*pets holds: train, val$"):
        image_folder(pets, "validation")
    with pytest.raises(ValueError, match=r"no folder .*/nowhere; .* holds: pets"):
        image_folder(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=r"no folder .*/no/where; nor is there .*/no$"):
        image_folder(tmp_path / "no/where", "train")


def test_a_split_without_class_folders(tmp_path):
    save(tmp_path / "train/x.png")
    with pytest.raises(ValueError, match=r"no class folder in .*train: .*train holds: x\.png"):
        image_folder(tmp_path, "train")


def test_an_empty_class_is_named(pets):
    (pets / "train/emu/nested").mkdir(parents=True)
    (pets / "train/emu/nested/x.gif").touch()
    with pytest.raises(ValueError, match=r"no image in the class folder .*train/emu: .*\*\.jpg"):
        image_folder(pets, "train")


@pytest.mark.parametrize("function, place", [("listdir", "train/dog"), ("stat", "train/dog/.")])
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


def not_an_image(path):
    path.write_text("<html>404</html>")


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


def test_an_image_too_large_to_decode_safely_is_bad(pets, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(sources.BadImageError, match=r"0\.png cannot be decoded: .*bomb"):
        image_folder(pets, "train")[0]


def test_a_bad_image_stops_a_run_with_its_name(pets):
    truncated(pets / "train/dog/2.png")
    source = image_folder(pets, "train")
    transform = augment.eval_transform("inception", (16, 16, 3))
    with pytest.raises(sources.BadImageError, match=r"train/dog/2\.png"):
        list(batches.eval_batches(source, transform, 4, num_threads=2))


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


def test_nothing_but_bad_images(pets):
    for path in (pets / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(sources.BadImageError, match="none of the 4 images"):
        sources.SkippingSource(image_folder(pets, "val"))[0]


# --- splits and batches --------------------------------------------------------------------------


def test_held_out_images_of_a_folder_never_change(pets, tmp_path):
    loaded = splits.load_splits(f"folder:{pets}", heldout_fraction=0.34)
    heldout = ["train/cat/3.png", "train/cat/4.png", "train/dog/2.png", "train/dog/4.png"]
    assert keys(loaded.heldout) == heldout
    assert sorted(keys(loaded.train) + heldout) == keys(image_folder(pets, "train"))
    assert keys(loaded.test) == keys(image_folder(pets, "val"))
    assert loaded.num_classes == 2
    pets.rename(tmp_path / "moved")
    moved = splits.load_splits(f"folder:{tmp_path}/moved", heldout_fraction=0.34)
    assert keys(moved.heldout) == heldout


def test_file_names_need_not_be_utf8(pets):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (pets / "train/cat/0.png").rename(pets / "train/cat" / name)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    for _ in range(2):  # listed, and from the cache
        loaded = splits.load_splits(f"folder:{pets}", heldout_fraction=0.5)
        assert f"train/cat/{name}" in keys(loaded.train) + keys(loaded.heldout)
        assert len([loaded.train[i] for i in range(6)]) == 6


def test_another_test_split(pets):
    (pets / "val").rename(pets / "test")
    assert len(splits.load_splits(f"folder:{pets}", 0.5, test_split="test").test) == 4
    with pytest.raises(ValueError, match=r"no folder .*val; .*holds: test, train"):
        splits.load_splits(f"folder:{pets}", 0.5)


def test_both_splits_need_the_same_classes(pets):
    (pets / "val/dog").rename(pets / "val/doge")
    save(pets / "train/emu/0.png")
    message = r"train and val in .*pets .*: 'dog', 'emu'; only in val: 'doge'$"
    with pytest.raises(ValueError, match=message):
        splits.load_splits(f"folder:{pets}")
    for i in range(6):
        save(pets / f"train/fly {i}/0.png")
    with pytest.raises(ValueError, match=r"'dog', 'emu', .*'fly 2' and 3 more; only in val"):
        splits.load_splits(f"folder:{pets}")


def test_a_skipped_image_is_replaced_out_of_its_own_split_and_class(pets):
    for i in (1, 2, 4):
        not_an_image(pets / f"train/cat/{i}.png")
    loaded = splits.load_splits(f"folder:{pets}", 0.34, classes=(1, 0), on_bad_image="skip")
    for part in (loaded.train, loaded.heldout, loaded.test):
        mine = set(keys(part))
        for example in (part[i] for i in range(len(part))):
            assert example["key"] in mine
            assert example["label"] == ("dog", "cat").index(example["key"].split("/")[1])
    assert loaded.train.skipped == {"train/cat/1.png", "train/cat/2.png"}
    assert loaded.heldout.skipped == {"train/cat/4.png"}


def test_names_that_load_splits_does_not_know(pets):
    with pytest.raises(ValueError, match=r"'folder:PATH'.*did you mean 'folder:data/pets'"):
        splits.load_splits("data/pets")
    with pytest.raises(ValueError, match="unknown on_bad_image 'ignore'; choose 'raise' or 'skip'"):
        splits.load_splits(f"folder:{pets}", on_bad_image="ignore")


def test_batches_of_a_folder(pets):
    loaded = splits.load_splits(f"folder:{pets}", heldout_fraction=0.34)
    transform = augment.train_transform("inception", (16, 16, 3))

    def take(steps, **arguments):
        with contextlib.closing(
            batches.train_batches(loaded.train, transform, 4, seed=0, **arguments)
        ) as iterator:
            return list(itertools.islice(iterator, steps))

    steps = take(4, num_threads=2)
    for batch, again in zip(steps[2:], take(2, start_step=2), strict=True):
        np.testing.assert_array_equal(batch["image"], again["image"])
        np.testing.assert_array_equal(batch["label"], again["label"])
    numbers = np.concatenate([batch["image"][:, 0, 0, 0] for batch in steps[:2]])
    labels = np.concatenate([batch["label"] for batch in steps[:2]])
    names = [("cat", "dog")[label] for label in labels]
    drawn = [f"train/{name}/{number}.png" for name, number in zip(names, numbers, strict=True)]
    assert sorted(drawn) == keys(loaded.train)

    evaluation = augment.eval_transform("inception", (16, 16, 3))
    (one, other) = batches.eval_batches(loaded.test, evaluation, 3)
    assert one["label"].tolist() + other["label"].tolist() == [0, 0, 1, 1, 0, 0]
    assert other["mask"].tolist() == [1, 0, 0]


def test_the_whole_method_on_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 10)):
        for label, name in enumerate(("dark", "light")):
            for i in range(count):
                picture = rng.integers(0, 128, size=(24, 24, 3), dtype=np.uint8) + 127 * label
                save(tmp_path / "set" / split / name / f"{i}.jpeg", picture.astype(np.uint8))
    done = run_flora(
        tmp_path / "run",
        f"--config.data.name=folder:{tmp_path}/set",
        "--config.data.augmentation.name=inception",
        "--config.model.num_classes=2",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert set(result) == {"dense", "uniform", "subnet"}
    assert result["dense"]["top1"] == 1.0
    assert result["subnet"]["macs"] < 0.6 * result["dense"]["macs"]
    assert list((tmp_path / "cache/flora_jax/index").glob("*.json"))
