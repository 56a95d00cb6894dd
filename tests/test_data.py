import contextlib
import io
import itertools
import pathlib
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flora_jax.data import augment, batches, sources, splits

SHAPE = (8, 8, 1)

repeatable = settings(derandomize=True, deadline=None, max_examples=25)


def numbered_source(size: int, num_classes: int = 3) -> sources.ArraySource:
    """Image i is filled with the value i, so that a batch tells which images it holds."""
    images = np.broadcast_to(np.arange(size, dtype=np.uint8)[:, None, None, None], (size, *SHAPE))
    labels = np.arange(size, dtype=np.int32) % num_classes
    return sources.ArraySource("numbered", images, labels, num_classes)


class AddNoise:
    """Leaves the number of the image in its first pixel and a random number in the last one."""

    image_shape = SHAPE

    def __call__(self, image, rng):
        image = image.copy()
        image[-1, -1, 0] = rng.integers(256)
        return image


def take_train(source, steps, batch_size, seed=0, transform=None, **kwargs):
    transform = transform or AddNoise()
    with contextlib.closing(
        batches.train_batches(source, transform, batch_size, seed, **kwargs)
    ) as iterator:
        return list(itertools.islice(iterator, steps))


def take_eval(source, batch_size, transform=None):
    transform = transform or augment.eval_transform("digits", SHAPE)
    return list(batches.eval_batches(source, transform, batch_size))


def assert_same_batches(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


# Sources


@pytest.fixture(scope="module")
def digits():
    return sources.digits()


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


@pytest.fixture(scope="module")
def tiny_tfds(tmp_path_factory):
    """(data_dir, the pictures of split "train") of a dataset of 12 + 6 PNGs in ArrayRecord."""
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(256, size=(10 + i, 12, 3), dtype=np.uint8) for i in range(12)]
    pictures[0] = pictures[0][..., 0]  # grey, as some pictures of ImageNet are

    def png(picture):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        return buffer.getvalue()

    # Not registered: it is read from its files alone, as a dataset without a builder at hand.
    class TinyPictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # TFDS would look there for checksums of downloads; there are none

        def _info(self):
            features = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(pictures),
                "validation": self._generate_examples(pictures[:6]),
            }

        def _generate_examples(self, pictures):
            for i, picture in enumerate(pictures):
                yield i, {"image": png(picture), "label": i % 3}

    TinyPictures(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return str(data_dir), pictures


def as_rgb(picture):
    return np.stack([picture] * 3, axis=-1) if picture.ndim == 2 else picture


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


def test_tfds_labels_are_read_without_decoding_images(tiny_tfds, monkeypatch):
    source = sources.tfds("tiny_pictures", "train", tiny_tfds[0])
    monkeypatch.setattr(Image, "open", None)
    assert Counter(source.labels.tolist()) == {0: 4, 1: 4, 2: 4}


def test_tfds_splits_hold_out_of_train_and_test_on_validation(tiny_tfds):
    loaded = splits.load_splits("tfds:tiny_pictures", heldout_fraction=0.25, data_dir=tiny_tfds[0])
    assert (len(loaded.train), len(loaded.heldout), len(loaded.test)) == (9, 3, 6)
    assert loaded.num_classes == 3
    assert loaded.test[0]["key"].startswith("tiny_pictures/validation/")
    evaluated = take_eval(loaded.test, 4, augment.eval_transform("inception", (8, 8, 3)))
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


# Splits


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


def test_another_seed_holds_out_other_images():
    one, other = (splits.load_splits("digits", seed=seed).heldout for seed in (0, 1))
    assert keys(one) != keys(other)


@repeatable
@given(order=st.permutations(range(30)), fraction=st.floats(0.1, 0.9), seed=st.integers(0, 99))
def test_hold_out_does_not_depend_on_the_order(order, fraction, seed):
    source = numbered_source(30)
    expected = [keys(part) for part in splits.hold_out(source, fraction, seed)]
    shuffled = splits.subset(source, order)
    train, heldout = splits.hold_out(shuffled, fraction, seed)
    assert [keys(train), keys(heldout)] == expected
    assert np.bincount(heldout.labels).tolist() == [round(10 * fraction)] * 3


def test_a_larger_fraction_only_adds_to_the_held_out_images():
    source = numbered_source(60)
    small, large = (splits.hold_out(source, fraction, 0)[1] for fraction in (0.2, 0.5))
    assert keys(small) < keys(large)


def test_subset_of_a_subset_keeps_images_labels_and_keys_together():
    source = splits.subset(splits.subset(numbered_source(20), range(10, 20)), [3, 1])
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
        splits.hold_out(numbered_source(9), fraction, seed=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        splits.load_splits("digits", heldout_fraction=fraction)


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_hold_out_leaves_neither_part_empty(fraction):
    with pytest.raises(ValueError, match="both parts need at least one"):
        splits.hold_out(numbered_source(9), fraction, seed=0)


def test_unknown_dataset_names_the_choices():
    with pytest.raises(ValueError, match="'cifar10'; choose 'digits' or 'tfds:NAME'"):
        splits.load_splits("cifar10")


# Augmentations


@pytest.fixture(scope="module")
def photograph(data_dir):
    with np.load(data_dir / "eval_transform.npz") as archive:
        return dict(archive)


def test_eval_transform_equals_the_published_one(photograph):
    transform = augment.eval_transform("inception", (224, 224, 3))
    np.testing.assert_array_equal(transform(photograph["image"]), photograph["cropped"])


@repeatable
@given(
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    channels=st.sampled_from([1, 3]),
    name=st.sampled_from(["digits", "shift", "inception"]),
    seed=st.integers(0, 2**32),
)
def test_every_recipe_returns_its_image_shape(height, width, channels, name, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(256, size=(height, width, channels), dtype=np.uint8)
    for out in (
        augment.train_transform(name, (16, 16, 3))(image, rng),
        augment.eval_transform(name, (16, 16, 3))(image),
    ):
        assert out.shape == (16, 16, 3)
        assert out.dtype == np.uint8


@repeatable
@given(pixels=st.integers(0, 7), seed=st.integers(0, 2**32))
def test_shift_moves_whole_pixels_and_fills_with_zeros(pixels, seed):
    image = np.arange(1, 65, dtype=np.uint8).reshape(SHAPE)
    shifted = augment.shift(image, np.random.default_rng(seed), pixels)
    padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)))
    windows = [
        padded[y : y + 8, x : x + 8] for y in range(2 * pixels + 1) for x in range(2 * pixels + 1)
    ]
    assert any(np.array_equal(shifted, window) for window in windows)


