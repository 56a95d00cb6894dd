"""Splits of a folder: where they are found, and the errors where they are not."""

import logging
import re

import pytest

from flora_jax.data import splits
from tests.helpers.pictures import keys, save, scene


def fill(folder, *classes, count=3):
    for name in classes:
        for i in range(count):
            save(folder / name / f"{i}.png", scene(hash_of(name) + i, (8, 6)))


def hash_of(name: str) -> int:
    return sum(map(ord, name)) * 1000


@pytest.fixture
def place(tmp_path):
    return tmp_path / "place"


@pytest.mark.parametrize(
    "train, others, tested",
    [
        ("train", ("val", "test"), "val/"),
        ("train", ("test",), "test/"),
        ("train", ("valid",), "valid/"),
        ("train", ("validation",), "validation/"),
        ("train", (), "train/"),
        (".", (), ""),
    ],
)
def test_splits_are_found(train, others, tested, place, caplog):
    caplog.set_level(logging.INFO)
    for split in (train, *others):
        fill(place / split, "ant", "bee", count=4)
    loaded = splits.load_splits(f"folder:{place}", 0.3)
    assert all(key.startswith(f"{tested}") for key in keys(loaded.test))
    assert len(loaded.test) == (8 if others else 2)
    assert loaded.class_names == ("ant", "bee")
    if others and "val" not in others:
        assert f"{others[0]} is reported on; data.test_split names another" in caplog.text


def test_folders_that_only_sound_like_splits(place, tmp_path):
    """Pictures of trains, and a test folder whose pictures have no classes."""
    fill(place, "car", "plane", "train")
    loaded = splits.load_splits(f"folder:{place}")
    assert loaded.class_names == ("car", "plane", "train")
    fill(tmp_path / "contest/train", "car", "plane")
    fill(tmp_path / "contest", "test")
    loaded = splits.load_splits(f"folder:{tmp_path}/contest")
    assert all(key.startswith("train/") for key in keys(loaded.test))


def pictures(place):
    fill(place.parent, "place")


def pictures_in_train(place):
    fill(place, "train")


def one_class(place):
    fill(place, "ant")


def small_classes(place):
    fill(place, "ant")
    fill(place, "bee", "cow", count=2)


def an_empty_class(place):
    fill(place, "ant", "bee")
    (place / "cow/nothing").mkdir(parents=True)


def splits_of_other_names(place):
    fill(place / "Training", "ant", "bee")
    fill(place / "Testing", "ant", "bee")


def several_without_val(place):
    fill(place / "train", "ant", "bee")
    fill(place / "valid", "ant", "bee")
    fill(place / "test", "ant", "bee")


WRONG = {
    pictures: r"no class folder in PLACE: .*PLACE/CLASS/\*\.jpeg; PLACE holds.*images:PLACE takes",
    pictures_in_train: r"PLACE holds train, which name splits: expected .*PLACE/train",
    one_class: r"a single class, 'ant', of which nothing.*at least 2 are needed, or images:PATH",
    small_classes: r"PLACE is split into 3 parts.*at least 3 images.*: bee has 2, cow has 2",
    an_empty_class: r"no image in the class folder PLACE/cow: expected files \*\.jpg",
    splits_of_other_names: r"PLACE holds Testing, Training, which name splits.*train.*val",
    several_without_val: r"test and valid but no val.*data\.test_split=test",
}


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_a_wrong_folder_is_refused_with_what_is_expected(make, place):
    make(place)
    with pytest.raises(ValueError, match=WRONG[make].replace("PLACE", re.escape(str(place)))):
        splits.load_splits(f"folder:{place}")


@pytest.mark.parametrize("kind", ["folder", "images"])
def test_a_file_is_no_folder(kind, tmp_path):
    (tmp_path / "pets.zip").touch()
    with pytest.raises(ValueError, match=r"pets\.zip is a file: expected a folder of pictures"):
        splits.load_splits(f"{kind}:{tmp_path}/pets.zip")


def test_names_without_a_kind_or_a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "pets", "ant", "bee")
    with pytest.raises(ValueError, match=r"unknown dataset 'pets'.*did you mean 'folder:pets'"):
        splits.load_splits("pets")
    for name in ("folder:", "images:", ""):
        with pytest.raises(ValueError, match=rf"unknown dataset '{name}'; choose .*'folder:PATH'"):
            splits.load_splits(name)
