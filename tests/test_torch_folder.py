"""Models exported as folders that PyTorch runs: what they hold and compute, refusals."""

import ast
import dataclasses
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flora_jax as flora
from flora_jax.errors import InputError, StorageError
from flora_jax.io import files
from flora_jax.models import functional
from flora_jax.models.spec_json import spec_to_json
from flora_jax.weights.export import pytorch
from tests.helpers import modern
from tests.helpers.compressed import NETWORKS, TINY_VIT, low_rank, network
from tests.helpers.slimming import TINY_SWIN, random_model

FILES = ["model.py", "model.safetensors", "spec.json"]


def test_what_is_written_without_torch(tmp_path, without_torch, caplog):
    caplog.set_level(logging.INFO, "flora_jax")
    subnet = low_rank(random_model(flora.deit("tiny", image_size=64, depth=2)))
    flora.export_torch(subnet, tmp_path / "new" / "folder")
    assert "was not run to check it: pip install 'flora_jax[torch]'" in caplog.text
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    written = json.loads((folder / "spec.json").read_text())
    assert written == json.loads(json.dumps(spec_to_json(subnet.spec)))

    arrays = load_file(folder / "model.safetensors")
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    size = (folder / "model.safetensors").stat().st_size
    assert 1 < size / (4 * flora.num_params(subnet.spec)) < 1.02
    assert arrays["patch_embed.weight"].shape == (192, 3, 16, 16)
    for layer, rank in zip(subnet.spec.layers, subnet.spec.ranks, strict=True):
        shape = (layer.out_features, layer.in_features)
        if rank is None:
            assert arrays[f"{layer.name}.weight"].shape == shape
        else:
            factors = arrays[f"{layer.name}.up.weight"], arrays[f"{layer.name}.down.weight"]
            assert (factors[0] @ factors[1]).shape == shape
            assert factors[0].shape[1] == rank
            assert arrays[f"{layer.name}.up.bias"].shape == shape[:1]


def test_a_key_without_bias_has_zeros(tmp_path, without_torch):
    flora.export_torch(modern.model("hf_dinov3"), tmp_path)
    bias = load_file(tmp_path / "model.safetensors")["blocks.0.attn.qkv.bias"].reshape(3, -1)
    assert [row.any() for row in bias] == [True, False, True]


def test_the_code_is_one_file_that_needs_torch_and_safetensors(tmp_path, without_torch):
    flora.export_torch(random_model(TINY_VIT), tmp_path)
    code = (tmp_path / "model.py").read_text()
    imported = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "safetensors"}


def test_the_code_knows_what_a_spec_leaves_unsaid():
    torch = pytest.importorskip("torch", reason="imports the exported model")
    from flora_jax.weights.export import torch_networks

    assert issubclass(torch_networks.ViT, torch.nn.Module)
    unsaid = [*dataclasses.fields(flora.ViTSpec), *dataclasses.fields(flora.BlockSpec)]
    unsaid = {field.name: field.default for field in unsaid if "later" in field.metadata}
    needless = {"k_bias", "layer_scale"}  # the weights have it
    known = {name: value for name, value in vars(torch_networks.Spec).items() if name[0] != "_"}
    assert known == {name: value for name, value in unsaid.items() if name not in needless}


# --- what it computes -----------------------------------------------------------------------------


