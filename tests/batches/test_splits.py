"""Sources of images, and which of them are trained on, searched with and reported on."""

import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.data import augment, sources, splits, subsets
from tests.helpers.batches import SHAPE, as_rgb, numbered_source, take_eval

few = settings(max_examples=25)


def test_digits_are_the_bundled_scans_in_uint8(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    assert len(digits) == 1797
    assert digits.num_classes == 10
    example = digits[41]
    assert example["key"] == "digits/00041"
    assert example["label"] == bunch.target[41]
    assert example["image"].shape == SHAPE
    assert example["image"].dtype == np.uint8
    np.testing.assert_allclose(example["image"][..., 0], bunch.images[41] * 255 / 16, atol=0.5)
    assert digits.images.max() == 255


def test_tfds_source_decodes_every_picture_to_rgb(tiny_tfds):
    data_dir, pictures = tiny_tfds
    source = sources.tfds("tiny_pictures", "train", data_dir)
    assert len(source) == 12
    assert source.num_classes == 3
    examples = [source[i] for i in range(12)]
    assert [e["key"] for e in examples] == [f"tiny_pictures/train/{i}" for i in range(12)]
    assert source.labels.tolist() == [e["label"] for e in examples]
    # TFDS shuffles when it writes: heights tell the pictures apart.
    for example in examples:
        picture = pictures[example["image"].shape[0] - 10]
        np.testing.assert_array_equal(example["image"], as_rgb(picture))
        assert example["label"] == (example["image"].shape[0] - 10) % 3


def test_tfds_splits_hold_out_of_train_and_test_on_validation(tiny_tfds):
    loaded = splits.load_splits("tfds:tiny_pictures", heldout_fraction=0.25, data_dir=tiny_tfds[0])
    assert (len(loaded.train), len(loaded.heldout), len(loaded.test)) == (9, 3, 6)
    assert loaded.num_classes == 3
    assert loaded.test[0]["key"].startswith("tiny_pictures/validation/")
    evaluated = take_eval(loaded.test, 4, augment.Augmentation("inception").evaluation((8, 8, 3)))
    assert [batch["mask"].sum() for batch in evaluated] == [4, 2]


def test_tfds_error_says_what_was_expected_and_how_to_build_it(tiny_tfds, tmp_path):
    with pytest.raises(ValueError, match="tfds build absent --file_format=array_record"):
        sources.tfds("absent", "train", str(tmp_path))
    with pytest.raises(ValueError, match=r"Unknown split 'testing'.*train.*validation"):
        sources.tfds("tiny_pictures", "testing", tiny_tfds[0])


def test_tfds_error_names_the_format_when_only_tfrecord_was_built(tiny_tfds, tmp_path):
    folder = tmp_path / "tiny_pictures" / "1.0.0"
    folder.mkdir(parents=True)
    for built in (pathlib.Path(tiny_tfds[0]) / "tiny_pictures" / "1.0.0").glob("*.json"):
        (folder / built.name).write_text(built.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="no ArrayRecord dataset 'tiny_pictures'"):
        sources.tfds("tiny_pictures", "train", str(tmp_path))


def keys(source):
    return {source.key(i) for i in range(len(source))}


def test_digits_splits_are_disjoint_complete_and_stratified(digits):
    loaded = splits.load_splits("digits", heldout_fraction=0.2)
    parts = [loaded.train, loaded.heldout, loaded.test]
    assert sum(len(part) for part in parts) == len(digits)
    assert set.union(*map(keys, parts)) == keys(digits)
    per_class = np.bincount(digits.labels)
    np.testing.assert_allclose(np.bincount(loaded.test.labels), 0.25 * per_class, atol=0.51)
    np.testing.assert_allclose(np.bincount(loaded.heldout.labels), 0.15 * per_class, atol=1)


def test_digits_test_images_never_change():
    for arguments in ({}, {"seed": 7}, {"heldout_fraction": 0.5}):
        test = splits.load_splits("digits", **arguments).test
        assert len(test) == 450
        assert test.indices[:8].tolist() == [0, 4, 12, 13, 19, 20, 26, 30]
        assert test.indices.sum() == 394683


@few
@given(order=st.permutations(range(30)), fraction=st.floats(0.1, 0.9), seed=st.integers(0, 99))
def test_hold_out_does_not_depend_on_the_order(order, fraction, seed):
    source = numbered_source(30)
    expected = [keys(part) for part in subsets.hold_out(source, fraction, seed)]
    shuffled = subsets.subset(source, order)
    train, heldout = subsets.hold_out(shuffled, fraction, seed)
    assert [keys(train), keys(heldout)] == expected
    assert np.bincount(heldout.labels).tolist() == [round(10 * fraction)] * 3


def test_subset_of_a_subset_keeps_images_labels_and_keys_together():
    source = subsets.subset(subsets.subset(numbered_source(20), range(10, 20)), [3, 1])
    assert len(source) == 2
    assert source.labels.tolist() == [13 % 3, 11 % 3]
    example = source[1]
    assert (example["image"][0, 0, 0], example["label"], example["key"]) == (
        11,
        11 % 3,
        "numbered/00011",
    )


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_held_out_fraction_must_lie_between_0_and_1(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        subsets.hold_out(numbered_source(9), fraction, seed=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        splits.load_splits("digits", heldout_fraction=fraction)


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_hold_out_leaves_neither_part_empty(fraction):
    with pytest.raises(ValueError, match="both parts need at least one"):
        subsets.hold_out(numbered_source(9), fraction, seed=0)
