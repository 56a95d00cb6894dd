"""Prefixes that wrappers put before the names, and files that hold several copies."""

import logging

import numpy as np
import pytest

from flora_jax.models import functional
from flora_jax.slim import from_state_dict as gated_from_state_dict
from flora_jax.slim.gates import GATE_NAMES, add_gates
from flora_jax.weights import layouts
from flora_jax.weights.detect import names_within
from flora_jax.weights.pretrained import from_state_dict
from tests.helpers.weights import SWIN, VIT, assert_same, random_model, written


def prefixed(prefix, arrays):
    return {prefix + name: array for name, array in arrays.items()}


@pytest.mark.parametrize("prefix", ["net.", "module._orig_mod.student.0.", "encoder.layers."])
def test_any_prefix(models, subnets, prefix):
    for model, table in (
        (models["vit"], layouts.timm),
        (models["vit"], layouts.own),
        (models["swin"], layouts.own),
        (models["swin"], lambda spec: layouts.timm_swin(spec, ["head.weight"])),
        (models["swin"], layouts.hugging_face_swin),
        (models["distilled"], layouts.hugging_face_vit),
        (subnets["vit"], layouts.timm),
    ):
        assert_same(from_state_dict(prefixed(prefix, written(model, table)), model.spec), model)


def test_a_classifier_beside_the_wrapped_backbone(vit):
    arrays = written(vit, layouts.timm)
    head = {name: arrays.pop(name) for name in ("head.weight", "head.bias")}
    assert_same(from_state_dict(prefixed("backbone.", arrays) | head, VIT), vit)


@pytest.mark.parametrize("average", ["ema_model.module.", "model_ema."])
@pytest.mark.parametrize("raw", ["", "model."])
def test_an_average_under_its_own_prefix(swin, caplog, average, raw):
    arrays = prefixed(raw, written(random_model(SWIN, seed=1), layouts.timm))
    arrays |= prefixed(average, written(swin, layouts.timm))
    with caplog.at_level(logging.INFO, "flora_jax"):
        assert_same(from_state_dict(arrays, SWIN), swin)
    assert f"the average, {average!r}, is read" in caplog.text


def test_two_networks_in_one_file(vit):
    arrays = written(vit, layouts.timm)
    with pytest.raises(ValueError, match=r"under each of 'student\.', 'teacher\.': leave one"):
        from_state_dict(prefixed("student.", arrays) | prefixed("teacher.", arrays), VIT)


def test_names_that_become_one():
    with pytest.raises(ValueError, match=r"b stand in the file with 'm\.' before them and without"):
        names_within(["m.a", "m.b", "b"], ["a", "b"])


def test_gates_under_a_prefix(vit):
    arrays = written(vit, layouts.timm)
    gates = functional.split(add_gates(vit, "head").network)[1]
    for block in range(VIT.depth):
        for kind, published in {
            "attn": "attn.zeta",
            "mlp": "mlp.zeta",
            "patch": "attn.patch_zeta",
        }.items():
            gate = gates[f"blocks.{block}.{GATE_NAMES[kind]}"]
            arrays[f"blocks.{block}.{published}"] = np.full(gate.shape, 0.5 + block, np.float32)
    gated = gated_from_state_dict(prefixed("module.", arrays), VIT, "head")
    for kind in ("attn", "mlp"):
        assert (gated.gates()[kind][1] == 1.5).all()
    arrays["blocks.1.mlp.zeta"][0] = np.nan
    with pytest.raises(ValueError, match=r"the gates blocks\.1\.mlp\.zeta are NaN"):
        gated_from_state_dict(arrays, VIT, "head")
