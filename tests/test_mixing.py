import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flora_jax.train.mixing import mix

B, H, W, CLASSES = 4, 10, 14, 4

repeatable = settings(derandomize=True, deadline=None, max_examples=40)
seeds = st.integers(0, 2**31 - 1)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def mixed(key, mixup_alpha, cutmix_alpha, switch_probability=0.5, probability=1.0):
    """The batch of `batch()`, whose targets tell the lambda and whose pixels tell the partner."""
    images, targets = batch()
    return mix(key, images, targets, mixup_alpha, cutmix_alpha, switch_probability, probability)


def batch():
    """Image i is all i, with target class i: image 0 is mixed with image 3."""
    images = jnp.broadcast_to(jnp.arange(B, dtype=jnp.float32)[:, None, None, None], (B, H, W, 3))
    return images, jnp.eye(B, CLASSES)


def lambdas(count, mixup_alpha, cutmix_alpha, switch_probability=0.5, probability=1.0):
    """float [count], the shares that `count` batches keep of their own targets."""
    arguments = (mixup_alpha, cutmix_alpha, switch_probability, probability)
    draw = jax.vmap(lambda key: mixed(key, *arguments)[1][0, 0])
    return np.asarray(draw(jax.random.split(jax.random.key(0), count)))


@repeatable
@given(
    seed=seeds,
    alphas=st.sampled_from([(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.1, 5.0)]),
    probability=st.sampled_from([0.5, 1.0]),
)
def test_targets_are_mixed_with_the_reversed_batch_and_still_sum_to_1(seed, alphas, probability):
    _, targets = mixed(jax.random.key(seed), *alphas, 0.5, probability)
    share = float(targets[0, 0])
    assert 0 <= share <= 1
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
    identity = np.eye(B, CLASSES)
    np.testing.assert_allclose(targets, share * identity + (1 - share) * identity[::-1], atol=1e-6)


@repeatable
@given(seed=seeds, alpha=st.sampled_from([0.2, 0.8, 3.0]))
def test_mixup_mixes_pixels_by_the_lambda_of_the_targets(seed, alpha):
    images, targets = mixed(jax.random.key(seed), alpha, 0.0)
    plain, share = np.asarray(batch()[0]), float(targets[0, 0])
    np.testing.assert_allclose(images, share * plain + (1 - share) * plain[::-1], atol=1e-5)


@repeatable
@given(seed=seeds, alpha=st.sampled_from([0.2, 1.0, 3.0]))
def test_cutmix_puts_in_one_box_whose_area_is_that_of_the_targets(seed, alpha):
    images, targets = mixed(jax.random.key(seed), 0.0, alpha)
    plain = np.asarray(batch()[0])
    swapped = np.asarray(images[0, :, :, 0] == B - 1)
    expected = np.where(swapped[None, :, :, None], plain[::-1], plain)
    np.testing.assert_array_equal(images, expected)
    rows, columns = swapped.any(1), swapped.any(0)
    np.testing.assert_array_equal(swapped, rows[:, None] & columns)
    for line in (rows, columns):
        assert np.abs(np.diff(np.pad(line, 1).astype(int))).sum() in (0, 2)  # one run
    assert float(targets[0, 0]) == pytest.approx(1 - swapped.mean(), abs=1e-6)


def test_a_box_away_from_the_edges_has_the_sides_that_lambda_asks_for():
    """The largest of many boxes drawn around lambda 1/2 was not cut by an edge."""
    images, _ = jax.vmap(lambda key: mixed(key, 0.0, 1e6))(jax.random.split(jax.random.key(0), 300))
    areas = np.asarray(images[:, 0, :, :, 0] == B - 1).sum((1, 2))
    side = np.sqrt(0.5)
    assert areas.max() == 2 * (int(H * side) // 2) * 2 * (int(W * side) // 2)
    assert areas.min() < areas.max() / 2


def test_lambda_of_mixup_has_the_beta_distribution():
    for alpha in (0.8, 2.0):
        drawn = lambdas(4000, alpha, 0.0)
        assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_cutmix_takes_the_place_of_mixup_as_often_as_asked():
    """Lambda of mixup is near 1/2 here; of CutMix it is a whole number of pixels over H * W."""
    for switch_probability in (0.0, 0.3, 1.0):
        pixels = lambdas(2000, 1e6, 1.0, switch_probability) * H * W
        is_cutmix = np.abs(pixels - H * W / 2) > 1
        assert is_cutmix.mean() == pytest.approx(switch_probability, abs=0.05)


def test_a_share_of_the_batches_is_left_alone():
    kept = lambdas(2000, 0.8, 0.0, probability=0.25) == 1
    assert kept.mean() == pytest.approx(0.75, abs=0.04)
    images, targets = mixed(jax.random.key(0), 0.8, 1.0, 0.5, 0.0)
    np.testing.assert_array_equal(images, batch()[0])
    np.testing.assert_array_equal(targets, batch()[1])


def test_alpha_0_turns_either_off_whatever_the_switch_says():
    for switch_probability in (0.0, 1.0):
        values = np.unique(mixed(jax.random.key(1), 0.0, 1.0, switch_probability)[0])
        assert set(values) <= set(range(B))
        values = mixed(jax.random.key(1), 1e6, 0.0, switch_probability)[0]
        np.testing.assert_allclose(values, (B - 1) / 2, atol=0.01)
    images, targets = batch()
    untouched = mix(jax.random.key(0), images, targets, 0.0, 0.0)
    assert untouched == (images, targets)


def test_the_same_key_mixes_the_same_with_and_without_jit():
    images, targets = batch()
    for seed in range(4):
        key = jax.random.key(seed)
        compiled, again = mixed(key, 0.8, 1.0), mixed(key, 0.8, 1.0)
        direct = mix(key, images, targets, 0.8, 1.0)
        for one, other, third in zip(compiled, again, direct, strict=True):
            np.testing.assert_array_equal(one, other)
            np.testing.assert_allclose(one, third, atol=1e-5)
    one, other = (mixed(jax.random.key(seed), 0.8, 0.0)[1] for seed in (0, 1))
    assert (one != other).any()


def test_bfloat16_images_keep_their_type_and_are_blended_in_float32():
    images, targets = batch()
    key = jax.random.key(3)
    expected, _ = mix(key, images, targets, 0.8, 0.0)
    low, low_targets = mix(key, images.astype(jnp.bfloat16), targets, 0.8, 0.0)
    assert (low.dtype, low_targets.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(low, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mixup_alpha": -0.1}, "mixup_alpha must be at least 0 .* got -0.1"),
        ({"cutmix_alpha": float("nan")}, "cutmix_alpha must be at least 0 .* got nan"),
        ({"switch_probability": 1.5}, r"switch_probability must lie in 0\.\.1, got 1.5"),
        ({"probability": -1}, r"probability must lie in 0\.\.1, got -1"),
    ],
)
def test_mix_errors(arguments, message):
    arguments = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, **arguments}
    with pytest.raises(ValueError, match=message):
        mix(jax.random.key(0), *batch(), **arguments)
