"""Splits of a folder: where they are found, what they hold, and the errors where they are not."""

import os
import re

import pytest

from flora_jax.data import splits
from flora_jax.data.image_folder import image_folder
from tests.helpers.pictures import keys, not_an_image, save, scene


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
def test_splits_are_found(train, others, tested, place):
    for split in (train, *others):
        fill(place / split, "ant", "bee", count=4)
    loaded = splits.load_splits(f"folder:{place}", 0.3)
    assert all(key.startswith(f"{tested}") for key in keys(loaded.test))
    assert len(loaded.test) == (8 if others else 2)
    assert loaded.class_names == ("ant", "bee")


def test_folders_that_only_sound_like_splits(place, tmp_path):
    """Pictures of trains, and a test folder whose pictures have no classes."""
    fill(place, "car", "plane", "train")
    loaded = splits.load_splits(f"folder:{place}")
    assert loaded.class_names == ("car", "plane", "train")
    fill(tmp_path / "contest/train", "car", "plane")
    fill(tmp_path / "contest", "test")
    loaded = splits.load_splits(f"folder:{tmp_path}/contest")
    assert all(key.startswith("train/") for key in keys(loaded.test))


AB = ("ant", "bee")
WRONG = {  # the classes in a folder, and what is said
    "pictures": (
        {"..": ["place"]},
        r"no class folder in PLACE: .*PLACE/CLASS/\*\.jpeg",
    ),
    "in train": ({"": ["train"]}, r"PLACE holds splits: expected .*PLACE/train"),
    "one class": ({"": ["ant"]}, r"a single class, 'ant', of which nothing.*at least 2 are needed"),
    "small": ({"": AB}, r"PLACE is split into 3 parts.*at least 3 images.*: ant has 2, bee has 2"),
    "other names": ({"Training": AB, "Testing": AB}, r"PLACE holds splits: .*train.*val"),
    "no val": (
        {"train": AB, "valid": AB, "test": AB},
        r"test and valid .*data\.test_split=test",
    ),
}


@pytest.mark.parametrize("folders, message", WRONG.values(), ids=WRONG)
def test_a_wrong_folder_is_refused_with_what_is_expected(folders, message, place):
    for folder, classes in folders.items():
        fill(place / folder, *classes, count=2)
    with pytest.raises(ValueError, match=message.replace("PLACE", re.escape(str(place)))):
        splits.load_splits(f"folder:{place}")


def test_an_empty_class_is_refused(place):
    fill(place, "ant", "bee")
    (place / "cow/nothing").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no image in the class folder .*cow: expected"):
        splits.load_splits(f"folder:{place}")


def test_names_without_a_kind_or_a_place():
    for name in ("pets", "folder:", "images:", ""):
        with pytest.raises(ValueError, match=rf"unknown dataset '{name}'; choose .*'folder:PATH'"):
            splits.load_splits(name)


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
        splits.load_splits(f"folder:{pets}", 0.5, test_split="val")


def test_held_out_images_of_ones_own(pets, tmp_path):
    own = tmp_path / "unseen"
    save(own / "cat/a.png")
    save(own / "dog/b.png")
    for split in (str(own), "val"):
        loaded = splits.load_splits(f"folder:{pets}", heldout_split=split)
        assert keys(loaded.heldout) == keys(image_folder(pets, split))
        assert keys(loaded.train) == keys(image_folder(pets, "train")), "none is held out"
    assert loaded.heldout.labels.tolist() == loaded.test.labels.tolist()
    save(own / "emu/c.png")
    with pytest.raises(ValueError, match=r"only in one of them: emu"):
        splits.load_splits(f"folder:{pets}", heldout_split=str(own))
    with pytest.raises(ValueError, match=r"heldout_split needs a dataset with splits.*not digits"):
        splits.load_splits("digits", heldout_split="val")


def test_both_splits_need_the_same_classes(pets):
    (pets / "val/dog").rename(pets / "val/doge")
    save(pets / "train/emu/0.png")
    message = r"train and val in .*pets .*: dog, doge, emu$"
    with pytest.raises(ValueError, match=message):
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
