"""Files and values that are not read: refused by name, with what is accepted."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import flora_jax as flora
from flora_jax.commands.classifier import spec_as_used
from flora_jax.data.preprocessing import Preprocessing
from flora_jax.errors import InputError, MissingFileError
from flora_jax.weights.metadata.spec import read_spec, spec_of_config
from flora_jax.weights.pretrained import from_pretrained
from tests.helpers import modern
from tests.helpers.weights import VIT
from tests.pretrained.test_beside import HUGGING_FACE_SWIN, HUGGING_FACE_VIT, TIMM_SWIN, TIMM_VIT


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not a vision transformer .*: accepted are vit, deit, "),
        ({"model_type": "dinov4_vit"}, "did you mean 'dinov3_vit'"),
        ({"_class_name": "UNet2DConditionModel"}, "model_type 'None' is not"),
        ({"architecture": "convnext_tiny.in12k"}, "'convnext_tiny' is not .* accepted of timm are"),
        ({"architecture": "vit_bse_patch16_224"}, "unknown size of vit 'bse'.*mean 'base'"),
        (TIMM_VIT | {"model_args": {"dpeth": 3}}, "model_args of .* have dpeth"),
    ],
)
def test_configs_of_other_networks(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"w": np.zeros(2)}, tmp_path / "model.safetensors")
    for read in (read_spec, from_pretrained):
        with pytest.raises(InputError, match=rf"config\.json: .*{message}"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (HUGGING_FACE_VIT, {"hidden_size": "8"}, "hidden_size must be a whole number of.*got '8'"),
        (HUGGING_FACE_VIT, {"layer_norm_eps": [1e-6]}, "layer_norm_eps must be a number"),
        (HUGGING_FACE_VIT, {"qkv_bias": "false"}, "qkv_bias must be true or false"),
        (HUGGING_FACE_SWIN, {"depths": 2}, "depths must be a list, each a whole number"),
        ({"model_type": "siglip", "vision_config": "large"}, {}, "vision_config must be an object"),
        (TIMM_VIT, {"model_args": {"patch_size": [2, 4]}}, "patch_size must be the side of a squ"),
        (TIMM_VIT, {"pretrained_cfg": {"input_size": 12}}, r"pretrained_cfg\.input_size must be"),
    ],
)
def test_values_of_another_kind_name_file_and_key(tmp_path, config, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        read_spec(tmp_path)


def places_in(config, at=()):
    for key, value in config.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from places_in(value, (*at, key))


@pytest.mark.parametrize("odd", [None, "8", [], [[1]], {"a": 1}, True, -1, 0, 1.5, float("nan")])
def test_no_value_anywhere_is_a_fault_of_ours(odd):
    configs = [HUGGING_FACE_VIT, HUGGING_FACE_SWIN, TIMM_VIT, TIMM_SWIN]
    configs += [modern.config(n)["config"] for n in modern.SPECS if n.startswith("hf")]
    refused = 0
    for config in configs:
        for *parents, key in places_in(config):
            changed = inner = json.loads(json.dumps(config))
            for parent in parents:
                inner = inner[parent]
            inner[key] = odd
            try:
                spec_of_config(changed)
            except InputError:
                refused += 1
    assert refused > 3 or odd is None


@pytest.mark.parametrize(
    "config",
    [
        HUGGING_FACE_VIT | {"image_size": 384, "patch_size": 14},
        {"architecture": "vit_so400m_patch14_siglip_384", "num_classes": 0},
    ],
    ids=["hugging_face", "timm"],
)
def test_pixels_that_fill_no_patch_are_left_out(config):
    spec = spec_of_config(config)
    assert (spec.image_size, spec.patch_size) == (378, 14)


def test_pictures_are_prepared_at_whole_patches(tmp_path):
    flora.save(flora.create(VIT), tmp_path)
    preprocessing = Preprocessing(VIT.image_size + VIT.patch_size + 1)
    assert spec_as_used(tmp_path, preprocessing).image_size == VIT.image_size + VIT.patch_size


def test_folders_without_weights_say_what_they_hold(tmp_path):
    for read in (from_pretrained, read_spec):
        with pytest.raises(MissingFileError, match=r"has no .*spec\.json"):
            read(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(MissingFileError, match=r"found adapter_model\.safetensors$"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q4.gguf", b"GGUF", r"is no file of weights: its name must end in \.safetensors, \.pth"),
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
        ("m.pth", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
    ],
)
def test_files_of_other_kinds(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}:? .*{message}"):
        from_pretrained(tmp_path / name, VIT)