@pytest.fixture
def in_pytorch(tmp_path, monkeypatch):
    """A function: (model, images [B, H, W, C]) -> output and tokens of what is exported."""
    torch = pytest.importorskip("torch", reason="runs the exported model")
    monkeypatch.setattr(pytorch, "_check_computes_the_same", lambda *_: None)  # it is done here

    def run(model, images):
        flora.export_torch(model, tmp_path)
        network = pytorch.load_export(tmp_path)
        images = torch.tensor(images.transpose(0, 3, 1, 2))
        with torch.inference_mode():
            output, tokens = network(images).numpy(), network.features(images).numpy()
            assert_close(network(images[:1]).numpy(), output[:1])
            with pytest.raises(ValueError, match=r"images have shape \(.*\), not \(B, "):
                network(images[..., 1:])
        return output, tokens

    return run


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize("name", modern.SPECS)
def test_the_kinds_of_today(name, in_pytorch):
    output, tokens = in_pytorch(modern.model(name), modern.images(name))
    golden = modern.golden(name)
    if "output" not in golden and "pooled" not in golden:
        assert_close(output, golden["tokens"][:, 0])
    else:
        assert_close(output, golden["output" if "output" in golden else "pooled"])
    if "tokens" in golden and name != "hf_clip":  # there they are not normalised yet
        assert_close(tokens, golden["tokens"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_pytorch_computes_what_jax_does(name, in_pytorch):
    model, images, *expected = network(name)
    for actual, wanted in zip(in_pytorch(model, images), expected, strict=True):
        assert_close(actual, wanted)


ELSEWHERE = """
import json, sys
for name in ("jax", "jaxlib", "flax", "flora_jax", "numpy", "etils"):
    sys.modules[name] = None
from safetensors.torch import load_file
from model import load
print(json.dumps(load(".")(load_file("images")["images"]).tolist()))
"""


@pytest.mark.slow
def test_a_folder_runs_where_there_is_neither_jax_nor_numpy(tmp_path):
    pytest.importorskip("torch", reason="runs the exported model")
    model, images, expected, _ = network("slim, rotary")
    flora.export_torch(model, tmp_path)
    save_file({"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}, tmp_path / "images")
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-B", "-c", ELSEWHERE]
    options = {"check": True, "capture_output": True, "timeout": 120}
    done = subprocess.run(command, cwd=tmp_path, env=environment, **options)
    assert_close(np.array(json.loads(done.stdout)), expected)


# --- where it is written --------------------------------------------------------------------------


def test_an_earlier_export_is_replaced_and_what_is_beside_it_stays(tmp_path, without_torch):
    flora.export_torch(random_model(TINY_SWIN), tmp_path)
    (tmp_path / "preprocessing.json").write_text("{}")
    flora.export_torch(random_model(TINY_VIT), tmp_path)
    assert json.loads((tmp_path / "spec.json").read_text())["family"] == "vit"
    assert (tmp_path / "preprocessing.json").read_text() == "{}"


@pytest.mark.parametrize("number", range(3))
def test_an_export_that_stops_is_none_and_can_be_made_again(
    number, tiny_model, tmp_path, without_torch, monkeypatch
):
    flora.export_torch(tiny_model, tmp_path)
    written = []

    def stops(path):
        if len(written) == number:
            raise StorageError("the disk is full")
        written.append(path)
        return files.replacing(path)

    with monkeypatch.context() as patch:
        patch.setattr(pytorch, "replacing", stops)
        with pytest.raises(StorageError, match="disk is full"):
            flora.export_torch(tiny_model, tmp_path)
    assert not (tmp_path / "model.py").exists()
    flora.export_torch(tiny_model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_folders_that_hold_something_else(tiny_model, tmp_path, without_torch):
    (tmp_path / "mine.py").touch()
    with pytest.raises(InputError, match=r"holds mine\.py, and no earlier export: give an empty"):
        flora.export_torch(tiny_model, tmp_path)
    with pytest.raises(StorageError, match=r"writing .*mine\.py/folder/.* failed"):
        flora.export_torch(tiny_model, tmp_path / "mine.py" / "folder")
    flora.save(tiny_model, tmp_path / "saved")
    with pytest.raises(InputError, match=r"holds model\.safetensors, spec\.json, and no earlier"):
        flora.export_torch(tiny_model, tmp_path / "saved")
    assert flora.load(tmp_path / "saved").spec == tiny_model.spec
    (tmp_path / "cloned" / ".git").mkdir(parents=True)
    flora.export_torch(tiny_model, tmp_path / "cloned")


# --- models that cannot be exported ---------------------------------------------------------------


def test_models_that_cannot_be_exported(tiny_model, tiny_space, tmp_path):
    with pytest.raises(InputError, match="a supernet holds many networks: extract one first"):
        flora.export_torch(flora.factorize(tiny_model, tiny_space), tmp_path / "new")
    structure, parameters = functional.split(tiny_model)
    parameters["norm.scale"] = parameters["norm.scale"].at[0].set(np.nan)
    with pytest.raises(InputError, match=r"parameters that are NaN or infinite: norm\.scale"):
        flora.export_torch(functional.merge(structure, parameters), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_computes_something_else_is_refused(tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="runs the exported model")
    flora.export_torch(tiny_model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def wrong(parameters, spec):
        arrays = right(parameters, spec)
        return arrays | {"head.weight": arrays["head.weight"] * np.float32(1.001)}

    right = pytorch._state_dict
    monkeypatch.setattr(pytorch, "_state_dict", wrong)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(InputError, match=r"something else.*by \d.\de-0\d of the largest"):
            flora.export_torch(tiny_model, folder)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_images_to_compare_on(tiny_model, tiny_images, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        pytorch, "_check_computes_the_same", lambda model, files, images: seen.append(images)
    )
    flora.export_torch(tiny_model, tmp_path / "one", tiny_images)
    flora.export_torch(tiny_model, tmp_path / "two")
    assert seen[0] is tiny_images
    assert seen[1].shape == (2, 8, 8, 3)
    with pytest.raises(InputError, match=r"are float32 \(5, 8, 7, 3\); .* float32 \(B, 8, 8, 3\)"):
        flora.export_torch(tiny_model, tmp_path / "three", tiny_images[:, :, 1:])
    assert not (tmp_path / "three").exists()
