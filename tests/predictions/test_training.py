"""The same training as with the teacher at hand."""

import contextlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.cluster.mesh import make_mesh, shard_batch
from flora_jax.models import functional
from flora_jax.training.settings import TrainSettings
from flora_jax.training.step import initial_state, make_step, soft_targets
from flora_jax.training.stored_predictions import StoredPredictions, Teacher, compare_predictions
from tests.helpers.predictions import (
    BATCH_SIZE,
    NORMALIZATION,
    STEPS,
    a_description,
    a_model,
    batches,
    first_batches,
    read_all,
    write,
)

pytestmark = pytest.mark.slow


def loss(batch, teacher_model=None, accumulate=1):
    recipe = TrainSettings(
        steps=STEPS, batch_size=BATCH_SIZE, learning_rate=1e-3, accumulate=accumulate
    )
    structure, parameters = functional.split(a_model(seed=2))
    teacher = functional.split(teacher_model) if teacher_model else (None, None)
    step = make_step(structure, recipe, NORMALIZATION, make_mesh(), teacher[0])
    batch = shard_batch(batch, make_mesh())
    return np.asarray(
        step(initial_state(structure, parameters, recipe), batch, None, teacher[1])[1]
    )


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_is_that_of_the_teacher_at_hand(tmp_path, teacher, accumulate):
    """Of a whole prediction: k = 100 is more than there are classes."""
    description = a_description(teacher, k=100, steps=5)
    assert description.k == 10
    write(tmp_path, description, teacher)
    start = 3  # in the first epoch; step 4 is in the next
    reader = StoredPredictions(tmp_path, description)
    with contextlib.closing(reader.attach(batches(start), start)) as attached:
        pairs = list(zip(first_batches(2, start), itertools.islice(attached, 2), strict=True))
    for batch, with_targets in pairs:
        np.testing.assert_array_equal(batch["image"], with_targets["image"])
        wanted = loss(batch, a_model(seed=1))
        np.testing.assert_allclose(loss(with_targets, None, accumulate), wanted, rtol=1e-3)
        assert abs(loss(batch)[0] / wanted[0] - 1) > 1e-2  # the labels teach something else


def test_stored_targets_and_a_teacher_exclude_each_other(stored, description):
    batch = {**first_batches(1)[0], **read_all(stored, description)[0]}
    with pytest.raises(ValueError, match="a teacher or stored predictions, not both"):
        loss(batch, a_model(seed=5))


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=30)
def test_soft_targets(data):
    """Against numpy in float64, for predictions from flat to certain."""
    num_classes = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, num_classes))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    logits = data.draw(st.sampled_from([0, 1, 30])) * rng.normal(size=(3, num_classes))
    exact = np.exp(logits - logits.max(-1, keepdims=True))
    exact /= exact.sum(-1, keepdims=True)
    index = np.argsort(-exact, -1)[:, :k].astype(np.int16)
    probs = np.take_along_axis(exact, index.astype(int), -1).astype(np.float16)

    targets = np.asarray(soft_targets(probs, index, num_classes))
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
    for row, p, i in zip(targets, np.float64(probs), index, strict=True):
        np.testing.assert_allclose(row[i], p, rtol=2e-3)
        others = np.delete(row, i)
        np.testing.assert_allclose(others, max(0, 1 - p.sum()) / max(1, others.size), atol=1e-6)


def test_soft_targets_of_more_classes_than_int16_holds():
    targets = soft_targets(np.float16([[0.75]]), np.uint16([[40_000]]), 40_001)
    np.testing.assert_allclose(targets[0, 40_000], 0.75)
    np.testing.assert_allclose(targets[0, :-1], 0.25 / 40_000, rtol=1e-6)


def test_comparison_with_a_fresh_pass(stored, description, teacher):
    with contextlib.closing(StoredPredictions(stored, description).attach(batches(0))) as stream:
        attached = list(itertools.islice(stream, 3))
    largest, mean = compare_predictions(teacher, attached)
    assert 0 < mean < largest <= 2.5e-4
    other = compare_predictions(Teacher(a_model(seed=2), NORMALIZATION), attached)
    assert other.largest > 0.1
    assert other.mean > 0.01
    with pytest.raises(ValueError, match="no batch to compare"):
        compare_predictions(teacher, [])
