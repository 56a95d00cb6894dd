"""Attention and GELU against plain formulas, and their gradients against derived ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import log_ndtr, ndtr

from flora_jax.models.layers import attend, gelu


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
