"""Folders that cannot be used, and images that cannot be decoded."""

import logging
import os
import shutil
import struct

import numpy as np
import pytest
from etils import epath

from flora_jax.data import augment, batches, sources, subsets
from flora_jax.data.image_folder import image_folder
from flora_jax.data.normalize import Normalization
from flora_jax.evaluation.evaluate import EvaluationSet
from tests.helpers.pictures import keys, not_an_image, save


def test_missing_folders_are_named_with_what_is_there(pets, tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*pets/validation; .*pets holds: train, val$"):
        image_folder(pets, "validation")
    with pytest.raises(ValueError, match=r"no folder .*/nowhere; .* holds: pets"):
        image_folder(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=r"no folder .*/no/where; nor is there .*/no$"):
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
    transform = augment.eval_transform("inception", (16, 16, 3))
    for options in ({}, {"num_threads": 2}):
        found = list(batches.eval_batches(source, transform, 4, **options))
        masks = [batch["mask"].tolist() for batch in found]
        assert masks == [[0, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]]
    images = EvaluationSet(found, Normalization())
    assert images.num_images == len(images.labels) == 8
    assert images.labels.tolist() == [0] * 4 + [1] * 4


def test_nothing_but_bad_images(pets):
    for path in (pets / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(sources.BadImageError, match="none of the 4 images"):
        sources.SkippingSource(image_folder(pets, "val"))[0]
