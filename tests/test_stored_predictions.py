"""Stored predictions: folders that resist, records, and training as with the teacher."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_jax as flora
from flora_jax.cluster.mesh import make_mesh, shard_batch
from flora_jax.data.augment import Augmentation
from flora_jax.data.batches import train_batches
from flora_jax.data.normalize import Normalization
from flora_jax.data.sources import digits
from flora_jax.data.subsets import subset
from flora_jax.models import functional
from flora_jax.training.settings import TrainSettings
from flora_jax.training.step import initial_state, make_step, soft_targets
from flora_jax.training.stored_predictions import (
    Description,
    StoredPredictions,
    Teacher,
    compare_predictions,
    describe,
    parts_to_write,
    write_predictions,
)

SPEC = flora.ViTSpec(
    image_size=8, patch_size=4, in_channels=1, embed_dim=8, depth=1, num_heads=2, num_classes=10
)
NORMALIZATION = Normalization((0.5,), (0.5,))
AUGMENTATION = {"name": "digits", "image_shape": SPEC.image_shape, "scale": (0.9, 1.1)}
BATCH_SIZE, STEPS, SEED = 16, 8, 3
SOURCE = subset(digits(), range(50))  # epochs of 4, 3 and 1 steps
PART = "epoch_0001.part_000_of_001.bin"


def a_model(seed):
    """Scaled up, so that its predictions are not all alike."""
    structure, parameters = functional.split(flora.create(SPEC, seed))
    return functional.merge(structure, {name: 2 * p for name, p in parameters.items()})


def a_description(teacher, **changes):
    fields = {"batch_size": BATCH_SIZE, "steps": STEPS, "seed": SEED, "k": 4, **changes}
    return describe("digits", SOURCE, teacher, augmentation=AUGMENTATION, **fields)


def batches(start, *process):
    transform = Augmentation("digits", {"scale": (0.9, 1.1)}).train(SPEC.image_shape)
    return train_batches(SOURCE, transform, BATCH_SIZE, SEED, start, *process)


def first_batches(steps=STEPS, start=0):
    with contextlib.closing(batches(start)) as stream:
        return list(itertools.islice(stream, steps))


def write(folder, description, teacher, processes=1):
    for index in range(processes):

        def share(start, index=index):
            return batches(start, index, processes)

        write_predictions(folder, description, teacher, share, index, processes)


def read_all(folder, description, *process):
    reader = StoredPredictions(folder, description, *process)
    return [reader.read(step) for step in range(description.steps)]


@pytest.fixture(scope="module")
def teacher():
    return Teacher(a_model(seed=1), NORMALIZATION)


@pytest.fixture(scope="module")
def description(teacher):
    return a_description(teacher)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, description, teacher):
    """A finished folder. Tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("stored")
    write(folder, description, teacher)
    return folder


@pytest.fixture
def copy(stored, tmp_path):
    return shutil.copytree(stored, tmp_path / "copy")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusing(start):
    raise AssertionError("nothing was left to write")


@pytest.mark.parametrize("processes, readers", [(2, 1), (2, 2), (2, 8), (8, 2)])
def test_any_number_of_processes_reads(stored, description, teacher, tmp_path, processes, readers):
    write(tmp_path, description, teacher, processes)
    assert len(list(tmp_path.glob("*.bin"))) == 3 * processes
    shares = [read_all(tmp_path, description, index, readers) for index in range(readers)]
    for whole, *parts in zip(read_all(stored, description), *shares, strict=True):
        for name, value in whole.items():
            joined = np.concatenate([part[name] for part in parts])
            if name == "target_index":
                np.testing.assert_array_equal(joined, value)
            else:  # a matrix product may round by the size of the batch
                np.testing.assert_allclose(joined, value, atol=1e-3)


