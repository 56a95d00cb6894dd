"""Splits and batches of a folder, and a run on it."""

import contextlib
import itertools
import os

import numpy as np
import pytest

from flora_jax.data import augment, batches, splits
from flora_jax.data.image_folder import image_folder
from tests.helpers.pictures import keys, not_an_image, save


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
    with pytest.raises(ValueError, match=r"only in .*unseen: emu"):
        splits.load_splits(f"folder:{pets}", heldout_split=str(own))
    with pytest.raises(ValueError, match=r"heldout_split needs a dataset with splits.*not digits"):
        splits.load_splits("digits", heldout_split="val")


def test_both_splits_need_the_same_classes(pets):
    (pets / "val/dog").rename(pets / "val/doge")
    save(pets / "train/emu/0.png")
    message = r"train and val in .*pets .*: dog, emu; only in val: doge$"
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


def test_a_single_class_is_refused(pets):
    with pytest.raises(ValueError, match=r"a single class, 'dog', .* at least 2 are needed"):
        splits.load_splits(f"folder:{pets}", 0.5, classes=(1,))


def test_on_bad_image_is_one_of_two(pets):
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
