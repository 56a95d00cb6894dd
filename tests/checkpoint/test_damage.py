"""Real faults on the files of real checkpoints."""

import logging
import shutil

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.io.checkpoint import Checkpoints, read_parameters, verify
from flora_jax.io.files import read_json
from tests.helpers.checkpoints import assert_same, files, names, restored_step, state_at
from tests.helpers.files import flip_a_bit, largest_file


def _flip_a_bit(run):
    path = largest_file(run / "6")
    flip_a_bit(path)
    return f"{path} is altered"


def _truncate(run):
    path = largest_file(run / "6")
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path} is altered"


def _delete_a_file(run):
    path = largest_file(run / "6")
    path.unlink()
    return f"only in one of {run / '6'} and"


def _add_a_file(run):
    (run / "6" / "state" / "extra").write_text("")
    return "state/extra"


def _delete_the_manifest(run):
    """As a run leaves it that is killed between the step and its manifest."""
    (run / "manifests" / "6.json").unlink()
    return "6.json is missing, so writing was not finished"


def _manifest(change, reason):
    """A fault that writes what `change` makes of the bytes of the manifest."""

    def fault(run):
        path = run / "manifests" / "6.json"
        path.write_bytes(change(path.read_bytes()))
        return reason

    return fault


FAULTS = {
    "flipped bit": _flip_a_bit,
    "truncated file": _truncate,
    "file missing": _delete_a_file,
    "file too many": _add_a_file,
    "no manifest": _delete_the_manifest,
    "cut manifest": _manifest(lambda text: text[:-9], "6.json is not valid JSON"),
    "no text": _manifest(lambda text: b"\xff\x00\xfe", "can't decode byte"),
    "list": _manifest(lambda text: b"[1, 2]", "6.json is not a manifest"),
    "another entry": _manifest(lambda t: t.replace(b"sha256", b"sha255", 1), "is altered"),
    "leaves the folder": _manifest(
        lambda text: text.replace(b"_CHECK", b"../3/_CHECK"), "../3/_CHECKPOINT_METADATA"
    ),
    "absolute path": _manifest(
        lambda text: text.replace(b"_CHECK", b"/6/_CHECK"), "/6/_CHECKPOINT_METADATA"
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_from_the_step_before_a_damaged_one(run, fault, caplog):
    reason = FAULTS[fault](run)
    damaged = files(run / "6")
    assert restored_step(run) == 3
    (record,) = [r for r in caplog.records if r.name.startswith("flora_jax")]
    moved = run / "damaged" / "6-0"
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"step 6 is damaged and moved to {moved}: ")
    assert reason in record.message
    assert reason in (run / "damaged" / "6-0.txt").read_text()
    assert files(moved) == {moved / p.relative_to(run / "6"): b for p, b in damaged.items()}
    assert names(run) == ["3", "damaged", "manifests"]
    with Checkpoints(run) as checkpoints:
        checkpoints.restore(state_at(0))
        checkpoints.save(6, state_at(6))
    assert restored_step(run) == 6


@pytest.mark.parametrize("fault", FAULTS)
def test_reading_parameters_passes_over_a_damaged_step_and_changes_nothing(run, fault, caplog):
    reason = FAULTS[fault](run)
    before = files(run)
    assert_same(read_parameters(run), state_at(3).parameters)
    (record,) = [r for r in caplog.records if r.name.startswith("flora_jax")]
    assert record.message.startswith("read step 3, since newer ones are damaged: ")
    assert reason in record.message
    assert files(run) == before


@settings(max_examples=200)
@given(data=st.data())
def test_no_flipped_bit_passes(saved, data):
    """In any file of a step, at any place."""
    folder, manifest = epath.Path(saved / "6"), epath.Path(saved / "manifests" / "6.json")
    path = data.draw(
        st.sampled_from(sorted(p for p, content in files(saved / "6").items() if content))
    )
    content = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    try:
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=f"{path.name} is altered"):
            verify(folder, manifest)
    finally:
        path.write_bytes(content)
    verify(folder, manifest)


def test_a_manifest_lists_every_file(saved):
    content = files(saved / "6")
    manifest = read_json(saved / "manifests" / "6.json")
    assert manifest.keys() == {str(path.relative_to(saved / "6")) for path in content}
    assert [manifest[name]["bytes"] for name in sorted(manifest)] == [
        len(content[path]) for path in sorted(content, key=lambda p: str(p.relative_to(saved)))
    ]


@pytest.mark.parametrize("name", ["9", "009"])
def test_an_empty_folder_is_no_step(run, name):
    (run / name).mkdir()
    assert_same(read_parameters(run), state_at(6).parameters)
    assert restored_step(run) == 6
    assert names(run / "damaged") == [f"{name}-0", f"{name}-0.txt"]


def test_other_folders_are_left_alone(run):
    for name in ("notes", "9.old", "-9", "²"):
        (run / name).mkdir()
    before = names(run)
    assert restored_step(run) == 6
    assert names(run) == before


def test_a_half_written_step_is_removed(run):
    half = run / "9.orbax-checkpoint-tmp"
    shutil.copytree(run / "6", half)
    (half / "_CHECKPOINT_METADATA").unlink()
    assert_same(read_parameters(run), state_at(6).parameters)
    assert half.exists()
    assert restored_step(run) == 6
    assert names(run) == ["3", "6", "manifests"]


def test_no_step_is_whole(run, caplog):
    for step in ("3", "6"):
        (run / step / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(ValueError, match=r"every checkpoint in .*run is damaged: .*/6/.*; .*/3/"):
        read_parameters(run)
    state = state_at(0)
    with Checkpoints(run) as checkpoints:
        assert checkpoints.restore(state) is state
        checkpoints.save(3, state_at(3))
    *_, last = [r for r in caplog.records if r.name.startswith("flora_jax")]
    assert last.levelno == logging.ERROR
    assert last.message.endswith(f"the damaged ones are in {run / 'damaged'}")
    assert names(run / "damaged") == ["3-0", "3-0.txt", "6-0", "6-0.txt"]
    assert restored_step(run) == 3


def test_a_step_damaged_twice(run):
    for _ in range(2):
        _delete_a_file(run)
        assert restored_step(run) == 3
        with Checkpoints(run) as checkpoints:
            checkpoints.save(6, state_at(6))
    assert names(run / "damaged") == ["6-0", "6-0.txt", "6-1", "6-1.txt"]
