"""The supernet's layer: both implementations against plain formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from flora_jax.flora.layer import RankedLinear, masked_product, sliced_product
from flora_jax.models import functional
from flora_jax.models.spec import LinearShape

IN, OUT, RANKS = 12, 20, (2, 5, 9, 12)
FEW, MANY = 3, 200  # with many tokens the factors of the two largest ranks are merged first
GENES = range(len(RANKS))
PRODUCTS = {"masked": masked_product, "sliced": sliced_product}


def arrays(tokens):
    """x [M, in], down [R, in], up [R, out], grad [M, out]: float32, rounded to bfloat16 values."""
    rng = np.random.default_rng(tokens)
    shapes = (tokens, IN), (RANKS[-1], IN), (RANKS[-1], OUT), (tokens, OUT)
    return [np.float32(jnp.bfloat16(rng.normal(size=shape))) for shape in shapes]


def expected(x, down, up, grad, rank):
    """Value and gradients of x, down and up by the textbook, float64."""
    x, down, up, grad = (a.astype(np.float64) for a in (x, down, up, grad))
    used_down, used_up = down[:rank], up[:rank]
    grad_down, grad_up = np.zeros_like(down), np.zeros_like(up)
    grad_down[:rank] = (grad @ used_up.T).T @ x
    grad_up[:rank] = (x @ used_down.T).T @ grad
    return x @ used_down.T @ used_up, grad @ used_up.T @ used_down, grad_down, grad_up


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(product, x, down, up, grad, gene):
    value, pull_back = jax.vjp(lambda *factors: product(*factors, gene, RANKS), x, down, up)
    return value, *pull_back(grad)


def assert_close(actual, wanted, tolerance):
    """Relative to the largest entry."""
    np.testing.assert_allclose(
        np.float64(actual), wanted, rtol=0, atol=tolerance * abs(wanted).max()
    )


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_value_and_gradients(name, tokens):
    inputs = arrays(tokens)
    for gene, rank in zip(GENES, RANKS, strict=True):
        actual = value_and_gradients(PRODUCTS[name], *inputs, gene)
        for ours, theirs in zip(actual, expected(*inputs, rank), strict=True):
            assert_close(ours, theirs, 1e-5)
        for factor_gradient in actual[2:]:
            assert np.asarray(factor_gradient)[:rank].all()
            assert not np.asarray(factor_gradient)[rank:].any()


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_bfloat16(name, tokens):
    inputs = arrays(tokens)
    narrow = [jnp.bfloat16(a) for a in inputs]
    for gene, rank in zip(GENES, RANKS, strict=True):
        actual = value_and_gradients(PRODUCTS[name], *narrow, gene)
        assert {a.dtype for a in actual} == {jnp.dtype(jnp.bfloat16)}
        for ours, theirs in zip(actual, expected(*inputs, rank), strict=True):
            assert_close(ours, theirs, 2e-2)


@pytest.mark.parametrize(
    "name",
    ["masked", "sliced"],
)
def test_gradient_has_the_dtype_of_the_input(name):
    x, down, up, _ = arrays(FEW)
    gradient = jax.grad(lambda x: PRODUCTS[name](x, down, up, 0, RANKS).sum())
    with jax.numpy_dtype_promotion("standard"):
        assert gradient(jnp.bfloat16(x)).dtype == jnp.bfloat16


@pytest.mark.parametrize(("tokens", "merged"), [(FEW, [0, 0, 0, 0]), (MANY, [0, 0, 1, 1])])
def test_sliced_spends_the_cheaper_way_at_each_rank(tokens, merged, count_macs):
    """Forward and backward, counted in the traced program."""
    inputs = arrays(tokens)
    forward = jax.make_jaxpr(lambda x, *rest: sliced_product(x, *rest, RANKS))(*inputs[:3], 0)
    both = jax.make_jaxpr(functools.partial(value_and_gradients, sliced_product))(*inputs, 0)
    (forward_branches,) = branches_of(forward)
    _, backward_branches = branches_of(both)
    kernel = IN * OUT
    for k, rank in enumerate(RANKS):
        pair = tokens * rank * (IN + OUT)
        factors_first = kernel * (rank + tokens)
        assert count_macs(forward_branches[k]) == (factors_first if merged[k] else pair)
        assert (factors_first < pair) == merged[k]
        pair = tokens * rank * (3 * IN + 2 * OUT)
        factors_first = kernel * (3 * rank + 2 * tokens)
        assert count_macs(backward_branches[k]) == min(pair, factors_first)


def branches_of(jaxpr):
    """The branches of every switch, in program order."""
    found = []
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "cond":
            found.append(equation.params["branches"])
        else:
            for inner in jaxprs_in_params(equation.params):
                found += branches_of(inner)
    return found


@pytest.mark.parametrize("name", PRODUCTS)
def test_layer_without_a_gene_is_at_full_rank(name):
    shape = LinearShape("fc1", IN, OUT, tokens=FEW)
    layer = RankedLinear(shape, RANKS, name, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(OUT, dtype=jnp.float32)
    x = arrays(FEW)[0]
    full = x @ np.asarray(layer.down).T @ np.asarray(layer.up) + np.arange(OUT)
    np.testing.assert_allclose(layer(x), full, rtol=1e-5, atol=1e-6)
    structure, parameters = functional.split(layer)
    assert "gene" not in parameters
    last, first = (
        functional.merge(structure, parameters, jnp.array([gene]))(x)
        for gene in (len(RANKS) - 1, 0)
    )
    np.testing.assert_array_equal(layer(x), last)
    assert abs(first - last).max() > 1e-4
