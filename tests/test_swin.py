"""Swin: its windows against attention spelled out, its spec, and the search's view of it."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import flora_jax as flora
from flora_jax.data.normalize import Normalization
from flora_jax.flora.filter import score_block
from flora_jax.models import functional
from flora_jax.models.layers import make_linear
from flora_jax.models.spec import BlockSpec, LinearShape
from flora_jax.models.swin import ShiftedWindowAttention
from flora_jax.models.windows import Windows
from tests.helpers.networks import TINY_SWIN, every_triple, logits, random_model
from tests.helpers.weights import assert_same


def attention_spelled_out(attention, x, windows):
    """One token at a time. x [N, D]; windows begin at multiples of window_size, plus the shift."""
    side, window, heads = windows.grid_size, windows.window_size, attention.num_heads
    row, column = np.divmod(np.arange(side**2), side)
    window_of = np.stack([(row - windows.shift) // window, (column - windows.shift) // window], -1)
    qkv = np.asarray(x @ attention.qkv.kernel + attention.qkv.bias[None]).reshape(
        side**2, 3, heads, -1
    )
    table = np.asarray(attention.relative_position_bias_table[...])
    mixed = np.zeros((side**2, heads, qkv.shape[-1]))
    for i in range(side**2):
        neighbours = [j for j in range(side**2) if (window_of[i] == window_of[j]).all()]
        for h in range(heads):
            given = [
                qkv[i, 0, h] @ qkv[j, 1, h] / np.sqrt(qkv.shape[-1])
                + table[
                    (row[i] - row[j] + window - 1) * (2 * window - 1)
                    + (column[i] - column[j] + window - 1),
                    h,
                ]
                for j in neighbours
            ]
            share = np.exp(given - np.max(given))
            mixed[i, h] = (share / share.sum()) @ qkv[neighbours, 2, h]
    proj = attention.proj
    return mixed.reshape(side**2, -1) @ np.asarray(proj.kernel[...]) + np.asarray(proj.bias[...])


@pytest.mark.parametrize(
    ("grid_size", "window_size", "shift"), [(4, 2, 0), (4, 2, 1), (6, 3, 1), (8, 4, 2), (3, 3, 0)]
)
def test_window_attention(grid_size, window_size, shift):
    windows = Windows(grid_size, window_size, shift)
    qkv = LinearShape("qkv", 6, 3 * 2 * 5, grid_size**2)
    attention = ShiftedWindowAttention(
        windows, qkv, BlockSpec(2, 5, 7), make_linear, rngs=nnx.Rngs(0)
    )
    table = attention.relative_position_bias_table
    rng = np.random.default_rng(0)
    attention.relative_position_bias_table[...] = jnp.float32(rng.normal(size=table.shape))
    x = np.float32(rng.normal(size=(2, grid_size**2, 6)))
    out = windows.join(attention(windows.cut(x.reshape(-1, 6)))).reshape(x.shape)
    for image, result in zip(x, out, strict=True):
        wanted = attention_spelled_out(attention, image, windows)
        np.testing.assert_allclose(result, wanted, atol=1e-5)


@pytest.mark.slow
def test_a_window_larger_than_the_image_is_the_image():
    fields = {"image_size": 8, "patch_size": 2, "embed_dim": 4, "num_classes": 3}
    small, large = (
        flora.SwinSpec(**fields, depths=(2, 2), num_heads=(1, 2), window_size=size)
        for size in (4, 7)
    )
    assert [stage.window_size for stage in large.stages] == [4, 2]
    assert [stage.shift for stage in large.stages] == [0, 0]
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    found, expected = (logits(flora.create(spec), images) for spec in (small, large))
    np.testing.assert_array_equal(found, expected)
    assert flora.macs(small) == flora.macs(large)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 200}, "7 x 7 patches do not tile stage 1 .* 50 patches .* image_size: 224"),
        ({"image_size": 256}, "nearest image_size: 224, or window_size: 8"),
        ({"image_size": 24, "window_size": 2}, "stage 2 .* 3 patches .* image_size: 32$"),
        ({"image_size": 225}, "image_size 225 is not a multiple of patch_size 4"),
        ({"num_heads": (3, 5, 12, 24)}, "stage 2 has width 192, .* num_heads 5; .* it: 4"),
        ({"depths": (2, 2)}, r"depths \(2, 2\) and num_heads \(3, 6, 12, 24\) must have one entry"),
        ({"depths": (2, 0, 6, 2)}, r"depths must be at least 1, got \(2, 0, 6, 2\)"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"blocks": (BlockSpec(1, 4, 8),)}, "make 12 blocks .* but 1 were given"),
    ],
)
def test_bad_spec(fields, message):
    with pytest.raises(ValueError, match=message):
        flora.SwinSpec(**fields)


@given(image_size=st.integers(1, 200), window_size=st.integers(1, 9))
def test_what_an_error_proposes_is_legal(image_size, window_size):
    fields = {"patch_size": 1, "depths": (1, 1, 1), "num_heads": (1, 1, 1)}
    try:
        flora.SwinSpec(**fields, image_size=image_size, window_size=window_size)
    except ValueError as error:
        sizes = dict(re.findall(r"(image_size|window_size): (\d+)", str(error)))
        assert "image_size" in sizes
        for name, size in sizes.items():
            legal = {"image_size": image_size, "window_size": window_size, name: int(size)}
            flora.SwinSpec(**fields, **legal)


def test_unknown_size():
    with pytest.raises(ValueError, match="unknown Swin size 'huge'; choose one of tiny, small"):
        flora.swin("huge")


@pytest.fixture(scope="module")
def tiny_swin():
    """Random weights; two stages, the first with shifted windows."""
    return random_model(dataclasses.replace(TINY_SWIN, absolute_pos_embed=True))


@pytest.fixture(scope="module")
def supernet(tiny_swin):
    space = flora.RankSpace.regular(tiny_swin.spec, ratios=(1 / 4, 1 / 2, 1))
    return flora.factorize(tiny_swin, space)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(2).integers(0, 256, (10, 8, 8, 3), np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("block", [0, 1, 2])
def test_score_block_measures_the_whole_network(supernet, images, block):
    labels = np.arange(10, dtype=np.int32) % 3
    batch = {"image": images, "label": labels, "mask": np.ones(10, np.float32)}
    evaluation_set = flora.EvaluationSet([batch], Normalization((0.5,), (0.25,)))
    genes = every_triple(supernet.space, block)
    expected = flora.evaluate(supernet, evaluation_set, genes)
    scores = score_block(supernet, block, evaluation_set)
    assert len(np.unique(scores["log_likelihood"].round(4))) > 9
    np.testing.assert_allclose(scores["log_likelihood"], expected["log_likelihood"], rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_parameters_give_bfloat16_logits(tiny_swin, images):
    structure, parameters = functional.split(tiny_swin)
    narrow = functional.merge(structure, {n: p.astype(jnp.bfloat16) for n, p in parameters.items()})
    x = images / np.float32(255)
    found = logits(narrow, jnp.bfloat16(x))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found), logits(tiny_swin, x), atol=0.1)


def test_save_and_load(tiny_swin, tmp_path):
    flora.save(tiny_swin, tmp_path)
    assert_same(flora.load(tmp_path), tiny_swin)
