"""Mixup and CutMix of a batch, and the step that uses them."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.cluster.mesh import make_mesh
from flora_jax.data.normalize import Normalization
from flora_jax.models import functional
from flora_jax.training.losses import task_loss
from flora_jax.training.mixing import mix
from flora_jax.training.settings import TrainSettings
from flora_jax.training.step import initial_state, make_step
from tests.helpers.networks import ONE_BLOCK, logits, random_model

SIZE, BATCH = 16, 4
# Image i is filled with the value i, so that a pixel tells where it comes from.
IMAGES = np.broadcast_to(np.arange(BATCH, dtype=np.float32)[:, None, None, None], (4, 16, 16, 3))
TARGETS = np.eye(BATCH, dtype=np.float32)


compiled = jax.jit(mix, static_argnums=(3, 4))


def mixed(seed, mixup, cutmix):
    return jax.tree.map(np.asarray, compiled(jax.random.key(seed), IMAGES, TARGETS, mixup, cutmix))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), alphas=st.sampled_from([(0.8, 0), (0, 1.0), (0.8, 1.0)]))
def test_targets_tell_the_share_of_the_pixels(seed, alphas):
    images, targets = mixed(seed, *alphas)
    own = np.diagonal(targets)
    partner = np.diagonal(targets[:, ::-1])
    np.testing.assert_allclose(own + partner, 1, atol=1e-6)
    np.testing.assert_allclose(own, own[0], atol=1e-6)  # one proportion for the batch
    expected = own * np.arange(BATCH) + partner * np.arange(BATCH)[::-1]
    means = images.mean(axis=(1, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(means, expected, atol=1e-5)


def test_mixup_blends_every_pixel():
    images, targets = mixed(3, 0.8, 0)
    assert 0 < targets[0, 0] < 1
    np.testing.assert_allclose(images[0], 3 * (1 - targets[0, 0]), rtol=1e-5)


def test_cutmix_cuts_one_box():
    areas = []
    for seed in range(20):
        images, _ = mixed(seed, 0, 1.0)
        assert set(np.unique(images[0])) <= {0.0, 3.0}
        rows, columns = np.nonzero(images[0, :, :, 0])
        if len(rows):
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert height * width == len(rows)
        areas.append(len(rows))
    assert len(set(areas)) > 8


def test_both_take_turns():
    is_cut = [set(np.unique(mixed(seed, 0.8, 1.0)[0][0])) <= {0.0, 3.0} for seed in range(60)]
    assert 15 < sum(is_cut) < 45


def test_mean_share_is_that_of_the_distribution():
    """Beta(1, 1) has mean 1/2; boxes that are cut off at the edges are smaller than drawn."""
    shares = [mixed(seed, 1.0, 0)[1][0, 0] for seed in range(200)]
    assert abs(np.mean(shares) - 0.5) < 0.06
    assert min(shares) < 0.05
    assert max(shares) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "seeds"), [(1, (0, 1)), (2, (0,))])
def test_the_step_learns_from_mixed_images(accumulate, seeds):
    model = random_model(ONE_BLOCK)
    structure, parameters = functional.split(model)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 8, 8, 3), np.uint8)
    batch = {"image": images, "label": np.array([0, 1, 2, 0], np.int32)}
    recipe = TrainSettings(
        steps=5, batch_size=4, learning_rate=1e-3, mixup=0.8, cutmix=1.0, accumulate=accumulate
    )
    normalization, losses = Normalization(), []
    for seed in seeds:
        seeded = dataclasses.replace(recipe, seed=seed)
        step = make_step(structure, seeded, normalization, make_mesh())
        _, metrics = step(initial_state(structure, parameters, seeded), batch, None, None)
        key = jax.random.fold_in(jax.random.key(seed), 0)
        targets = jax.nn.one_hot(batch["label"], 3)
        mixed_images, mixed_targets = compiled(key, normalization(images), targets, 0.8, 1.0)
        found = logits(model, mixed_images)
        np.testing.assert_allclose(metrics[0], task_loss(found, mixed_targets), rtol=1e-5)
        losses.append(float(metrics[0]))
    assert len(set(losses)) == len(seeds)
