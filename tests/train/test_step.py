"""The training step against a calculation by hand, and against itself in other settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.cluster.mesh import make_mesh
from flora_jax.data.normalize import Normalization
from flora_jax.models import functional
from flora_jax.training.step import make_step
from tests.helpers.training import (
    NORMALIZATION,
    SETTINGS,
    SPEC,
    a_network,
    batch_of,
    genes_of,
    parameters_of,
    states,
)


def assert_near(ours, theirs, tolerance):
    """The difference's norm relative to the parameter's own."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.linalg.norm(ours[name] - value) <= tolerance * np.linalg.norm(value), name


def test_moving_average(by_hand):
    average = parameters_of(a_network())
    for state, _ in by_hand:
        for name, value in state.parameters.items():
            average[name] = 0.5 * average[name] + 0.5 * value
    assert_near(by_hand[-1][0].average, average, 1e-6)
    raw = by_hand[-1][0].parameters
    assert all(np.linalg.norm(average[name] - raw[name]) > 0 for name in raw)


def test_one_program_serves_every_subnet(by_hand):
    """And every run of equal settings, whatever its weights."""
    assert len({tuple(genes_of(i)) for i in range(len(by_hand))}) > 3
    structure, equal_structure = (functional.split(a_network(seed=seed))[0] for seed in (0, 1))
    step = make_step(structure, SETTINGS, NORMALIZATION, make_mesh(), None)
    settings = dataclasses.replace(SETTINGS)
    assert make_step(equal_structure, settings, Normalization(), make_mesh(), None) is step
    assert step._cache_size() == 1
    settings = dataclasses.replace(SETTINGS, b1=0.8)
    assert make_step(structure, settings, NORMALIZATION, make_mesh(), None) is not step


def test_masked_and_sliced_train_alike(by_hand):
    masked = states(SETTINGS, 5, a_network("masked"))[-1][0].parameters
    assert_near(masked, by_hand[4][0].parameters, 1e-5)


@pytest.mark.slow
def test_a_loop_over_blocks_trains_alike():
    """With a teacher, whose blocks are in a loop too."""
    spec = dataclasses.replace(SPEC, depth=3, blocks=())
    space = flora.RankSpace.regular(spec, ratios=(1 / 2, 1))
    network = flora.factorize(flora.create(spec), space).network
    teacher = flora.create(spec, seed=1)
    expected = states(SETTINGS, 3, network, teacher, space)[-1][0]
    for rematerialize in (False, True):
        settings = dataclasses.replace(SETTINGS, loop_over_blocks=True, rematerialize=rematerialize)
        state = states(settings, 3, network, teacher, space)[-1][0]
        assert_near(state.parameters, expected.parameters, 1e-5)


def test_accumulated_gradient(by_hand):
    accumulated = states(dataclasses.replace(SETTINGS, accumulate=4), 2)
    for (state, metrics), (whole, whole_metrics) in zip(accumulated, by_hand[:2], strict=True):
        np.testing.assert_allclose(metrics, whole_metrics, rtol=1e-5)
        assert_near(state.parameters, whole.parameters, 1e-5)


def test_bfloat16(by_hand):
    narrow = states(dataclasses.replace(SETTINGS, compute_dtype="bfloat16"), 2)
    for (state, metrics), (_, wide_metrics) in zip(narrow, by_hand[:2], strict=True):
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(state)}
        assert dtypes == {np.dtype("int32"), np.dtype("float32")}
        np.testing.assert_allclose(metrics, wide_metrics, rtol=5e-2)
        assert (metrics != wide_metrics).all()


def logits_of(model, genes=None):
    model = functional.merge(*functional.split(model), genes)
    return np.float64(model(NORMALIZATION(jnp.asarray(batch_of(0)["image"]))))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def cross_entropy(logits, targets):
    return -(targets * log_softmax(logits)).sum(-1).mean()


def test_loss_of_labels(by_hand):
    targets = 0.7 * np.eye(3)[batch_of(0)["label"]] + 0.3 / 3
    wanted = cross_entropy(logits_of(a_network(), genes_of(0)), targets)
    np.testing.assert_allclose(by_hand[0][1][0], wanted, rtol=1e-5)


def test_teacher():
    teacher = flora.create(SPEC, seed=1)
    ((_, metrics),) = states(SETTINGS, 1, teacher=teacher)
    targets = np.exp(log_softmax(logits_of(teacher)))
    wanted = cross_entropy(logits_of(a_network(), genes_of(0)), targets)
    np.testing.assert_allclose(metrics[0], wanted, rtol=1e-5)
