"""Folders of models and files: whole, damaged, and half-written."""

import json
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora_jax as flora
from flora_jax.errors import StorageError
from flora_jax.io.files import read_json, replacing, write_json
from flora_jax.io.json_lines import JsonLines, read_lines, read_records
from flora_jax.models import functional
from flora_jax.weights.folder import save_description_once

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def supernet(tiny_model, tiny_space):
    kept = tiny_space.keep([tiny_space.kept[0][:5], tiny_space.kept[1][[2, 7, 26]]])
    return flora.factorize(tiny_model, kept)


@pytest.fixture(scope="module")
def subnet(supernet):
    return flora.extract(supernet, [0, 1, 2, 1, 0, 1])


@pytest.fixture
def saved(tiny_model, tmp_path):
    flora.save(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def assert_same(ours, theirs):
    (structure, parameters), (wanted, values) = map(functional.split, (ours, theirs))
    assert structure == wanted
    assert parameters.keys() == values.keys()
    for name, value in parameters.items():
        np.testing.assert_array_equal(value, values[name], strict=True)


def test_supernet_comes_back_bit_for_bit(supernet, tmp_path):
    flora.save(supernet, tmp_path)
    again = flora.load(tmp_path)
    assert isinstance(again, flora.Supernet)
    assert again.space.spec == supernet.space.spec
    assert again.space.choices == supernet.space.choices
    for ours, theirs in zip(again.space.kept, supernet.space.kept, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert_same(again.network, supernet.network)


def test_saving_over_another_model(saved, subnet):
    flora.save(subnet, saved)
    assert_same(flora.load(saved), subnet)
    assert sorted(path.name for path in saved.iterdir()) == [WEIGHTS, "spec.json"]


def flip(at):
    def damage(content: bytes) -> bytes:
        content = bytearray(content)
        content[at] ^= 1
        return bytes(content)

    return damage


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        *((WEIGHTS, flip(at), "is damaged") for at in (0, 100, -1)),
        (WEIGHTS, lambda content: content[:-9], "is damaged"),
        ("spec.json", lambda content: content[:-9], "is not valid JSON"),
    ],
)
def test_damaged_files(saved, file, damage, message):
    (saved / file).write_bytes(damage((saved / file).read_bytes()))
    with pytest.raises(ValueError, match=f"{file} {message}"):
        flora.load(saved)


@pytest.mark.parametrize("field", ["format", "spec", "space", "sha256", None])
def test_descriptions_that_lack_a_field_or_are_newer(saved, field):
    description = read_json(saved / "spec.json")
    newer = description | {"format": 2}
    changed = {name: v for name, v in description.items() if name != field} if field else newer
    write_json(saved / "spec.json", changed)
    with pytest.raises(ValueError, match=field or "has format 2; this version reads 1"):
        flora.load(saved)


def test_not_a_model(tmp_path, saved):
    save_description_once(flora.load(saved), tmp_path / "another")
    for place, message in (
        (tmp_path / "nowhere", r"nowhere has no spec\.json: not a folder"),
        (tmp_path, r"saved model; inside it are another, model$"),
        (tmp_path / "another", "no checkpoint in"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            flora.load(place)


# --- files ---------------------------------------------------------------------------------------


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "sub" / "file"
    with replacing(path) as partial:
        partial.write_text("old")
        assert not path.exists()

    def write_and_fail():
        with replacing(path) as partial:
            partial.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_and_fail()
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_save_that_fails_keeps_the_old_model(saved, subnet, tiny_model, monkeypatch):
    files = sorted(saved.iterdir())
    monkeypatch.setattr("flora_jax.weights.folder.sha256", _fail)  # the weights are written
    with pytest.raises(OSError, match="disk full"):
        flora.save(subnet, saved)
    monkeypatch.undo()
    assert_same(flora.load(saved), tiny_model)
    assert sorted(saved.iterdir()) == files


def _fail(path):
    raise OSError("disk full")


# --- records, which survive an interruption at any byte -------------------------------------------

RECORDS = [{"step": step, "loss": 1 / (step + 1)} for step in range(6)]
WHOLE = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


@given(cut=st.integers(0, len(WHOLE)), durable=st.booleans())
def test_a_file_cut_anywhere_goes_on(cut, durable):
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "metrics.jsonl"
        path.write_bytes(WHOLE[:cut])
        done = read_records(path)
        assert done == RECORDS[: len(done)]
        assert len(done) == WHOLE[:cut].count(b"\n")
        with JsonLines(path, read_lines(path)) as lines:
            lines.append(RECORDS[len(done) :], durable=durable)
            assert path.read_bytes() == WHOLE  # also before it is closed


def test_no_file_has_no_records(tmp_path):
    assert read_lines(tmp_path / "none") == []
    with JsonLines(tmp_path / "folder/new"):
        pass
    assert (tmp_path / "folder/new").read_bytes() == b""
    with pytest.raises(StorageError, match="folder/new/metrics"):
        JsonLines(tmp_path / "folder/new/metrics.jsonl")


def test_json_in_the_encodings_that_editors_write(tmp_path):
    path, content = tmp_path / "classes.json", ["café", "été"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        path.write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
        assert read_json(path) == content
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="latin-1")
    with pytest.raises(ValueError, match=r"classes\.json is not valid JSON: save it as UTF-8"):
        read_json(path)
