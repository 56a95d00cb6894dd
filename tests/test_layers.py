"""Attention, GELU and norms with gradients by hand; blocks in a loop: against plain formulas."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import log_ndtr, ndtr

import flora_jax as flora
from flora_jax.models import functional
from flora_jax.models.layers import LayerNorm, attend, gelu
from flora_jax.models.network import Loop, run_blocks
from flora_jax.slim import add_gates
from tests.helpers.networks import TINY, TINY_SWIN

VIT = flora.ViTSpec(**TINY, depth=3, distilled=True)
SWIN = dataclasses.replace(TINY_SWIN, depths=(4, 3), blocks=())


def some(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def plain_attention(query, key, value, bias):
    logits = jnp.einsum("...nd,...md->...nm", query, key) * query.shape[-1] ** -0.5 + bias
    exponents = jnp.exp(logits)
    return jnp.einsum("...nm,...md->...nd", exponents / exponents.sum(-1, keepdims=True), value)


@pytest.mark.parametrize(
    "queries, bias",
    [
        ((2, 3, 7, 5), (1, 1, 1, 9)),  # a constant added to some keys
        ((2, 3, 1, 5), (1, 1, 1, 1)),  # one query that pools all tokens
        ((2, 4, 3, 9, 5), (1, 4, 3, 9, 9)),  # windows, each with its own positions
        ((2, 4, 3, 9, 5), (1, 1, 3, 9, 9)),  # windows that share them
    ],
)
def test_attention_and_all_its_gradients(queries, bias):
    keys = (*queries[:-2], 9, 5)
    arguments = (some(0, *queries), some(1, *keys), some(2, *keys), some(3, *bias))
    grad = some(4, *queries)
    expected, derived = jax.vjp(plain_attention, *arguments)
    found, by_hand = jax.vjp(attend, *arguments)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    for mine, theirs in zip(by_hand(grad), derived(grad), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_attention_of_tokens_that_are_out_of_reach():
    far = jnp.array([[[[0.0, 0.0, -1e9]]]])
    query, key, value = some(0, 1, 1, 3, 4), some(1, 1, 1, 3, 4), some(2, 1, 1, 3, 4)
    _, by_hand = jax.vjp(attend, query, 1e3 * key, value, far)  # whose exponents overflow
    of_query, of_key, of_value, of_bias = by_hand(jnp.ones_like(query))
    assert all(jnp.isfinite(gradient).all() for gradient in (of_query, of_key, of_value, of_bias))
    assert not of_key[..., -1, :].any()
    assert not of_value[..., -1, :].any()


def test_attention_gradients_in_bfloat16():
    wide = [some(seed, 2, 3, 8, 16) for seed in range(3)]
    narrow = [x.astype(jnp.bfloat16) for x in wide]
    bias, grad = jnp.zeros((1, 1, 1, 8)), some(4, 2, 3, 8, 16)
    expected = jax.vjp(plain_attention, *wide, bias)[1](grad)
    found = jax.vjp(attend, *narrow, bias)[1](grad.astype(jnp.bfloat16))
    assert [x.dtype for x in found] == [jnp.bfloat16] * 3 + [jnp.float32]
    for mine, theirs in zip(found[:3], expected, strict=False):
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, atol=0.05)


def test_gelu_and_its_gradient():
    x = jnp.linspace(-9, 9, 1001)
    np.testing.assert_allclose(gelu(x), x * ndtr(x), atol=1e-6)
    expected = jax.vmap(jax.grad(lambda x: x * ndtr(x)))(x)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), expected, atol=2e-6)


def test_gelu_keeps_its_tail_in_bfloat16():
    x = jnp.arange(-3, 0, 0.25, dtype=jnp.bfloat16)
    wide = x.astype(jnp.float32)
    found = gelu(x)
    assert found.dtype == jax.grad(lambda x: gelu(x).sum())(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), wide * jnp.exp(log_ndtr(wide)), rtol=0.01)


def plain_layer_norm(x, scale, bias):
    variance = x.var(-1, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(variance + 1e-6) * scale[None] + bias[None]


@pytest.fixture(scope="module")
def norm_inputs():
    """x [7, 16] of different means and sizes, scale, bias, and the gradient of the output."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 16)) * np.geomspace(1e-2, 1e2, 7)[:, None] + rng.normal(size=(7, 1))
    arrays = (x, rng.normal(size=16), rng.normal(size=16), rng.normal(size=(7, 16)))
    return [jnp.float32(a) for a in arrays]


def with_gradients(norm, x, scale, bias, grad):
    value, pull_back = jax.vjp(norm, x, scale, bias)
    return value, *pull_back(grad)


def layer_norm(x, scale, bias):
    structure, _ = functional.split(LayerNorm(x.shape[-1], 1e-6))
    return functional.merge(structure, {"scale": scale, "bias": bias})(x)


def test_layer_norm_and_its_gradient(norm_inputs):
    actual = with_gradients(layer_norm, *norm_inputs)
    wanted = with_gradients(plain_layer_norm, *norm_inputs)
    for ours, theirs in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * abs(theirs).max())


def test_layer_norm_in_bfloat16(norm_inputs):
    """Statistics in float32: what is lost is the rounding of the result alone."""
    narrow = [jnp.bfloat16(a) for a in norm_inputs]
    actual = with_gradients(layer_norm, *narrow)
    wanted = with_gradients(plain_layer_norm, *(jnp.float32(a) for a in narrow))
    for ours, theirs in zip(actual, wanted, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.float32(ours), theirs, rtol=2e-2, atol=1e-2 * abs(theirs).max()
        )


def test_layer_norm_gradient_has_the_dtype_of_the_input(norm_inputs):
    x, scale, bias, grad = norm_inputs
    with jax.numpy_dtype_promotion("standard"):
        found = with_gradients(layer_norm, jnp.bfloat16(x), scale, bias, grad)
    assert found[1].dtype == jnp.bfloat16


def dense(spec):
    return flora.create(spec), None


def supernet(spec):
    space = flora.RankSpace.regular(spec)
    network = flora.factorize(flora.create(spec), space, implementation="masked").network
    return network, space.sample(np.random.default_rng(0), 1, "uniform")[0]


def gated(spec):
    return add_gates(flora.create(spec)).network, None


def two_widths(spec):
    """Blocks 0 and 1 are alike, the last one is not."""
    space = flora.RankSpace.regular(spec)
    genes = np.zeros_like(space.full_rank_genes)
    genes[-1] = 1
    return flora.extract(flora.factorize(flora.create(spec), space), genes), None


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, spec, num_loops",
    [
        (dense, VIT, 1),
        (supernet, VIT, 1),
        (gated, VIT, 1),
        (two_widths, VIT, 1),
        (dense, SWIN, 2),  # shifted windows in pairs, then the stage whose windows are the grid
        (supernet, SWIN, 2),
    ],
)
def test_a_loop_changes_nothing(make, spec, num_loops):
    model, genes = make(spec)
    structure, parameters = functional.split(model)
    images = jax.random.normal(jax.random.key(1), (2, *spec.image_shape))

    def loss(parameters, run):
        model = functional.merge(structure, parameters, genes)
        return jnp.square(model(images, run)).sum()

    compute = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = compute(parameters, run_blocks)
    for rematerialize in (False, True) if make is dense else (False,):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            compute(parameters, Loop(rematerialize)),
            expected,
        )
    program = jax.jit(loss, static_argnums=1).lower(parameters, Loop()).as_text()
    assert len(re.findall(r"stablehlo\.while", program)) == num_loops
