"""Listing of the images in a folder, whatever links there are, and the cache of the list."""

import logging
import os
import pathlib
import shutil
import unicodedata

import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from flora_jax.data import splits
from flora_jax.data.image_folder import image_folder
from tests.helpers.pictures import keys, save

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def as_torchvision_lists(root: pathlib.Path, split: str) -> list[str]:
    """What is in a split without links and hidden things, in the order of torchvision."""
    return [
        pathlib.Path(folder, name).relative_to(root).as_posix()
        for kind in sorted((root / split).iterdir())
        if kind.is_dir() and not kind.is_symlink()
        for folder, _, files in sorted(os.walk(kind))
        for name in sorted(files)
    ]


def test_hidden_things_and_other_files_are_left_out_and_counted(pets, caplog):
    train, before = pets / "train", keys(image_folder(pets, "train"))
    for name in (".git/0.png", "__MACOSX/cat/0.png", "cat/.thumbs/0.png", "dog/._0.png"):
        save(train / name)
    for name in ("cat/Thumbs.db", "dog/desktop.ini", ".DS_Store", "dog/readme", "dog/a.GIF"):
        (train / name).touch()
    for name in ("cat/b.gif", "cat/c.txt"):
        (train / name).touch()
    save(train / "stray.png")
    os.mkfifo(train / "cat/pipe.png")
    with caplog.at_level(logging.INFO, "flora_jax"):
        for _ in range(2):  # listed, and from the cache
            source = image_folder(pets, "train")
            assert keys(source) == before
            assert source.class_names == ("cat", "dog")
            assert source.left_out == {
                "hidden": 7,
                ".gif": 2,
                ".txt": 1,
                "no suffix": 1,
                "no file": 1,
                "outside the classes": 1,
            }
    start = f"{train}: 12 images of 2 classes; left out: 7 hidden, 2 .gif, "
    assert any(message.startswith(start) for message in caplog.messages)


def test_pictures_of_a_kind_that_is_not_read_are_said(tmp_path, caplog):
    for name in ("cat/0.HEIC", "cat/1.heic", "cat/2.avif", "dog/3.txt"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    save(tmp_path / "train/dog/a.png")
    with pytest.raises(ValueError, match=r"no image in .*/cat: .*/cat holds: 0\.HEIC, 1\.heic"):
        image_folder(tmp_path, "train")
    save(tmp_path / "train/cat/a.png")
    for _ in range(2):  # listed, and from the cache
        caplog.clear()
        image_folder(tmp_path, "train")
        (warning,) = caplog.messages
        assert "not read, 2 .heic, 1 .avif: convert them" in warning


def test_what_is_left_out_has_a_bounded_number_of_kinds(pets):
    for i in range(40):
        (pets / f"val/dog/core.{i}").touch()
    left_out = image_folder(pets, "val").left_out
    assert sum(left_out.values()) == 40
    assert left_out["other"] > 20


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".TIF", ".Ppm", ".WebP"])
def test_every_suffix_of_torchvision(suffix, tmp_path):
    picture = np.full((6, 4), 200, np.uint8)
    save(tmp_path / f"train/a/x{suffix}", picture)
    image = image_folder(tmp_path, "train")[0]["image"]
    assert image.shape == (6, 4, 3)
    assert abs(image.astype(int) - 200).max() < 8


def test_a_folder_named_like_an_image_is_a_folder(pets):
    save(pets / "train/cat/holiday.jpeg/1.png")
    save(pets / "train/zoo.png/lion.webp/2.png")
    source = image_folder(pets, "train")
    assert keys(source) == as_torchvision_lists(pets, "train")
    assert source.class_names == ("cat", "dog", "zoo.png")


