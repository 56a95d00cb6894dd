"""Weights fitted to a spec: another resolution, window or number of classes."""

import dataclasses
import logging
import re

import numpy as np
import pytest

from flora_jax.models import functional
from flora_jax.weights import layouts
from flora_jax.weights.pretrained import from_state_dict
from flora_jax.weights.resample import resample_pos_embed, resample_relative_position_table
from tests.helpers.weights import SWIN, SWINS, VIT, VITS, assert_same, written


def test_buffers_are_left_out(swin):
    arrays = written(swin, layouts.timm)
    arrays |= {
        "layers.0.blocks.0.attn.relative_position_index": np.zeros((16, 16), np.int64),
        "layers.0.blocks.1.attn_mask": np.zeros((4, 16, 16), np.float32),
        "n_averaged": np.array(7),
    }
    assert_same(from_state_dict(arrays, SWIN), swin)


def test_the_model_has_its_own_copy(vit):
    arrays = {name: array.copy() for name, array in written(vit, layouts.timm).items()}
    model = from_state_dict(arrays, VIT)
    for array in arrays.values():
        array[...] = 0
    assert_same(model, vit)


@pytest.mark.parametrize("name", ["vit", "distilled", "mean_no_token"])
@pytest.mark.parametrize("image_size", [8, 20])
def test_another_resolution(models, caplog, name, image_size):
    spec = dataclasses.replace(VITS[name], image_size=image_size)
    with caplog.at_level(logging.INFO, "flora_jax"):
        model = from_state_dict(written(models[name], layouts.timm), spec)
    assert "interpolated to the spec's size: pos_embed" in caplog.text
    before, after = (functional.split(m)[1] for m in (models[name], model))
    expected = resample_pos_embed(
        np.asarray(before["pos_embed"]), spec.num_prefix_tokens, image_size // 4
    )
    np.testing.assert_array_equal(after["pos_embed"], expected)
    np.testing.assert_array_equal(after["head.kernel"], before["head.kernel"])


def test_another_window_and_grid(models, caplog):
    spec = dataclasses.replace(SWINS["absolute"], image_size=32, window_size=8)
    with caplog.at_level(logging.INFO, "flora_jax"):
        model = from_state_dict(written(models["absolute"], layouts.timm), spec)
    assert re.search("absolute_pos_embed.*, blocks.0.attn.relative_position_bias", caplog.text)
    before, after = (functional.split(m)[1] for m in (models["absolute"], model))
    for block in range(3):
        name = f"blocks.{block}.attn.relative_position_bias_table"
        expected = resample_relative_position_table(np.asarray(before[name]), 8)
        np.testing.assert_array_equal(after[name], expected)
    grid = resample_pos_embed(np.asarray(before["absolute_pos_embed"]), 0, 16)
    np.testing.assert_array_equal(after["absolute_pos_embed"], grid)


@pytest.mark.parametrize("name", ["distilled", "swin"])
def test_a_classifier_of_other_classes(models, name):
    spec = dataclasses.replace(models[name].spec, num_classes=5)
    with pytest.warns(UserWarning, match="head.* has 3 classes in the weights and 5 in the spec"):
        model = from_state_dict(written(models[name], layouts.timm), spec)
    before, after = (functional.split(m)[1] for m in (models[name], model))
    for key in after:
        if key.startswith("head"):
            assert after[key].shape == (*before[key].shape[:-1], 5)
            assert not np.any(after[key])
        else:
            np.testing.assert_array_equal(after[key], before[key])


@pytest.mark.parametrize(
    ("name", "table", "encoder"),
    [
        ("vit", layouts.timm, ""),
        ("distilled", layouts.hugging_face_vit, "deit."),
        ("swin", layouts.hugging_face_swin, "swin."),
    ],
)
def test_a_bare_encoder_gets_a_new_classifier(models, name, table, encoder):
    model = models[name]
    arrays = {
        key.removeprefix(encoder): array
        for key, array in written(model, table).items()
        if not key.startswith("head") and "classifier" not in key
    }
    arrays["pooler.dense.bias"] = np.zeros(8, np.float32)
    with pytest.warns(UserWarning, match=r"no classifier \(.*\): a new one of zeros for 3 classes"):
        bare = from_state_dict(arrays, model.spec)
    before, after = (functional.split(m)[1] for m in (model, bare))
    for key in after:
        expected = np.zeros_like(before[key]) if key.startswith("head") else before[key]
        np.testing.assert_array_equal(after[key], expected, err_msg=key)
    del arrays[next(key for key in sorted(arrays) if key.endswith("norm.bias"))]
    with pytest.raises(ValueError, match=r"missing .*norm\.bias"):
        from_state_dict(arrays, model.spec)


def test_a_subnet_of_which_every_layer_stayed_dense(vit):
    arrays = written(vit, layouts.timm)
    for layer in VIT.layers:
        for part in ("weight", "bias"):
            arrays[f"{layer.name}.fc.{part}"] = arrays.pop(f"{layer.name}.{part}")
    assert_same(from_state_dict(arrays, VIT), vit)
