"""Models written under timm's names or for PyTorch, and read again."""

import os

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import flora_jax as flora
from flora_jax.errors import InputError, MissingFileError
from flora_jax.weights.export.timm import export_timm
from flora_jax.weights.pretrained import from_pretrained
from tests.helpers import modern
from tests.helpers.compressed import low_rank, slimmed
from tests.helpers.slimming import SHIFTED_SWIN, TINY, TINY_HYBRID, random_model
from tests.helpers.weights import VIT, assert_same


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "distilled", "no_qkv_bias", "swin", "tiny_vit"])
def test_export_and_back_is_exact(models, subnets, tmp_path, name):
    path = tmp_path / "exported.safetensors"
    for model in (models[name], subnets[name]):
        export_timm(model, path)
        assert_same(from_pretrained(path, model.spec), model)
        assert_same(from_pretrained(path, models[name].spec), model)  # takes the file's ranks
        with safe_open(path, "np") as file:
            assert file.metadata() == {"format": "pt"}
        assert {array.dtype for array in load_file(path).values()} == {np.dtype(np.float32)}


def test_names_of_an_exported_subnet(subnets, models, tmp_path, caplog):
    export_timm(models["swin"], tmp_path / "dense.safetensors")
    assert not caplog.text
    export_timm(subnets["swin"], tmp_path / "swin.safetensors")
    assert "timm cannot hold what is compressed" in caplog.text
    arrays = load_file(tmp_path / "swin.safetensors")
    shapes = {name: array.shape for name, array in arrays.items()}
    blocks = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]
    layers = [f"{b}.{layer}" for b in blocks for layer in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    spec = subnets["swin"].spec
    for name, layer, rank in zip(layers, spec.layers, spec.ranks, strict=True):
        sides = (layer.out_features, layer.in_features)
        expected = {"fc.weight": sides, "fc.bias": sides[:1]}
        if rank is not None:
            expected = {"VT.weight": (rank, sides[1]), "U.weight": (sides[0], rank)}
            expected["U.bias"] = sides[:1]
        found = {n.removeprefix(f"{name}."): s for n, s in shapes.items() if n.startswith(name)}
        assert found == expected
    assert "head.fc.weight" in arrays


def test_export_of_what_cannot_be(vit, tmp_path):
    supernet = flora.factorize(vit, flora.RankSpace.regular(VIT, ratios=(1 / 2, 1)))
    with pytest.raises(ValueError, match="a supernet holds many networks: extract one first"):
        export_timm(supernet, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.pth must end in \.safetensors"):
        export_timm(vit, tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["hf_dinov3", "timm_siglip_gap", "hf_clip"])
def test_a_folder_for_pytorch_loads_bit_for_bit(name, tmp_path, without_torch):
    model = low_rank(modern.model(name))
    flora.export_torch(model, tmp_path)
    assert_same(flora.load(tmp_path), model)
    assert flora.read_spec(tmp_path) == model.spec
    assert_same(flora.from_pretrained(tmp_path), model)


def test_compressed_folders_load_and_damaged_ones_do_not(tmp_path, without_torch):
    slim = (slimmed(spec) for spec in (flora.ViTSpec(depth=3, **TINY), TINY_HYBRID))
    for model in (*map(low_rank, slim), random_model(SHIFTED_SWIN)):
        folder = tmp_path / model.spec.family
        flora.export_torch(model, folder)
        assert_same(flora.load(folder), model)
    os.replace(tmp_path / "vit/model.safetensors", tmp_path / "swin/model.safetensors")
    with pytest.raises(InputError, match=r"holds other weights than spec\.json says: blocks\.0"):
        flora.load(tmp_path / "swin")
    with pytest.raises(MissingFileError, match="no checkpoint in"):
        flora.load(tmp_path / "vit")
