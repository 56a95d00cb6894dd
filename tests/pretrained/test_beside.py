"""What spec.json or config.json beside the weights says, held against the spec."""

import dataclasses
import json
import logging

import pytest
from safetensors.numpy import save_file

import flora_jax as flora
from flora_jax.weights import layouts
from flora_jax.weights.beside import check_description
from flora_jax.weights.pretrained import from_pretrained
from tests.helpers.weights import SWIN, VIT, assert_same, written

HUGGING_FACE_VIT = {
    "model_type": "deit", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "hidden_act": "gelu_python", "layer_norm_eps": 1e-6,
    "image_size": [12, 12], "patch_size": 4, "num_channels": 2, "qkv_bias": True,
    "id2label": {"0": "cat"},
}  # fmt: skip
HUGGING_FACE_SWIN = {
    "model_type": "swin", "embed_dim": 6, "depths": [2, 1], "num_heads": [2, 3], "mlp_ratio": 4.0,
    "window_size": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "image_size": 16,
    "patch_size": 2, "num_channels": 3, "use_absolute_embeddings": False, "hidden_size": 12,
}  # fmt: skip
CLIP = HUGGING_FACE_VIT | {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
TIMM_VIT = {
    "architecture": "vit_tiny_patch4_12", "num_features": 8, "global_pool": "token",
    "num_classes": 9, "pretrained_cfg": {"input_size": [2, 12, 12]},
    "model_args": {"embed_dim": 8, "depth": 2, "num_heads": 2, "in_chans": 2},
}  # fmt: skip
TIMM_SWIN = {
    "architecture": "swin_tiny_patch2_window4_16", "num_features": 12, "global_pool": "avg",
    "model_args": {"embed_dim": 6, "depths": [2, 1], "num_heads": [2, 3], "act_layer": "gelu"},
}  # fmt: skip


def check(tmp_path, config, spec, strict=True):
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_description(tmp_path / "model.safetensors", spec, strict)


@pytest.mark.parametrize(
    ("config", "spec"),
    [(HUGGING_FACE_VIT, VIT), (HUGGING_FACE_SWIN, SWIN), (TIMM_VIT, VIT), (TIMM_SWIN, SWIN)],
)
def test_what_agrees_or_is_not_compared(tmp_path, config, spec, caplog):
    check(tmp_path, config, spec)
    check(tmp_path, config, VIT if spec is SWIN else SWIN)  # the names in the file say it better
    own = dataclasses.replace(VIT, layer_scale=True, pool="mean", num_classes=7)
    check(tmp_path, TIMM_VIT | {"num_classes": 0}, own)  # it had no classifier, and so no pool
    assert not caplog.text
    for other in ([config], {}, config | {"architecture": "resnet18"}, {"model_type": "x"}):
        check(tmp_path, other, spec)
        assert "spec is not compared with what is beside the weights: " in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    ("config", "change", "spec", "message"),
    [
        (HUGGING_FACE_VIT, {"num_attention_heads": 4}, VIT, "num_heads is 4, and 2 in the spec"),
        (CLIP, {}, dataclasses.replace(VIT, pre_norm=True, patch_bias=False),
         "activation is 'quick_gelu', and 'gelu' in the spec$"),
        (HUGGING_FACE_SWIN, {"num_heads": [3, 2]}, SWIN, r"num_heads is \(3, 2\), and \(2, 3\) in"),
        (HUGGING_FACE_SWIN, {"layer_norm_eps": 1e-6}, SWIN, "layer_norm_eps is 1e-06, and 1e-05"),
        (TIMM_VIT, {"global_pool": "avg"}, VIT, "pool is 'mean', and 'token' in the spec"),
    ],
)  # fmt: skip
def test_contradictions_name_both_values(tmp_path, config, change, spec, message):
    with pytest.raises(ValueError, match=rf"config\.json contradicts the spec: .*{message}"):
        check(tmp_path, config | change, spec)
    with pytest.warns(UserWarning, match=message):
        check(tmp_path, config | change, spec, strict=False)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (HUGGING_FACE_VIT, {"hidden_act": "relu"}, "unknown hidden_act 'relu'; choose one of"),
        (
            HUGGING_FACE_VIT,
            {"num_attention_heads": 5},
            "embed_dim 8 is not a multiple of num_heads 5",
        ),
        (TIMM_SWIN, {"model_args": {"act_layer": "quick_gelu"}}, "act_layer is 'quick_gelu'"),
    ],
)
def test_networks_that_no_spec_describes(tmp_path, config, change, message, caplog):
    check(tmp_path, config | change, VIT)
    assert f"config.json: {message}" in caplog.text


def test_another_resolution_is_interpolated(vit, tmp_path, caplog):
    save_file(written(vit, layouts.hugging_face_vit), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(HUGGING_FACE_VIT))
    larger = dataclasses.replace(VIT, image_size=20)
    with caplog.at_level(logging.INFO, "flora_jax"):
        assert from_pretrained(tmp_path, larger).spec == larger
    assert "interpolated to the spec's size: pos_embed (10 to 26)" in caplog.text
    with pytest.raises(ValueError, match=r"layer_norm_eps is 1e-06, and 0\.001 in"):
        from_pretrained(
            tmp_path / "model.safetensors", dataclasses.replace(VIT, layer_norm_eps=1e-3)
        )


def test_a_model_of_ones_own(vit, tmp_path):
    flora.save(vit, tmp_path)
    other = dataclasses.replace(VIT, num_heads=4, blocks=())
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match=r"spec\.json contradicts .*num_heads is 2, and 4 in"):
            from_pretrained(path, other)
    with pytest.warns(UserWarning, match="num_heads is 2, and 4 in the spec"):
        assert from_pretrained(tmp_path, other, strict=False).spec == other
    flora.export_timm(vit, tmp_path / "elsewhere.safetensors")  # whose spec is not said
    assert from_pretrained(tmp_path / "elsewhere.safetensors", other).spec == other
    assert_same(from_pretrained(tmp_path, VIT), vit)