LINKS = {
    "to itself": ("cat/again", "."),
    "to the class above": ("cat/a/up", ".."),
    "to the split": ("cat/all", ".."),
    "to the dataset, another split in it": ("dog/all", "../.."),
    "to the whole disk": ("dog/disk", "/"),
    "to another class": ("cat/others", "../dog"),
    "to a folder of another class": ("cat/others", "../dog/b"),
    "to itself as a class": ("everything", "."),
    "to another class as a class": ("puppy", "dog"),
    "to an image beside it": ("dog/9.png", "0.png"),
    "to an image of another class": ("cat/9.png", "../dog/b/0.png"),
}


@pytest.mark.parametrize("link, target", LINKS.values(), ids=LINKS)
def test_no_link_lists_an_image_twice(link, target, pets):
    for folder in ("cat/a", "dog/b"):
        save(pets / "train" / folder / "0.png")
    expected = as_torchvision_lists(pets, "train")
    (pets / "train" / link).symlink_to(target)
    for _ in range(2):
        source = image_folder(pets, "train")
        assert keys(source) == expected
        assert source.left_out == {"listed before": 1}


def test_links_out_of_the_dataset_are_followed_once(pets, tmp_path):
    for name in ("more/1.png", "more/deep/2.png", "single.png"):
        save(tmp_path / "elsewhere" / name)
    train, elsewhere = pets / "train", tmp_path / "elsewhere"
    (elsewhere / "more/deep/back").symlink_to(train / "dog")
    (elsewhere / "more/deep/round").symlink_to(elsewhere / "more")
    (train / "emu").symlink_to(elsewhere / "more/deep")  # a class, before a folder in a class
    (train / "cat/more").symlink_to(elsewhere / "more")
    (train / "cat/x.png").symlink_to(elsewhere / "single.png")
    (train / "dog/y.png").symlink_to(elsewhere / "single.png")
    source = image_folder(pets, "train")
    added = sorted(set(keys(source)) - set(as_torchvision_lists(pets, "train")))
    assert added == ["train/cat/more/1.png", "train/emu/2.png"]
    assert "train/cat/x.png" in keys(source)
    assert "train/dog/y.png" not in keys(source)
    save(elsewhere / "more/3.png")  # the index is stale
    assert len(image_folder(pets, "train")) == len(source) + 1


def test_a_link_to_nothing_is_an_image_once_its_disk_is_back(pets, tmp_path):
    (pets / "val/cat/9.png").symlink_to(tmp_path / "disk/9.png")
    (pets / "val/cat/more").symlink_to(tmp_path / "disk/more")
    assert keys(image_folder(pets, "val"))[2:] == [
        *("val/cat/9.png", "val/dog/0.png", "val/dog/1.png")
    ]
    for name in ("9.png", "more/1.png"):
        save(tmp_path / "disk" / name)
    assert len(image_folder(pets, "val")) == 6


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_class_is_one_in_both_forms_of_unicode(form, tmp_path):
    """Composed letters sort behind z, decomposed ones do not: labels are those of train."""
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    names = {"Ångström": 1, "zoo": 2, "Übung": 3}
    for name, red in names.items():
        for split, spelled in (("train", form), ("val", other)):
            picture = np.full((3, 5, 3), (red, 0, 0), np.uint8)
            for i in range(4):
                path = unicodedata.normalize(spelled, f"{split}/{name}/{i}.png")
                save(tmp_path / "set" / path, picture)
    loaded = splits.load_splits(f"folder:{tmp_path}/set", 0.5)
    assert set(loaded.class_names) == {unicodedata.normalize("NFC", name) for name in names}
    for part in (loaded.train, loaded.heldout, loaded.test):
        assert sorted(set(part.labels)) == [0, 1, 2]
        for example in (part[i] for i in range(len(part))):
            name = unicodedata.normalize("NFC", loaded.class_names[example["label"]])
            assert names[name] == example["image"][0, 0, 0]


