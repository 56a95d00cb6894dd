"""Weights that do not fit the spec, and what the errors say of them."""

import dataclasses

import numpy as np
import pytest

from flora_jax.models import functional
from flora_jax.weights import layouts
from flora_jax.weights.load_parameters import NotFiniteWarning
from flora_jax.weights.pretrained import from_state_dict
from tests.helpers.weights import SWIN, VIT, VITS, written


def test_names_that_do_not_fit(vit):
    arrays = written(vit, layouts.timm)
    arrays["head.bais"] = arrays.pop("head.bias")
    with pytest.raises(ValueError, match=r"missing head\.bias; unexpected head\.bais .did you"):
        from_state_dict(arrays, VIT)
    deeper = dataclasses.replace(VIT, depth=3, blocks=())
    with pytest.raises(ValueError, match=r"missing blocks\.2\..* and \d+ more; unexpected none"):
        from_state_dict(written(vit, layouts.timm), deeper)


def test_not_strict(vit):
    arrays = written(vit, layouts.hugging_face_vit)
    arrays["mystery"] = arrays.pop("vit.encoder.layer.1.attention.attention.key.weight")
    with pytest.warns(UserWarning, match=r"missing vit.*key\.weight; unexpected mystery\. Missing"):
        model = from_state_dict(arrays, VIT, strict=False)
    before, after = (functional.split(m)[1] for m in (vit, model))
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == ["blocks.1.attn.qkv.kernel"]
    assert np.std(after[changed[0]]) > 0.1


def test_names_of_another_kind_of_vit(models):
    with pytest.raises(ValueError, match="missing none; unexpected dist_token, head_dist"):
        from_state_dict(written(models["distilled"], layouts.timm), VIT)
    arrays = written(models["distilled"], layouts.hugging_face_vit)
    with pytest.raises(ValueError, match=r"missing classifier\.bias.*; unexpected cls_classifier"):
        from_state_dict(arrays, VIT)
    with pytest.raises(ValueError, match="pool is 'mean' in the spec, and 'token' in the file"):
        from_state_dict(arrays, VITS["mean"])


def test_another_family_or_none(vit, swin):
    with pytest.raises(ValueError, match="weights of a timm Swin, but the spec is a ViTSpec"):
        from_state_dict(written(swin, layouts.timm), VIT)
    with pytest.raises(ValueError, match="of a Hugging Face ViT, but the spec is a SwinSpec"):
        from_state_dict(written(vit, layouts.hugging_face_vit), SWIN)
    with pytest.raises(
        ValueError, match=r"found conv1, fc; expected those of .*timm ViT, such as blocks\.0\."
    ):
        from_state_dict({"conv1": np.zeros(3), "fc": np.zeros(3)}, VIT)
    with pytest.raises(ValueError, match=r"unknown weight names: found none; expected"):
        from_state_dict({}, VIT)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("pos_embed", (2, 10, 8), r"pos_embed has shape \(2, 10, 8\) .* \(1, 10, 8\) in the spec"),
        ("pos_embed", (1, 12, 8), r"from \(12, 8\) to \(10, 8\): 11 patches make no sq"),
        ("cls_token", (), r"cls_token has shape \(\) in the file, and \(1, 1, 8\)"),
        ("patch_embed.proj.weight", (8, 8, 2, 2), r"\(8, 8, 2, 2\) .*\(8, 2, 4, 4\) in the spec"),
        ("blocks.0.mlp.fc1.weight", (32, 9), r"fc1.weight has shape \(32, 9\) .* \(32, 8\) in the"),
        ("head.weight", (3, 9), r"head.weight has shape \(3, 9\) in the file, and \(3, 8\)"),
    ],
)
def test_an_array_of_another_shape(vit, name, shape, message):
    arrays = written(vit, layouts.timm) | {name: np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=message):
        from_state_dict(arrays, VIT)


def test_parts_that_only_together_have_the_right_shape(vit):
    """Rows of query, key and value that sum up to those of qkv."""
    arrays = written(vit, layouts.hugging_face_vit)
    for part, rows in {"query": 9, "key": 7}.items():
        name = f"vit.encoder.layer.0.attention.attention.{part}.weight"
        arrays[name] = np.zeros((rows, 8), np.float32)
    with pytest.raises(ValueError, match=r"query.weight has shape \(9, 8\) .*, and \(8, 8\)"):
        from_state_dict(arrays, VIT)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((49, 5), r"table has shape \(49, 5\) in the file, and \(49, 2\) in the spec"),
        ((48, 2), r"table cannot be interpolated from \(48, 2\) to \(49, 2\): .* no window"),
    ],
)
def test_a_table_of_another_number_of_heads_or_of_no_window(swin, shape, message):
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    arrays = written(swin, layouts.timm) | {name: np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=message):
        from_state_dict(arrays, SWIN)


def test_a_factor_that_is_no_matrix(subnets):
    arrays = written(subnets["vit"], layouts.timm)
    name = next(name for name in sorted(arrays) if name.endswith("VT.weight"))
    with pytest.raises(ValueError, match=r"rank 0"):
        from_state_dict(arrays | {name: np.float32(1)}, VIT)


@pytest.mark.parametrize(
    ("dtype", "value"), [(np.float32, -np.inf), (np.float16, np.nan), (np.float64, 1e200)]
)
def test_weights_that_are_not_finite(swin, dtype, value):
    arrays = written(swin, layouts.hugging_face_swin)
    for name in ("swin.layernorm.bias", "swin.encoder.layers.1.blocks.0.attention.self.key.weight"):
        arrays[name] = arrays[name].astype(dtype)
        arrays[name].flat[-1] = value
    arrays["swin.encoder.layers.0.blocks.1.attn_mask"] = np.array([-np.inf])  # a buffer may be
    with pytest.warns(
        NotFiniteWarning, match=r"NaN or infinite.* swin\.enc.*key\.weight.*layernorm\.bia"
    ):
        from_state_dict(arrays, SWIN)


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "float8_e5m2"])
def test_weights_of_another_kind_of_number(vit, dtype):
    arrays = written(vit, layouts.timm)
    arrays["norm.bias"] = arrays["norm.bias"].astype(dtype)
    with pytest.raises(ValueError, match=rf"norm\.bias is {dtype}; .* float16, bfloat16"):
        from_state_dict(arrays, VIT)


def test_other_ranks_than_the_specs(vit, subnets):
    arrays, spec = written(subnets["vit"], layouts.timm), subnets["vit"].spec
    wrong = spec.with_ranks((1, *spec.ranks[1:]))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv has rank 2 .* and 1 in the spec"):
        from_state_dict(arrays, wrong)
    with pytest.raises(ValueError, match=r"qkv has rank None in the file and 2 in the"):
        from_state_dict(written(vit, layouts.timm), spec)
