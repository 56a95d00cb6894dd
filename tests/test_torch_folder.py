"""Models exported as folders that PyTorch runs: what they compute, what is in them, refusals."""

import ast
import dataclasses
import functools
import json
import logging
import os
import subprocess
import sys

import jax
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
from tests.helpers.compressed import low_rank, slimmed
from tests.helpers.slimming import (
    SHIFTED_SWIN,
    TINY,
    TINY_HYBRID,
    TINY_SWIN,
    images_of,
    logits,
    random_model,
)

FILES = ["model.py", "model.safetensors", "spec.json"]
TINY_VIT = flora.ViTSpec(depth=3, **TINY)
KINDS = {
    "distilled": lambda: random_model(dataclasses.replace(TINY_VIT, distilled=True)),
    "no bias, grey": lambda: random_model(
        dataclasses.replace(TINY_VIT, qkv_bias=False, in_channels=1)
    ),
    "mean": lambda: random_model(dataclasses.replace(TINY_VIT, pool="mean")),
    "low rank, gated": lambda: low_rank(modern.model("timm_dinov3_swiglu")),
    "slim, tokens stay": lambda: slimmed(modern.shallow("timm_siglip_gap", 1)),
    "slim, rotary": lambda: slimmed(modern.shallow("hf_dinov3", 2)),
    "slim, registers": lambda: slimmed(modern.shallow("timm_dinov2_registers", 2)),
    "low rank on slim": lambda: low_rank(slimmed(TINY_VIT)),
    "swin, shifted": lambda: random_model(SHIFTED_SWIN),
    "swin, low rank on slim": lambda: low_rank(slimmed(TINY_SWIN)),
    "tiny_vit, low rank on slim": lambda: low_rank(
        slimmed(dataclasses.replace(TINY_HYBRID, num_classes=0, in_channels=1))
    ),
}


@pytest.fixture
def in_pytorch(tmp_path, monkeypatch):
    """A function: (model, images [B, H, W, C]) -> output and tokens of what is exported."""
    torch = pytest.importorskip("torch", reason="runs the exported model")
    monkeypatch.setattr(pytorch, "_check_computes_the_same", lambda *_: None)  # it is done here

    def run(model, images):
        flora.export_torch(model, tmp_path)
        network = pytorch._module_of(tmp_path / "model.py").load(tmp_path)
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
@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_computes_what_jax_does(kind, in_pytorch):
    model = KINDS[kind]()
    images = images_of(model.spec, 5)
    structure, parameters = functional.split(model)

    @jax.jit
    def forward(parameters):
        model = functional.merge(structure, parameters)
        return model(images), model.features(images)

    for actual, expected in zip(in_pytorch(model, images), forward(parameters), strict=True):
        assert_close(actual, np.asarray(expected))


ELSEWHERE = """
import sys
for name in ("jax", "jaxlib", "flax", "flora_jax", "numpy", "etils"):
    sys.modules[name] = None
import importlib
import json
from safetensors.torch import load_file
outputs = {}
for folder in sys.argv[1:]:
    sys.path[:0] = [folder]
    sys.modules.pop("model", None)
    model = importlib.import_module("model").load(folder)
    sys.path.remove(folder)
    outputs[folder] = model(load_file(f"{folder}/images")["images"]).tolist()
print(json.dumps(outputs))
"""


@pytest.mark.slow
def test_a_folder_runs_where_there_is_neither_jax_nor_numpy(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="runs the exported model")
    monkeypatch.setattr(pytorch, "_check_computes_the_same", lambda *_: None)
    expected = {}
    for model in (low_rank(modern.model("hf_dinov3")), random_model(TINY_SWIN)):
        images, folder = images_of(model.spec), tmp_path / model.spec.family
        flora.export_torch(model, folder)
        expected[folder.name] = np.asarray(logits(model, images))
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        save_file({"images": images}, folder / "images")
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-B", "-c", ELSEWHERE, *expected]
    run = functools.partial(subprocess.run, check=True, capture_output=True, timeout=120)
    for kind, output in json.loads(run(command, cwd=tmp_path, env=environment).stdout).items():
        assert_close(np.array(output), expected.pop(kind))
    assert not expected


# --- the files ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("spec", [TINY_VIT, TINY_SWIN, TINY_HYBRID], ids=lambda s: s.family)
def test_the_code_is_one_short_file_that_needs_torch_and_safetensors(spec, tmp_path, without_torch):
    flora.export_torch(random_model(spec), tmp_path)
    code = (tmp_path / "model.py").read_text()
    assert len(code.splitlines()) < 250
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
    from flora_jax.weights.export import torch_vit

    assert issubclass(torch_vit.ViT, torch.nn.Module)
    unsaid = [*dataclasses.fields(flora.ViTSpec), *dataclasses.fields(flora.BlockSpec)]
    unsaid = {field.name: field.default for field in unsaid if "later" in field.metadata}
    needless = {"k_bias", "layer_scale"}  # the weights have it
    known = {name: value for name, value in vars(torch_vit.Spec).items() if name[0] != "_"}
    assert known == {name: value for name, value in unsaid.items() if name not in needless}


# --- where it is written --------------------------------------------------------------------------


def test_an_earlier_export_is_replaced_and_what_is_beside_it_stays(tmp_path, without_torch):
    flora.export_torch(random_model(TINY_SWIN), tmp_path)
    (tmp_path / "preprocessing.json").write_text("{}")
    flora.export_torch(random_model(TINY_VIT), tmp_path)
    assert json.loads((tmp_path / "spec.json").read_text())["family"] == "vit"
    assert "class ViT" in (tmp_path / "model.py").read_text()
    assert (tmp_path / "preprocessing.json").read_text() == "{}"


@pytest.mark.parametrize("number", range(3))
def test_an_export_that_stops_is_none_and_can_be_made_again(
    number, tmp_path, without_torch, monkeypatch
):
    model = random_model(TINY_VIT)
    flora.export_torch(model, tmp_path)
    written = []

    def stops(path):
        if len(written) == number:
            raise StorageError("the disk is full")
        written.append(path)
        return files.replacing(path)

    with monkeypatch.context() as patch:
        patch.setattr(pytorch, "replacing", stops)
        with pytest.raises(StorageError, match="disk is full"):
            flora.export_torch(model, tmp_path)
    assert not (tmp_path / "model.py").exists()
    flora.export_torch(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_folders_that_hold_something_else(tiny_model, tmp_path, without_torch):
    (tmp_path / "mine.py").touch()
    with pytest.raises(InputError, match=r"holds mine\.py, and no earlier export: give an empty"):
        flora.export_torch(tiny_model, tmp_path)
    with pytest.raises(InputError, match=r"mine\.py is a file, where a folder is to be written"):
        flora.export_torch(tiny_model, tmp_path / "mine.py" / "folder")
    flora.save(tiny_model, tmp_path / "saved")
    with pytest.raises(InputError, match=r"holds model\.safetensors, spec\.json, and no earlier"):
        flora.export_torch(tiny_model, tmp_path / "saved")
    assert flora.load(tmp_path / "saved").spec == tiny_model.spec
    (tmp_path / "cloned" / ".git").mkdir(parents=True)
    flora.export_torch(tiny_model, tmp_path / "cloned")


def test_a_folder_without_permission(tiny_model, tmp_path, without_torch, monkeypatch):
    monkeypatch.setattr(pytorch.os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match="cannot be written: no permission"):
        flora.export_torch(tiny_model, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


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