@pytest.mark.parametrize("kept", [0, 1, 256, 300, 3 * 256 - 1])
def test_a_truncated_file_goes_on_from_its_last_whole_block(
    copy, stored, description, teacher, kept
):
    (copy / PART).write_bytes((stored / PART).read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{PART} is missing or not complete"):
        StoredPredictions(copy, description)
    starts = []

    def counted(start):
        starts.append(start)
        return batches(start)

    write_predictions(copy, description, teacher, counted)
    assert starts == [4 + kept // 256]
    assert content(copy) == content(stored)


def test_an_interrupted_run_goes_on(tmp_path, stored, description, teacher):
    def stopping(start):
        stream = batches(start)
        with contextlib.closing(stream):
            yield from itertools.islice(stream, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(tmp_path, description, teacher, stopping)
    assert not list(tmp_path.glob("*.sha256"))
    write(tmp_path, description, teacher)
    assert content(tmp_path) == content(stored)


def test_a_finished_folder_is_left_alone(copy, stored, description, teacher):
    write_predictions(copy, description, teacher, refusing)
    (copy / f"{PART}.sha256").unlink()  # stopped just before
    write_predictions(copy, description, teacher, batches)
    assert content(copy) == content(stored)


def test_a_flipped_bit_is_detected_and_only_that_file_written_anew(
    copy, stored, description, teacher
):
    damaged = bytearray((copy / PART).read_bytes())
    damaged[400] ^= 4
    (copy / PART).write_bytes(damaged)
    reader = StoredPredictions(copy, description)
    reader.read(3)
    with pytest.raises(ValueError, match=rf"{PART} is damaged: its checksum .* delete it"):
        reader.read(4)
    (copy / PART).unlink()
    write(copy, description, teacher)
    assert content(copy) == content(stored)


OTHER = {"images": "abc", "steps": 9, "seed": 4, "k": 5, "num_classes": 11, "teacher": "abc"}
OTHER["augmentation"] = AUGMENTATION | {"name": "shift"}


@pytest.mark.parametrize("field, value", OTHER.items(), ids=OTHER)
def test_other_predictions_are_refused(stored, description, field, value):
    other = dataclasses.replace(description, **{field: value})
    there, name = description.to_json()[field], field
    if field == "augmentation":
        there, value, name = there["name"], value["name"], f"{field}.name"
    before = content(stored)
    for opening in (
        lambda: StoredPredictions(stored, other),
        lambda: parts_to_write(stored, other, 0, 1),
    ):
        with pytest.raises(ValueError, match="holds other predictions") as caught:
            opening()
        assert f"{name}: {there!r} there, {value!r} now" in str(caught.value)
    assert content(stored) == before
    moved = dataclasses.replace(description, dataset="folder:/mnt/digits")
    assert not parts_to_write(stored, moved, 0, 1)  # where the images lie does not matter


def test_another_teacher_or_other_images_make_another_description(teacher, description):
    for other in (
        Teacher(a_model(seed=2), NORMALIZATION),
        Teacher(a_model(seed=1), Normalization((0.4,), (0.5,))),
        Teacher(a_model(seed=1), NORMALIZATION, "bfloat16"),
    ):
        assert other.checksum != teacher.checksum
    assert Teacher(a_model(seed=1), NORMALIZATION).checksum == teacher.checksum
    shifted = subset(digits(), range(1, 51))
    fields = {"batch_size": BATCH_SIZE, "steps": STEPS, "seed": SEED, "augmentation": {}}
    assert describe("digits", shifted, teacher, **fields).images != description.images


def test_bad_processes_and_steps(stored, description, tmp_path):
    with pytest.raises(ValueError, match="parts: 1 there, 2 now"):
        parts_to_write(stored, description, 0, 2)
    with pytest.raises(ValueError, match=r"batch_size 16 cannot be shared by 3 processes; .*: 15"):
        StoredPredictions(stored, description, 0, 3)
    with pytest.raises(ValueError, match=r"step 8 lies outside 0\.\.7"):
        StoredPredictions(stored, description).read(8)
    with pytest.raises(FileNotFoundError, match="no predictions are stored there"):
        StoredPredictions(tmp_path, description)


def test_a_full_disk_is_an_error_before_the_work(tmp_path, copy, description, monkeypatch, caplog):
    stored_size = (copy / PART).stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=stored_size))
    with pytest.raises(ValueError, match=r"still to write, but .* free; a smaller k"):
        parts_to_write(tmp_path / "new", description, 0, 1)
    (copy / PART).unlink()
    with caplog.at_level("INFO"):
        assert len(parts_to_write(copy, description, 0, 1)) == 1  # what is there needs no room
    assert "predictions of 8 steps take 2.05e-06 GB" in caplog.text


def test_a_teacher_that_diverged_is_refused(tmp_path, description):
    structure, parameters = functional.split(a_model(seed=1))
    broken = functional.merge(structure, {name: p * jnp.nan for name, p in parameters.items()})
    with pytest.raises(ValueError, match="predictions at step 0 are not finite"):
        write(tmp_path, description, Teacher(broken, NORMALIZATION))


# --- the records, and the description of them -----------------------------------------------------


def test_records_are_the_top_classes_of_each_augmented_image(stored, description, teacher):
    for batch, record in zip(first_batches(), read_all(stored, description), strict=True):
        probs, index = record["target_probs"], record["target_index"]
        assert probs.dtype == np.float16
        assert index.dtype == np.int16
        wanted = np.asarray(teacher(batch["image"]))
        order = np.argsort(-wanted, axis=-1)[:, :4]
        np.testing.assert_array_equal(index, order)
        np.testing.assert_array_equal(
            probs, np.take_along_axis(wanted, order, -1).astype(np.float16)
        )


def test_a_file_holds_the_steps_that_begin_in_its_epoch(stored, description):
    epochs = [description.steps_of(epoch) for epoch in range(3)]
    assert epochs == [range(4), range(4, 7), range(7, 8)]
    sizes = [path.stat().st_size for path in sorted(stored.glob("*.bin"))]
    assert sizes == [steps * BATCH_SIZE * 4 * 4 for steps in (4, 3, 1)]
    assert description.num_bytes == sum(sizes)
    meta = json.loads((stored / "meta.json").read_text())
    assert meta["parts"] == 1
    assert meta["augmentation"]["scale"] == [0.9, 1.1]
    checksum, name = (stored / f"{PART}.sha256").read_text().split()
    assert (checksum, name) == (hashlib.sha256((stored / PART).read_bytes()).hexdigest(), PART)


@given(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.integers(1, 60),
)
def test_every_step_lies_in_one_epoch(images_and_batch, steps):
    num_images, batch_size = images_and_batch
    description = dataclasses.replace(
        IMAGENET, num_images=num_images, batch_size=batch_size, steps=steps
    )
    epochs = [description.steps_of(epoch) for epoch in range(description.num_epochs)]
    assert list(itertools.chain(*epochs)) == list(range(steps))
    for epoch, its_steps in enumerate(epochs):
        assert {description.epoch_of(step) for step in its_steps} == {epoch}


_NUMBERS = {"num_images": 1_281_167, "batch_size": 1024, "steps": 1252, "seed": 0, "k": 100}
_OF = {"dataset": "imagenet", "images": "", "teacher": "", "augmentation": {}}
IMAGENET = Description(num_classes=1000, **_NUMBERS, **_OF)


def test_size_of_imagenet():
    assert IMAGENET.num_bytes == 1252 * 1024 * 400
    for num_classes, dtype in ((32767, np.int16), (65536, np.uint16)):
        description = dataclasses.replace(IMAGENET, num_classes=num_classes)
        assert description.record["index"].base == dtype
        assert description.num_bytes == IMAGENET.num_bytes
    for field, value in {"k": 1001, "num_classes": 65537, "batch_size": 1_281_168}.items():
        with pytest.raises(ValueError, match=rf"{field} must be in 1\.\.\d+, got {value}"):
            dataclasses.replace(IMAGENET, **{field: value})


def loss(batch, teacher_model=None, accumulate=1):
    recipe = TrainSettings(
        steps=STEPS, batch_size=BATCH_SIZE, learning_rate=1e-3, accumulate=accumulate
    )
    structure, parameters = functional.split(a_model(seed=2))
    teacher = functional.split(teacher_model) if teacher_model else (None, None)
    step = make_step(structure, recipe, NORMALIZATION, make_mesh(), teacher[0])
    batch = shard_batch(batch, make_mesh())
    return np.asarray(
        step(initial_state(structure, parameters, recipe), batch, None, teacher[1])[1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_is_that_of_the_teacher_at_hand(tmp_path, teacher, accumulate):
    """Of a whole prediction: k = 100 is more than there are classes."""
    description = a_description(teacher, k=100, steps=5)
    assert description.k == 10
    write(tmp_path, description, teacher)
    start = 3  # in the first epoch; step 4 is in the next
    reader = StoredPredictions(tmp_path, description)
    with contextlib.closing(reader.attach(batches(start), start)) as attached:
        pairs = list(zip(first_batches(2, start), itertools.islice(attached, 2), strict=True))
    for batch, with_targets in pairs:
        np.testing.assert_array_equal(batch["image"], with_targets["image"])
        wanted = loss(batch, a_model(seed=1))
        np.testing.assert_allclose(loss(with_targets, None, accumulate), wanted, rtol=1e-3)
        assert abs(loss(batch)[0] / wanted[0] - 1) > 1e-2  # the labels teach something else


@pytest.mark.slow
@given(st.data())
@settings(max_examples=30)
def test_soft_targets(data):
    """Against numpy in float64, for predictions from flat to certain."""
    num_classes = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, num_classes))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    logits = data.draw(st.sampled_from([0, 1, 30])) * rng.normal(size=(3, num_classes))
    exact = np.exp(logits - logits.max(-1, keepdims=True))
    exact /= exact.sum(-1, keepdims=True)
    index = np.argsort(-exact, -1)[:, :k].astype(np.int16)
    probs = np.take_along_axis(exact, index.astype(int), -1).astype(np.float16)

    targets = np.asarray(soft_targets(probs, index, num_classes))
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
    for row, p, i in zip(targets, np.float64(probs), index, strict=True):
        np.testing.assert_allclose(row[i], p, rtol=2e-3)
        others = np.delete(row, i)
        np.testing.assert_allclose(others, max(0, 1 - p.sum()) / max(1, others.size), atol=1e-6)


def test_comparison_with_a_fresh_pass(stored, description, teacher):
    with contextlib.closing(StoredPredictions(stored, description).attach(batches(0))) as stream:
        attached = list(itertools.islice(stream, 3))
    largest, mean = compare_predictions(teacher, attached)
    assert 0 < mean < largest <= 2.5e-4
    other = compare_predictions(Teacher(a_model(seed=2), NORMALIZATION), attached)
    assert other.largest > 0.1
    assert other.mean > 0.01
    with pytest.raises(ValueError, match="no batch to compare"):
        compare_predictions(teacher, [])
    with pytest.raises(ValueError, match="a teacher or stored predictions, not both"):
        loss(attached[0], a_model(seed=5))
