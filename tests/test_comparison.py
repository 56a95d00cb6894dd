"""Models compared image by image: what each makes of an image, and intervals of differences."""

import numpy as np
import pytest
import scipy.stats

import flora_jax as flora
from flora_jax.evaluation.comparison import baseline_pairs, budget_name, compare, paired_interval
from flora_jax.evaluation.evaluate import evaluate_images
from tests.helpers.training import NORMALIZATION, SPEC, batch_of


def test_results_of_each_image_are_those_of_evaluate():
    """20 images in batches of 8; what fills up the last batch and an image in the middle, which
    was skipped, would count if they were not left out."""
    model = flora.create(SPEC)
    is_image = (np.arange(24) < 21) & (np.arange(24) != 9)
    masks = np.float32(is_image).reshape(3, 8)
    batches = [batch_of(i) | {"mask": mask} for i, mask in enumerate(masks)]
    images = flora.EvaluationSet(batches, NORMALIZATION)
    found = evaluate_images(model, images)
    logits = np.concatenate([model(NORMALIZATION(batch["image"])) for batch in batches])
    logits = logits[is_image]
    labels = np.concatenate([batch["label"] for batch in batches])[is_image]
    assert [(values.dtype, values.shape) for values in found.values()] == [
        (np.bool_, (20,)),
        (np.float32, (20,)),
        (np.int32, (20,)),
    ]
    np.testing.assert_array_equal(images.labels, labels)
    np.testing.assert_array_equal(found["predicted"], logits.argmax(-1))
    np.testing.assert_array_equal(found["is_correct"], logits.argmax(-1) == labels)
    means = flora.evaluate(model, images)
    assert found["is_correct"].mean() == means["top1"] != 0
    assert found["log_likelihood"].mean() == pytest.approx(means["log_likelihood"][0], rel=1e-6)


@pytest.mark.parametrize("n", [450, 20_000])
def test_interval_is_that_of_the_normal_distribution_and_of_scipy(n):
    differences = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], n, p=[0.05, 0.85, 0.1])
    difference, low, high = paired_interval(differences)
    assert difference == differences.mean()
    margin = 1.96 * differences.std() / n**0.5
    assert (low, high) == pytest.approx((difference - margin, difference + margin), abs=margin / 10)
    theirs = scipy.stats.bootstrap(
        (differences,), np.mean, n_resamples=2000, batch=50, method="percentile", rng=0
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(theirs), abs=1e-9)


def test_interval_of_one_image_is_that_image():
    assert paired_interval(np.array([0.25])) == (0.25, 0.25, 0.25)


def test_models_that_err_on_the_same_images_are_known_to_be_close():
    """Each has 60 % of 1000 images; they differ in ten, or in as many as chance makes them."""
    rng = np.random.default_rng(2)
    dense = {"is_correct": np.arange(1000) < 600, "log_likelihood": np.zeros(1000, np.float32)}
    shifted = {"is_correct": np.roll(dense["is_correct"], 5), "log_likelihood": np.full(1000, -0.5)}
    mixed = dense | {"is_correct": rng.permutation(dense["is_correct"])}
    results = {"dense": dense, "shifted": shifted, "mixed": mixed}
    compared = compare(results, [("shifted", "dense"), ("mixed", "dense")])
    assert compared["shifted"]["dense"]["log_likelihood"] == (-0.5, -0.5, -0.5)
    widths = {}
    for name in ("shifted", "mixed"):
        difference, low, high = compared[name]["dense"]["top1"]
        assert difference == 0
        assert low < 0 < high
        widths[name] = high - low
    assert widths["shifted"] < 0.02 < widths["mixed"]


def test_pairs_are_of_one_budget():
    assert budget_name("subnet", (0.5, 0.546)) == "subnet 0.546"
    names = ["dense", "slim", "subnet 0.55", "uniform 0.55", "subnet 0.4", "allocated 0.4"]
    assert list(baseline_pairs(names)) == [
        ("slim", "dense"),
        ("subnet 0.55", "uniform 0.55"),
        ("subnet 0.55", "dense"),
        ("uniform 0.55", "dense"),
        ("subnet 0.4", "allocated 0.4"),
        ("subnet 0.4", "dense"),
        ("allocated 0.4", "dense"),
    ]
    assert list(baseline_pairs(["subnet", "uniform", "allocated"])) == [
        ("subnet", "uniform"),
        ("subnet", "allocated"),
        ("allocated", "uniform"),
    ]
