"""Learning from the teacher's tokens beside its predictions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.cluster.mesh import make_mesh
from flora_jax.models import functional
from flora_jax.training.losses import feature_error, task_loss
from flora_jax.training.step import initial_state, make_step
from tests.helpers.networks import TWO_BLOCKS, logits
from tests.helpers.training import NORMALIZATION, SETTINGS, batch_of

SPEC = TWO_BLOCKS


def test_the_error_is_a_share_of_the_targets_square():
    target = jnp.array([[[3.0, 4.0], [0.0, 2.0]]])
    assert feature_error(target, target) == 0
    assert feature_error(jnp.zeros_like(target), target) == pytest.approx(1.0)
    assert feature_error(target + jnp.array([[[3.0, 4.0], [0.0, 0.0]]]), target) == pytest.approx(
        0.5
    )


def test_it_is_added_to_the_soft_targets():
    student, teacher = flora.create(SPEC, seed=1), flora.create(SPEC, seed=2)
    batch = batch_of(0)
    images = NORMALIZATION(jnp.asarray(batch["image"]))
    structure, parameters = functional.split(student)
    teacher_structure, teacher_parameters = functional.split(teacher)
    soft = task_loss(logits(student, images), jax.nn.softmax(logits(teacher, images)))
    features = jax.jit(lambda parameters: functional.merge(structure, parameters).features(images))
    error = feature_error(features(parameters), features(teacher_parameters))
    settings = dataclasses.replace(SETTINGS, distill_features=0.7)
    step = make_step(structure, settings, NORMALIZATION, make_mesh(), teacher_structure)
    state = initial_state(structure, parameters, settings)
    _, metrics = step(state, batch, None, teacher_parameters)
    np.testing.assert_allclose(metrics[0], soft + 0.7 * error, rtol=1e-5)


def test_tokens_that_left_are_refused():
    features = jnp.ones((2, 5, 4))
    with pytest.raises(ValueError, match=r"features have shape \(4, 4\), the teacher's \(5, 4\)"):
        feature_error(features[:, :4], features)