def test_shift_reaches_every_offset():
    image = np.zeros((5, 5, 1), np.uint8)
    image[2, 2] = 1
    rng = np.random.default_rng(0)
    places = {tuple(np.argwhere(augment.shift(image, rng, 1))[0][:2]) for _ in range(200)}
    assert places == set(itertools.product((1, 2, 3), repeat=2))


class FixedRng:
    """Returns the given uniform numbers; 0.5 is the middle of every symmetric range."""

    def __init__(self, *numbers):
        self.numbers = np.array(numbers)

    def random(self, size):
        assert size == len(self.numbers)
        return self.numbers


def test_affine_with_nothing_to_do_is_the_identity(digits):
    image = digits.images[5]
    out = augment.affine(image, FixedRng(0.5, 0.5, 0.5, 0.5), 30, 2, (0.5, 1.5))
    np.testing.assert_array_equal(out, image)


def test_affine_turns_moves_and_scales_about_the_centre(digits):
    image = digits.images[5]
    quarter = augment.affine(image, FixedRng(1, 0.5, 0.5, 0.5), 90, 0, (1, 1))
    np.testing.assert_allclose(quarter.astype(int), np.rot90(image, k=-1), atol=1)
    moved = augment.affine(image, FixedRng(0.5, 0, 1, 0.5), 0, 2, (1, 1))
    np.testing.assert_array_equal(moved[:, 2:], image[:, :-2])
    assert not moved[:, :2].any()
    doubled = augment.affine(np.full(SHAPE, 9, np.uint8), FixedRng(0.5, 1, 0.5, 0.5), 0, 0, (1, 2))
    assert (doubled == 9).all()
    halved = augment.affine(np.full(SHAPE, 9, np.uint8), FixedRng(0.5, 0, 0.5, 0.5), 0, 0, (0.5, 1))
    assert (halved[2:6, 2:6] == 9).all()
    assert halved.sum() == 9 * 16


@repeatable
@given(seed=st.integers(0, 2**32), share=st.floats(0.2, 0.5), aspect=st.floats(0.6, 1.6))
def test_random_resized_crop_takes_a_box_of_the_asked_area_and_ratio(seed, share, aspect):
    # In a picture whose value is its column (row), the spread of values is the width (height).
    columns, rows = np.meshgrid(np.arange(60), np.arange(50))
    image = np.stack([columns, rows, rows], axis=-1).astype(np.uint8) * 4
    crop = augment.random_resized_crop(
        image, np.random.default_rng(seed), 64, (share, share), (aspect, aspect)
    )
    assert crop.shape == (64, 64, 3)
    width, height, _ = np.ptp(crop.astype(int), axis=(0, 1)) / 4 + 1
    area = share * 60 * 50
    assert abs(width - np.sqrt(area * aspect)) < 1.2
    assert abs(height - np.sqrt(area / aspect)) < 1.2


