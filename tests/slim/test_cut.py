"""The cut model against the masked one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_jax as flora
from flora_jax import slim
from flora_jax.models import functional
from tests.helpers.networks import TINY, TINY_SWIN, images_of, logits
from tests.helpers.slimming import check_costs, gated_model, random_masks, with_gates

pytestmark = pytest.mark.slow


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**32 - 1),
    distilled=st.booleans(),
    qkv_bias=st.booleans(),
    tile=st.sampled_from([1, 3]),
)
def test_cut_is_masked(seed, distilled, qkv_bias, tile, count_macs):
    rng = np.random.default_rng(seed)
    spec = flora.ViTSpec(**TINY, depth=3, distilled=distilled, qkv_bias=qkv_bias)
    check_cut(gated_model(spec), random_masks(spec, rng), tile, count_macs)


@settings(max_examples=4)
@given(seed=st.integers(0, 2**32 - 1), qkv_bias=st.booleans(), tile=st.sampled_from([1, 3]))
def test_cut_is_masked_on_a_swin(seed, qkv_bias, tile, count_macs):
    rng = np.random.default_rng(seed)
    spec = dataclasses.replace(TINY_SWIN, qkv_bias=qkv_bias)
    check_cut(gated_model(spec), random_masks(spec, rng, tokens=False), tile, count_macs)


def test_the_first_heads_leave_a_swin_with_their_position_biases(count_macs):
    gated = gated_model(TINY_SWIN)
    masks = slim.threshold(gated)
    attn = [mask.copy() for mask in masks.attn]
    attn[0][0] = attn[1][0] = attn[2][[0, 2]] = False
    check_cut(gated, dataclasses.replace(masks, attn=tuple(attn)), 1, count_macs)


def check_cut(gated, masks, tile, count_macs):
    images, masked = images_of(gated.spec), slim.apply_masks(gated, masks)
    small = slim.extract(gated, masks, fold=False, tile=tile)
    assert small.spec == slim.cut_spec(gated.spec, masks, tile)
    np.testing.assert_allclose(logits(small, images), logits(masked, images), atol=1e-4)
    check_costs(small, count_macs)


def test_head_widths_and_rounding(tiny_gated):
    spec, masks = tiny_gated.spec, slim.threshold(tiny_gated)
    attn = [mask.copy() for mask in masks.attn]
    attn[0][1, :3], attn[1][0] = False, False
    attn[2][:, 2:] = False
    mlp = [mask.copy() for mask in masks.mlp]
    mlp[0][5:], mlp[1][1:], mlp[2][31] = False, False, False
    masks = dataclasses.replace(masks, attn=tuple(attn), mlp=tuple(mlp))
    shapes = [
        [(b.num_heads, b.head_dim, b.mlp_dim) for b in slim.cut_spec(spec, masks, tile).blocks]
        for tile in (1, 3)
    ]
    assert shapes == [[(2, 4, 5), (1, 4, 1), (2, 2, 31)], [(2, 4, 6), (1, 4, 3), (2, 3, 32)]]
    with pytest.raises(ValueError, match="tile must be at least 1, got 0"):
        slim.cut_spec(spec, masks, 0)


def attention_of_a_masked_block(parameters, name, x, mask, kept):
    """float64 [N, D]: masked tokens come in as zeros and take part as keys and values."""
    heads, width = mask.shape
    x = np.where(kept[:, None], x, 0)
    qkv = x @ parameters[f"{name}.qkv.kernel"] + parameters[f"{name}.qkv.bias"]
    query, key, value = (qkv.reshape(-1, 3, heads, width) * mask).swapaxes(0, 1)
    return mixed_heads(query, key, value, width, 0) @ parameters[f"{name}.proj.kernel"]


def attention_of_a_cut_block(parameters, name, x, num_heads, num_left):
    """float64 [N, D] for the tokens that stay; one constant stands for those that left."""
    bias = parameters[f"{name}.qkv.bias"]
    qkv = np.concatenate([x @ parameters[f"{name}.qkv.kernel"] + bias, bias[None]])
    query, key, value = qkv.reshape(len(qkv), 3, num_heads, -1).swapaxes(0, 1)
    extra = np.where(np.arange(len(qkv)) == len(x), np.log(num_left), 0)
    mixed = mixed_heads(query[:-1], key, value, query.shape[-1], extra)
    return mixed @ parameters[f"{name}.proj.kernel"]


def mixed_heads(query, key, value, width, extra):
    weights = np.exp(np.einsum("qhd,khd->hqk", query, key) / np.sqrt(width) + extra)
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, value).reshape(len(query), -1)


def test_the_constant_key_is_exact_where_heads_were_cut(tiny_gated):
    """In float64: what is left of the difference is rounding, not an approximation."""
    rng = np.random.default_rng(3)
    spec, name = tiny_gated.spec, "blocks.1.attn"
    masks = random_masks(spec, rng)
    attn = list(masks.attn)
    attn[1] = np.array([[True, False, True, False], [False, False, True, False]])
    masks = dataclasses.replace(masks, attn=tuple(attn))
    kept = masks.patch[1]
    assert 1 < kept.sum() < len(kept) - 1

    def wide(network):
        structure, parameters = functional.split(network)
        return structure, {n: np.asarray(p, np.float64) for n, p in parameters.items()}

    with jax.enable_x64(True):
        structure, parameters = wide(tiny_gated.network)
        gated = dataclasses.replace(tiny_gated, network=functional.merge(structure, parameters))
        small = slim.extract(gated, masks, fold=False)
        cut_parameters = wide(small)[1]
    x = rng.normal(size=(spec.num_tokens, spec.embed_dim))
    masked = attention_of_a_masked_block(parameters, name, x, masks.attn[1], kept)[kept]
    cut = attention_of_a_cut_block(cut_parameters, name, x[kept], 2, (~kept).sum())
    np.testing.assert_allclose(cut, masked, rtol=1e-12, atol=1e-12)

    single = slim.extract(tiny_gated, masks, fold=False).blocks[1].attn
    proj_bias = np.asarray(single.proj.bias[...])
    np.testing.assert_allclose(single(jnp.float32(x[kept])), cut + proj_bias, atol=1e-5)


@pytest.mark.parametrize("spec", [flora.ViTSpec(**TINY, depth=3), TINY_SWIN], ids=["vit", "swin"])
def test_folded_gates_are_the_soft_network(spec):
    gated, images = gated_model(spec, tokens=False), images_of(spec)
    small = slim.extract(gated, slim.threshold(gated), fold=True)
    assert small.spec == spec
    np.testing.assert_allclose(logits(small, images), logits(gated, images), atol=1e-5)


def test_token_gates_that_are_all_equal_fold_exactly(tiny_gated):
    gates = {f"blocks.{b}.token_gate": np.full(17, gate) for b, gate in enumerate((0.4, 1.1, 2))}
    gated = with_gates(tiny_gated, gates)
    small, images = slim.extract(gated, slim.threshold(gated)), images_of(gated.spec)
    np.testing.assert_allclose(logits(small, images), logits(gated, images), atol=1e-5)


@pytest.mark.parametrize("fold", [True, False])
def test_the_cut_leaves_the_gated_model_as_it_was(tiny_gated, fold):
    before = {n: np.array(p) for n, p in functional.split(tiny_gated.network)[1].items()}
    slim.extract(tiny_gated, slim.threshold(tiny_gated, 0.5, 0.5, 0.5), fold=fold)
    after = functional.split(tiny_gated.network)[1]
    assert before.keys() == after.keys()
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 4}, r"attn masks have shapes \[\(2, 4\), .*, the spec's are \[\(4, 2\)"),
        ({"mlp_ratio": 2}, r"mlp masks have shapes \[\(32,\), .*, the spec's are \[\(16,\)"),
        ({"distilled": True}, r"patch masks have shapes \[\(17,\), .*, the spec's are \[\(18,\)"),
        ({"depth": 2}, "attn masks have shapes"),
    ],
)
def test_masks_of_another_spec(tiny_gated, fields, message):
    other = slim.abstract_gated(flora.ViTSpec(**TINY | {"depth": 3} | fields))
    masks = slim.threshold(tiny_gated)
    for use in (slim.extract, slim.apply_masks):
        with pytest.raises(ValueError, match=message):
            use(other, masks)
    with pytest.raises(ValueError, match=message):
        slim.cut_spec(other.spec, masks)


def test_masks_of_other_gates(tiny_gated):
    spec = tiny_gated.spec
    masks = random_masks(spec, np.random.default_rng(0))
    by_head = gated_model(spec, attention="head")
    with pytest.raises(ValueError, match=r"mask of block \d is not one of attention='head'"):
        slim.apply_masks(by_head, masks)
    without = gated_model(spec, tokens=False)
    for use in (slim.extract, slim.apply_masks):
        with pytest.raises(ValueError, match=r"masks decide on tokens, but .* have no gates"):
            use(without, masks)
        with pytest.raises(ValueError, match=r"masks do not decide on tokens, but .* have gates"):
            use(tiny_gated, dataclasses.replace(masks, patch=()))