def test_images_of_no_class_in_a_tree_with_links(pets):
    (pets / "train/cat/round").symlink_to(pets)
    save(pets / ".cache/0.png")
    save(pets / "top.png")
    for _ in range(2):
        source = image_folder(pets, by_class=False)
        assert sorted(keys(source)) == sorted(
            path.relative_to(pets).as_posix()
            for path in pets.rglob("[!.]*.png")
            if not any(part.startswith(".") for part in path.relative_to(pets).parts)
        )
        assert source.left_out == {"hidden": 1, "listed before": 1}


def test_classes_and_images_are_in_the_order_of_torchvision(tmp_path):
    train = tmp_path / "train"
    names = ["b/2.jpg", "b/10.jpg", "B/1.bmp", "a b/x.webp", "a/z.png", "a/sub/deep/y.JPEG"]
    for name in [*names, "a/sub b/w.PNG", "a/sub/v.Jpg", "a/Z.jpeg"]:
        save(train / name)
    (train / "a/notes.txt").write_text("no image")
    (train / "README.md").write_text("no class")
    save(train / "stray.png")
    expected = [key for key in as_torchvision_lists(tmp_path, "train") if "notes" not in key]
    source = image_folder(tmp_path, "train")
    assert source.class_names == ("B", "a", "a b", "b")
    assert keys(source) == expected
    assert source.labels.dtype == np.int32
    for i, key in enumerate(expected):
        example = source[i]
        assert (example["key"], example["label"]) == (key, source.labels[i])
        assert source.class_names[source.labels[i]] == key.split("/")[1]


def test_keys_do_not_depend_on_the_place_of_the_folder(pets, cache, tmp_path, monkeypatch):
    expected = keys(image_folder(pets, "train"))
    shutil.copytree(pets, tmp_path / "elsewhere/copy")
    assert keys(image_folder(tmp_path / "elsewhere/copy", "train")) == expected
    monkeypatch.chdir(tmp_path)
    assert keys(image_folder("pets", "train")) == expected
    assert len(list(cache.iterdir())) == 2  # a relative path is the same folder


def no_listing(*_):
    raise AssertionError("a folder was listed")


def test_second_time_the_index_comes_from_the_cache(pets, cache, monkeypatch):
    before = sorted(pets.rglob("*"))
    first = image_folder(pets, "train")
    assert len(list(cache.iterdir())) == 1
    assert sorted(pets.rglob("*")) == before, "nothing is written into the dataset"
    monkeypatch.setattr(os, "scandir", no_listing)
    second = image_folder(pets, "train")
    assert keys(second) == keys(first)
    assert second.class_names == first.class_names
    np.testing.assert_array_equal(second.labels, first.labels)
    with pytest.raises(AssertionError, match="listed"):
        image_folder(pets, "val")


def replace_by_one_as_old(train):
    old = train.rename(train.with_name("old"))
    for path in old.rglob("*.png"):
        path = train / path.relative_to(old).with_suffix(".jpg")  # as many, and as long names
        save(path)
    for folder in train.rglob("**/"):
        os.utime(folder, (10**9, 10**9))


CHANGES = {
    "replaced by one as old": replace_by_one_as_old,
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


@pytest.mark.parametrize("damage", [lambda good: b"", lambda good: good[:-1]])
def test_a_damaged_index_is_made_again(damage, pets, cache):
    expected = keys(image_folder(pets, "train"))
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    assert keys(image_folder(pets, "train")) == expected
    assert file.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_no_error(pets, tmp_path):
    (tmp_path / "file").touch()
    assert len(image_folder(pets, "train", cache_dir=tmp_path / "file/cache")) == 12


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
    assert len(list(cache.iterdir())) == 1
    bucket.put(str(pets / "train"), "gs://bucket/unsplit", recursive=True)
    found, expected = (
        splits.load_splits(f"folder:{place}", 0.3)
        for place in ("gs://bucket/unsplit", pets / "train")
    )
    assert keys(found.test) == keys(expected.test)
    assert keys(found.heldout) == keys(expected.heldout)
