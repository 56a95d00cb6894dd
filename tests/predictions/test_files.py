"""Writing and reading: folders that resist."""

import contextlib
import dataclasses
import itertools
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.data.normalize import Normalization
from flora_jax.data.sources import digits
from flora_jax.data.subsets import subset
from flora_jax.models import functional
from flora_jax.training.stored_predictions import (
    StoredPredictions,
    Teacher,
    describe,
    parts_to_write,
    write_predictions,
)
from tests.helpers.predictions import (
    AUGMENTATION,
    BATCH_SIZE,
    NORMALIZATION,
    PART,
    SEED,
    STEPS,
    a_model,
    batches,
    read_all,
    write,
)


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


@pytest.mark.parametrize(
    "field, value",
    [
        ("images", "abc"),
        ("num_images", 51),
        ("batch_size", 8),
        ("steps", 9),
        ("seed", 4),
        ("k", 5),
        ("num_classes", 11),
        ("teacher", "abc"),
        ("augmentation", AUGMENTATION | {"name": "shift"}),
    ],
)
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


def test_where_the_images_lie_does_not_matter(stored, description):
    moved = dataclasses.replace(description, dataset="folder:/mnt/digits")
    np.testing.assert_equal(
        StoredPredictions(stored, moved).read(3), StoredPredictions(stored, description).read(3)
    )
    assert not parts_to_write(stored, moved, 0, 1)


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


def test_writing_goes_on_with_the_same_number_of_processes(stored, description):
    with pytest.raises(ValueError, match="parts: 1 there, 2 now"):
        parts_to_write(stored, description, 0, 2)


def test_bad_processes_and_steps(stored, description, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size 16 cannot be shared by 3 processes; .*: 15"):
        StoredPredictions(stored, description, 0, 3)
    with pytest.raises(ValueError, match=r"process_index 2 lies outside 0\.\.1"):
        StoredPredictions(stored, description, 2, 2)
    with pytest.raises(ValueError, match=r"step 8 lies outside 0\.\.7"):
        StoredPredictions(stored, description).read(8)
    with pytest.raises(FileNotFoundError, match="no predictions are stored there"):
        StoredPredictions(tmp_path, description)


def test_a_missing_part_is_named(copy, description):
    (copy / PART).unlink()
    with pytest.raises(ValueError, match=rf"{PART} is missing"):
        StoredPredictions(copy, description)


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