def test_random_resized_crop_draws_areas_ratios_and_places_over_their_ranges():
    columns, rows = np.meshgrid(np.arange(60), np.arange(60))
    image = np.stack([columns, rows, rows], axis=-1).astype(np.uint8) * 4
    rng = np.random.default_rng(0)
    crops = np.array([augment.random_resized_crop(image, rng, 64) for _ in range(300)], int)
    width, height = (np.ptp(crops, axis=(1, 2)) / 4 + 1)[:, :2].T
    share, aspect = width * height / 60**2, width / height
    assert 0.06 < share.min() < 0.15
    assert share.max() > 0.85
    assert 0.65 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.5
    assert abs(np.log(aspect).mean()) < 0.05
    centres = crops.mean(axis=(1, 2))[:, :2] / 4
    assert (centres.min(axis=0) < 18).all()
    assert (centres.max(axis=0) > 41).all()


def test_random_resized_crop_of_a_very_long_image_falls_back_to_its_centre():
    image = np.zeros((4, 400, 1), np.uint8)
    image[:, 198:202] = 200
    crop = augment.random_resized_crop(image, np.random.default_rng(0), 4, scale=(1.0, 1.0))
    assert crop[:, 1:3].min() > 100


def test_horizontal_flip_mirrors_half_of_the_images():
    image = np.arange(64, dtype=np.uint8).reshape(SHAPE)
    rng = np.random.default_rng(0)
    outs = [augment.horizontal_flip(image, rng) for _ in range(200)]
    flipped = sum(np.array_equal(out, image[:, ::-1]) for out in outs)
    kept = sum(np.array_equal(out, image) for out in outs)
    assert flipped + kept == 200
    assert 70 < flipped < 130


def test_grey_digits_fit_a_model_of_three_channels(digits):
    out = augment.eval_transform("digits", (32, 32, 3))(digits.images[0])
    expected = Image.fromarray(digits.images[0][..., 0]).resize((32, 32), Image.Resampling.BICUBIC)
    for channel in range(3):
        np.testing.assert_array_equal(out[..., channel], np.asarray(expected))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: augment.train_transform("cutout", SHAPE), "'cutout'; choose one of digits, shift"),
        (lambda: augment.eval_transform("cutout", SHAPE), "'cutout'; choose one of digits, shift"),
        (lambda: augment.train_transform("digits", SHAPE, degree=3), "did you mean 'degrees'"),
        (lambda: augment.eval_transform("digits", SHAPE, crop_pct=1), "accepted: none"),
        (lambda: augment.train_transform("digits", SHAPE, degrees=-3), "degrees .* got -3"),
        (lambda: augment.train_transform("digits", SHAPE, scale=(1.2, 0.8)), "scale must be"),
        (lambda: augment.train_transform("inception", SHAPE, scale=(0.1, 2)), "scale must be"),
        (lambda: augment.train_transform("inception", SHAPE, ratio=(0, 1)), "ratio must be"),
        (lambda: augment.eval_transform("inception", SHAPE, crop_pct=1.5), "crop_pct .* 1.5"),
        (lambda: augment.eval_transform("digits", (8, 9, 1)), "square"),
        (lambda: augment.shift(np.zeros(SHAPE, np.uint8), None, 8), r"0\.\.7 .* got 8"),
        (
            lambda: augment.eval_transform("digits", SHAPE)(np.zeros((8, 8, 3), np.uint8)),
            "does not fit a model of 1 input channels",
        ),
    ],
)
def test_augmentation_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Training batches


