"""Models written under timm's names, and read again."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import flora_jax as flora
from flora_jax.weights.export.timm import export_timm
from flora_jax.weights.pretrained import from_pretrained
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
    blocks = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]
    layers = [f"{b}.{layer}" for b in blocks for layer in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    shapes = zip(layers, subnets["swin"].spec.layers, subnets["swin"].spec.ranks, strict=True)
    for name, layer, rank in shapes:
        if rank is None:
            assert arrays[f"{name}.fc.weight"].shape == (layer.out_features, layer.in_features)
            assert f"{name}.fc.bias" in arrays
        else:
            assert arrays[f"{name}.VT.weight"].shape == (rank, layer.in_features)
            assert arrays[f"{name}.U.weight"].shape == (layer.out_features, rank)
            assert f"{name}.U.bias" in arrays
        assert f"{name}.weight" not in arrays
    assert "head.fc.weight" in arrays


def test_export_of_what_cannot_be(vit, tmp_path):
    supernet = flora.factorize(vit, flora.RankSpace.regular(VIT, ratios=(1 / 2, 1)))
    with pytest.raises(ValueError, match="a supernet holds many networks: extract one first"):
        export_timm(supernet, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.pth must end in \.safetensors"):
        export_timm(vit, tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []
