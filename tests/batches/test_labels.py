"""Labels: those of TFDS, which are kept in a file, and those that are no class."""

import os
import pathlib
import shutil

import numpy as np
import pytest

import flora_jax as flora
from flora_jax.data import labels, sources, splits, subsets
from flora_jax.data.kept import digest
from tests.helpers.batches import encode, numbered_source, write_tfds

PICTURE = encode(np.zeros((4, 6, 3), np.uint8), "PNG")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where labels are kept whose dataset cannot be written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/flora_jax/labels"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of a dataset of 40 + 8 pictures of 5 classes; those of "hidden" have no label."""
    data_dir = tmp_path_factory.mktemp("tfds")
    examples = [(PICTURE, (i * i) % 5) for i in range(40)]
    hidden = [(PICTURE, -1 if i else 4) for i in range(6)]
    write_tfds(data_dir, 5, train=examples, validation=examples[:8], hidden=hidden)
    return data_dir


@pytest.fixture
def data_dir(built, tmp_path):
    """A copy of it, which holds no labels yet."""
    return shutil.copytree(built, tmp_path / "tfds", ignore=shutil.ignore_patterns("labels-*"))


def labels_of(data_dir: pathlib.Path, split: str = "train") -> list[int]:
    return sources.tfds("tiny_pictures", split, str(data_dir)).labels.tolist()


def in_records(data_dir: pathlib.Path, split: str = "train") -> list[int]:
    source = sources.tfds("tiny_pictures", split, str(data_dir))
    return [source[i]["label"] for i in range(len(source))]


def kept(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.rglob("labels-*"))


def test_labels_are_read_once_and_kept_beside_the_dataset(data_dir, tmp_path, monkeypatch):
    expected = in_records(data_dir)
    assert labels_of(data_dir) == expected
    assert [path.parent.name for path in kept(data_dir)] == ["1.0.0"]
    assert labels_of(data_dir, "train[:25%]") == expected[:10]
    assert len(kept(data_dir)) == 2
    monkeypatch.setattr(labels, "_RECORDS_AT_ONCE", None)  # no pass over the records from here on
    assert labels_of(data_dir) == expected
    moved = shutil.copytree(data_dir, tmp_path / "moved")
    assert labels_of(moved) == expected


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "of another dataset"])
def test_damaged_labels_are_read_again(damage, data_dir):
    expected = labels_of(data_dir)
    [file] = kept(data_dir)
    good = file.read_bytes()
    packed = bytearray(good)
    packed[-4] ^= 1
    if damage == "of another dataset":
        packed[:16] = digest(bytes(packed[16:]))
    content = {"cut": good[:-4], "empty": b""}.get(damage, bytes(packed))
    file.write_bytes(content)
    assert labels_of(data_dir) == expected
    assert file.read_bytes() == good


def test_another_version_of_the_files_has_other_labels(data_dir, tmp_path):
    before = labels_of(data_dir)
    other = [(PICTURE, (i + 1) % 5) for i in range(40)]
    write_tfds(tmp_path / "other", 5, train=other)
    [files] = (data_dir / "tiny_pictures").iterdir()
    for path in (tmp_path / "other").rglob("*-train.*"):
        shutil.copy(path, files / path.name)
    assert labels_of(data_dir) == in_records(data_dir) != before


def test_labels_of_a_dataset_that_cannot_be_written_are_in_the_cache(data_dir, cache, monkeypatch):
    real = os.replace

    def refuse(source, target, **options):
        if pathlib.Path(target).is_relative_to(data_dir):
            raise PermissionError(13, "Permission denied", str(target))
        return real(source, target, **options)

    monkeypatch.setattr(os, "replace", refuse)  # the mode of a folder does not stop root
    expected = in_records(data_dir)
    assert labels_of(data_dir) == expected
    assert len(kept(cache)) == 1
    assert not kept(data_dir)
    monkeypatch.setattr(labels, "_RECORDS_AT_ONCE", None)
    assert labels_of(data_dir) == expected


def test_a_split_without_labels_is_refused(data_dir):
    message = r"5 of the 6 labels of the test split of tfds:tiny_\w+ are no class 0\.\.4: -1$"
    with pytest.raises(ValueError, match=message):
        splits.load_splits("tfds:tiny_pictures", 0.3, data_dir=str(data_dir), test_split="hidden")


def test_a_label_of_another_kind_is_refused(data_dir):
    [features] = data_dir.rglob("features.json")
    content = features.read_text().replace("class_label_feature.ClassLabel", "scalar.Scalar")
    content = content.replace('"classLabel"', '"tensor"').replace(
        '"numClasses": "5"', '"shape": {}, "dtype": "float32", "encoding": "none"'
    )
    features.write_text(content)
    with pytest.raises(ValueError, match="is no image classification dataset"):
        sources.tfds("tiny_pictures", "train", str(data_dir))


@pytest.mark.parametrize(
    "bad, message",
    [
        (np.array([0, 3, 7]), r"2 of the 3 labels of x are no class 0\.\.2: 3, 7$"),
        (np.array([0.0, 1.5]), "labels of x must be integers, got float64"),
    ],
)
def test_labels_that_are_no_class(bad, message):
    with pytest.raises(ValueError, match=message):
        labels.check_labels(bad, 3, "x")


def test_labels_in_memory_are_checked_against_the_model(tiny_model, tmp_path):
    images = np.zeros((5, 8, 8, 3), np.uint8)
    for bad in (np.array([0, 1, 2, -1, 0]), np.array([0, 1, 2, 0.5, 0])):
        with pytest.raises(ValueError, match="labels of the images"):
            flora.ImageSet(images, bad)
    for bad, message in (((0, 1, 2, 3, 0), r"no class 0\.\.2: 3"), ((1,) * 5, "of the class 1")):
        with pytest.raises(ValueError, match=message):
            flora.train(tiny_model, flora.ImageSet(images, np.array(bad)), directory=tmp_path)
    beyond = flora.ImageSet(images, np.array([0, 1, 2, 3, 9])).on_devices
    with pytest.raises(ValueError, match=r"2 of the 5 labels of the evaluation set .*: 3, 9"):
        flora.evaluate(tiny_model, beyond)


def test_a_subset_of_classes_keeps_their_names():
    source = subsets.Subset(numbered_source(9), np.array([2, 1, 5]), classes=(2, 1))
    assert source.class_names == ("2", "1")
    assert sources.SkippingSource(source).class_names == ("2", "1")
