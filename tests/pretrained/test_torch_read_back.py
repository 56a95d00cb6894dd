"""Folders that were written for PyTorch, read back as models."""

import os

import pytest

import flora_jax as flora
from flora_jax.errors import InputError, MissingFileError
from tests.helpers import modern
from tests.helpers.compressed import low_rank, slimmed
from tests.helpers.slimming import SHIFTED_SWIN, TINY, TINY_HYBRID, random_model
from tests.helpers.weights import assert_same


@pytest.mark.parametrize("name", ["hf_dinov3", "timm_siglip_gap", "hf_clip"])
def test_an_export_loads_bit_for_bit(name, tmp_path, without_torch):
    model = low_rank(modern.model(name))
    flora.export_torch(model, tmp_path)
    assert_same(flora.load(tmp_path), model)
    assert flora.read_spec(tmp_path) == model.spec
    assert_same(flora.from_pretrained(tmp_path), model)


def test_other_exports_load_and_damaged_ones_do_not(tmp_path, without_torch):
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