def test_train_batches_have_the_promised_shapes_and_types(digits):
    transform = augment.train_transform("digits", (16, 16, 3))
    (batch,) = take_train(digits, 1, 6, transform=transform, process_index=1, process_count=2)
    assert batch.keys() == {"image", "label"}
    assert (batch["image"].shape, batch["image"].dtype) == ((3, 16, 16, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((3,), np.int32)


@repeatable
@given(
    process_count=st.sampled_from([1, 2, 4]),
    start_step=st.integers(0, 12),
    seed=st.integers(0, 2**32),
    num_threads=st.integers(1, 3),
)
def test_local_batches_in_process_order_are_the_global_batch(
    process_count, start_step, seed, num_threads
):
    source = numbered_source(21)
    whole = take_train(source, start_step + 3, 8, seed)
    parts = [
        take_train(
            source,
            3,
            8,
            seed,
            start_step=start_step,
            process_index=i,
            process_count=process_count,
            num_threads=num_threads,
        )
        for i in range(process_count)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same_batches(joined, whole[start_step:])


def test_every_epoch_holds_each_image_once_in_a_new_order_with_new_augmentation():
    source = numbered_source(21)
    steps = take_train(source, 9, 7)
    images = np.concatenate([batch["image"] for batch in steps])
    labels = np.concatenate([batch["label"] for batch in steps])
    order, noise = images[:, 0, 0, 0].reshape(3, 21), images[:, -1, -1, 0].reshape(3, 21)
    np.testing.assert_array_equal(labels, order.reshape(-1) % 3)
    for epoch in order:
        assert sorted(epoch) == list(range(21))
    for one, other in itertools.combinations(range(3), 2):
        assert (order[one] != order[other]).any()
        same_image = noise[one][np.argsort(order[one])] == noise[other][np.argsort(order[other])]
        assert same_image.mean() < 0.2


def test_batches_run_across_the_end_of_an_epoch():
    steps = take_train(numbered_source(10), 5, 4)
    numbers = np.concatenate([batch["image"][:, 0, 0, 0] for batch in steps])
    assert Counter(numbers.tolist()) == dict.fromkeys(range(10), 2)


def test_another_seed_gives_another_order():
    one, other = (take_train(numbered_source(40), 1, 40, seed) for seed in (0, 1))
    assert (one[0]["label"] != other[0]["label"]).any()


def test_close_stops_the_threads(digits):
    def prefetch_threads():
        return {t for t in threading.enumerate() if t.name.startswith("grain-prefetch")}

    before = prefetch_threads()
    transform = augment.train_transform("digits", SHAPE)
    iterator = batches.train_batches(digits, transform, 32, seed=0, num_threads=2)
    next(iterator)
    started = prefetch_threads() - before
    assert started
    iterator.close()
    deadline = time.monotonic() + 10
    while any(thread.is_alive() for thread in started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "at least 1, got 0"),
        ({"batch_size": 10}, "batch_size 10 is larger than the 9 images"),
        ({"process_count": 3}, "8 is not a multiple of the 3 processes.*: 9"),
        ({"process_index": 2, "process_count": 2}, r"process_index 2 lies outside 0\.\.1"),
        ({"start_step": -1}, "start_step must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_train_batches_errors(arguments, message):
    arguments = {"batch_size": 8, "seed": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        batches.train_batches(numbered_source(9), AddNoise(), **arguments)


def test_a_transform_that_breaks_its_promise_is_refused_before_the_first_batch(monkeypatch):
    monkeypatch.setattr(AddNoise, "image_shape", (16, 16, 1))
    with pytest.raises(ValueError, match=r"\(8, 8, 1\), expected \(16, 16, 1\)"):
        batches.train_batches(numbered_source(9), AddNoise(), 8, seed=0)


# Evaluation batches


@repeatable
@given(size=st.integers(1, 20), batch_size=st.integers(1, 24))
def test_eval_batches_cover_every_image_once_in_order(size, batch_size):
    source = numbered_source(size)
    steps = take_eval(source, batch_size)
    assert len(steps) == -(-size // batch_size)
    joined = {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}
    assert len(joined["mask"]) == len(steps) * batch_size
    assert joined["mask"].tolist() == [1] * size + [0] * (len(steps) * batch_size - size)
    np.testing.assert_array_equal(joined["image"][:size], source.images)
    np.testing.assert_array_equal(joined["label"][:size], source.labels)
    assert not joined["image"][size:].any()
    assert not joined["label"][size:].any()
    dtypes = {name: array.dtype for name, array in joined.items()}
    assert dtypes == {"image": np.uint8, "label": np.int32, "mask": np.float32}


def test_eval_batches_errors(digits):
    transform = augment.eval_transform("digits", SHAPE)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        batches.eval_batches(digits, transform, 0)
    with pytest.raises(ValueError, match="no images"):
        batches.eval_batches(splits.subset(digits, []), transform, 8)
    colour = sources.ArraySource("colour", np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4), 1)
    with pytest.raises(ValueError, match="does not fit a model of 1 input channels"):
        batches.eval_batches(colour, transform, 2)
