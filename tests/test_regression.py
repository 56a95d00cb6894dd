"""The least squares of a layer, against brute force."""

import jax
import numpy as np
import pytest

from flora_jax.closed_form import regression
from flora_jax.cluster.mesh import SPLIT, WHOLE, make_mesh, on_each_device


def random_rows(seed, outputs=5):
    """Weighted rows that are not centred, targets that depend on them, and where a layer began."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) + 2
    t = x @ rng.normal(size=(6, outputs)) + rng.normal(size=(40, outputs)) - 1
    start = {"kernel": np.float32(rng.normal(size=(6, outputs)))}
    start["bias"] = np.float32(rng.normal(size=outputs))
    return rng, x, t, rng.uniform(0.1, 2, 40), start


def sums_of(x, t, weights):
    weighted = x * weights[:, None]
    return {
        "count": weights.sum(),
        "x": weighted.sum(0),
        "t": weights @ t,
        "xx": weighted.T @ x,
        "xt": weighted.T @ t,
    }


def augmented(x, t, weights, kernel, ridge):
    """Rows whose least squares are those of the rows and of the distance from the kernel."""
    square = (weights[:, None] * x**2).sum() / weights.sum() / x.shape[1]
    root, pull = np.sqrt(weights)[:, None], np.sqrt(ridge * square * weights.sum())
    rows = np.concatenate([root * x, pull * np.eye(x.shape[1])])
    return rows, np.concatenate([root * t, pull * kernel])


def centred(x, weights):
    return x - weights @ x / weights.sum()


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10])
@pytest.mark.parametrize("seed", range(3))
def test_a_layer_is_the_ridge_regression_towards_where_it_began(seed, ridge):
    _, x, t, weights, start = random_rows(seed)
    found = regression.fit_layer(sums_of(x, t, weights), start, True, ridge)
    rows, targets = augmented(
        centred(x, weights), centred(t, weights), weights, start["kernel"], ridge
    )
    kernel = np.linalg.lstsq(rows, targets)[0]
    np.testing.assert_allclose(found["kernel"], kernel, atol=1e-5)
    bias = weights @ (t - x @ kernel) / weights.sum()
    np.testing.assert_allclose(found["bias"], bias, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_layer_without_a_bias_is_fitted_about_zero(seed):
    _, x, t, weights, start = random_rows(seed)
    found = regression.fit_layer(sums_of(x, t, weights), {"kernel": start["kernel"]}, True, 0.1)
    kernel = np.linalg.lstsq(*augmented(x, t, weights, start["kernel"], 0.1))[0]
    assert found.keys() == {"kernel"}
    np.testing.assert_allclose(found["kernel"], kernel, atol=1e-5)


def test_a_bias_without_the_keys_part_stays():
    _, x, t, weights, start = random_rows(0, outputs=6)
    partly, without = start | {"bias": start["bias"][:4]}, {"kernel": start["kernel"]}
    found = regression.fit_layer(sums_of(x, t, weights), partly, False, 0.1)
    other = regression.fit_layer(sums_of(x, t, weights), without, False, 0.1)
    np.testing.assert_array_equal(found["kernel"], other["kernel"])
    np.testing.assert_array_equal(found["bias"], partly["bias"])


@pytest.mark.parametrize("rank", [None, 2])
def test_the_target_may_be_what_the_layer_makes_of_dense_inputs(rank):
    rng, x, _, weights, start = random_rows(3)
    z = x + rng.normal(size=x.shape)
    target = z @ start["kernel"] + start["bias"]
    found = regression.fit_layer(sums_of(x, z, weights), start, False, 0.1, rank)
    expected = regression.fit_layer(sums_of(x, target, weights), start, True, 0.1, rank)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("into", ["down", "up"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_low_rank_layer_is_the_best_of_its_rank(rank, into):
    rng, x, t, weights, start = random_rows(4)
    found = regression.fit_layer(sums_of(x, t, weights), start, True, 0.1, rank, into)
    down, up = (found[side].astype(float) for side in ("down", "up"))
    assert (down.shape, up.shape) == ((rank, 6), (rank, 5))
    rows, targets = augmented(
        centred(x, weights), centred(t, weights), weights, start["kernel"], 0.1
    )
    free = np.linalg.lstsq(rows, targets)[0]

    def error(kernel):
        return ((rows @ kernel - targets) ** 2).sum()

    ours = error(down.T @ up) * (1 - 1e-6)
    assert error(free) < ours
    for _ in range(50):
        basis = np.linalg.qr(rng.normal(size=(5, rank)))[0]
        assert ours < error(free @ basis @ basis.T)  # the best of the rank with these outputs
        assert ours < error(rng.normal(size=(6, rank)) @ rng.normal(size=(rank, 5)))
        moved = (side + 0.01 * rng.normal(size=side.shape) for side in (down, up))
        assert ours < error(next(moved).T @ next(moved))
    bias = weights @ (t - x @ down.T @ up) / weights.sum()
    np.testing.assert_allclose(found["bias"], bias, atol=1e-4)


def test_a_large_mean_beside_a_small_spread_costs_no_digits():
    """Sums about zero would lose the spread to float32; those about the means add up as well."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 50, 4)) + 1000).astype(np.float32)
    t = (rng.normal(size=(3, 50, 2)) - 1000).astype(np.float32)
    weights = rng.uniform(0.1, 2, (3, 50)).astype(np.float32)
    sums = on_each_device(regression.sums_over, make_mesh(), (SPLIT, SPLIT), WHOLE)
    total = regression.added_up(
        jax.jit(sums)(regression.Rows(*rows), own) for *rows, own in zip(x, t, weights, strict=True)
    )
    expected = sums_of(
        x.reshape(150, 4).astype(float),
        t.reshape(150, 2).astype(float),
        weights.ravel().astype(float),
    )
    for side, mean in (("xx", "x"), ("xt", "t")):
        covariance, wanted = (
            s[side] / s["count"] - np.outer(s["x"], s[mean]) / s["count"] ** 2
            for s in (total, expected)
        )
        np.testing.assert_allclose(covariance, wanted, atol=1e-5)
