"""Folders of models: whole, damaged, and half-written."""

import json

import numpy as np
import pytest

import flora_jax as flora
from flora_jax.io.files import read_json, replacing, write_json
from flora_jax.models import functional
from flora_jax.weights.folder import describe, save_description_once

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


def assert_same_parameters(ours, theirs):
    (structure, parameters), (their_structure, their_parameters) = map(
        functional.split, (ours, theirs)
    )
    assert structure == their_structure
    assert parameters.keys() == their_parameters.keys()
    for name, value in parameters.items():
        assert value.dtype == their_parameters[name].dtype
        np.testing.assert_array_equal(value, their_parameters[name])


@pytest.mark.parametrize("name", ["tiny_model", "subnet"])
def test_model_comes_back_bit_for_bit(request, name, tmp_path):
    model = request.getfixturevalue(name)
    flora.save(model, tmp_path / "new" / "folder")
    again = flora.load(str(tmp_path / "new" / "folder"))
    assert again.spec == model.spec
    assert_same_parameters(again, model)


def test_supernet_comes_back_bit_for_bit(supernet, tmp_path):
    flora.save(supernet, tmp_path)
    again = flora.load(tmp_path)
    assert isinstance(again, flora.Supernet)
    assert again.space.spec == supernet.space.spec
    assert again.space.choices == supernet.space.choices
    for ours, theirs in zip(again.space.kept, supernet.space.kept, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert_same_parameters(again.network, supernet.network)


def test_saving_over_another_model(saved, subnet):
    flora.save(subnet, saved)
    assert_same_parameters(flora.load(saved), subnet)
    assert sorted(path.name for path in saved.iterdir()) == [WEIGHTS, "spec.json"]


@pytest.mark.parametrize("position", [0, 100, -1])
def test_flipped_bit(saved, position):
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[position] ^= 1
    (saved / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        flora.load(saved)


def test_truncated_weights(saved):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        flora.load(saved)


def test_truncated_description(saved):
    (saved / "spec.json").write_text((saved / "spec.json").read_text()[:-9])
    with pytest.raises(ValueError, match=r"spec\.json is not valid JSON"):
        flora.load(saved)


def test_newer_format(saved):
    write_json(saved / "spec.json", read_json(saved / "spec.json") | {"format": 2})
    with pytest.raises(ValueError, match="has format 2; this version reads 1"):
        flora.load(saved)


@pytest.mark.parametrize("field", ["format", "spec", "space", "sha256"])
def test_description_lacks_a_field(saved, field):
    description = read_json(saved / "spec.json")
    del description[field]
    write_json(saved / "spec.json", description)
    with pytest.raises(ValueError, match=field):
        flora.load(saved)


def test_not_a_model(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"nowhere has no spec\.json: not a folder"):
        flora.load(tmp_path / "nowhere")
    save_description_once(flora.load(saved), tmp_path / "another")
    with pytest.raises(FileNotFoundError, match=r"saved model; inside it are another, model$"):
        flora.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        flora.load(tmp_path / "another")


def test_description(supernet, subnet):
    for model, spec in ((supernet, supernet.space.spec), (subnet, subnet.spec)):
        description = json.loads(json.dumps(describe(model)))
        assert description["format"] == 1
        assert description["spec"]["embed_dim"] == spec.embed_dim
        assert (description["space"] is None) == (model is subnet)


# --- files ---------------------------------------------------------------------------------------


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "sub" / "file"
    with replacing(path) as partial:
        partial.write_text("old")
        assert not path.exists()
    assert path.read_text() == "old"

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
    assert_same_parameters(flora.load(saved), tiny_model)
    assert sorted(saved.iterdir()) == files


def _fail(path):
    raise OSError("disk full")


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"genes": [1, 2], "top1": 0.5})
    assert read_json(tmp_path / "a.json") == {"genes": [1, 2], "top1": 0.5}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")
