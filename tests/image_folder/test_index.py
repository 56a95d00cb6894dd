"""The index of a folder and its cache."""

import os
import pathlib
import shutil

import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from flora_jax.data import splits
from flora_jax.data.image_folder import image_folder
from tests.helpers.pictures import keys, save


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
    monkeypatch.setattr(os, "scandir", no_listing)
    second = image_folder(pets, "train")
    assert keys(second) == keys(first)
    assert second.classes == first.classes
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


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"cat": [0, ["0.png"]]}', '{"format": 2}', '{"format": 9}']
)
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
    bucket.put(str(pets / "train"), "gs://bucket/unsplit", recursive=True)
    found, expected = (
        splits.load_splits(f"folder:{place}", 0.3)
        for place in ("gs://bucket/unsplit", pets / "train")
    )
    assert keys(found.test) == keys(expected.test)
    assert keys(found.heldout) == keys(expected.heldout)
