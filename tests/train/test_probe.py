"""The linear probe that a new classifier starts as."""

import dataclasses

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

import flora_jax as flora
from flora_jax.models import functional
from flora_jax.training import probe
from tests.helpers.networks import logits

SPEC = flora.ViTSpec(
    image_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=3, mlp_ratio=2
)
SPECS = {
    "vit": SPEC,
    "distilled": dataclasses.replace(SPEC, distilled=True),
    "mean": dataclasses.replace(SPEC, pool="mean", class_token=False),
    "swin": flora.SwinSpec(
        image_size=16,
        patch_size=4,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
        window_size=2,
        num_classes=3,
    ),
}


def without_classifier(spec: flora.Spec):
    structure, parameters = functional.split(flora.create(spec))
    zeros = {k: np.zeros_like(v) for k, v in parameters.items() if k.startswith("head")}
    return functional.merge(structure, parameters | zeros)


def pictures(spec: flora.Spec, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise over a pattern for each class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=number)
    patterns = rng.normal(size=(3, *spec.image_shape))
    images = patterns[labels] + rng.normal(size=(number, *spec.image_shape))
    return images.astype(np.float32), labels


@pytest.mark.parametrize("name", SPECS)
def test_a_probe_tells_classes_apart_and_leaves_the_features_alone(name):
    model = without_classifier(SPECS[name])
    assert probe.has_no_classifier(model)
    images, labels = pictures(model.spec, 300)
    batches = [(images[i : i + 100], labels[i : i + 100]) for i in (0, 100)]
    fitted = probe.fit_classifier(model, batches)
    assert not probe.has_no_classifier(fitted)
    found = np.asarray(logits(fitted, images[200:]))
    assert (found.argmax(-1) == labels[200:]).mean() > 0.8
    likelihood = log_softmax(found, axis=-1)[np.arange(100), labels[200:]].mean()
    assert likelihood > -0.6
    before, after = (functional.split(m)[1] for m in (model, fitted))
    for key in before:
        if not key.startswith("head"):
            np.testing.assert_array_equal(before[key], after[key])


def test_the_discriminant_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=200)
    features = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=(4, 5))[labels]
    kernel, bias = probe._discriminant(features, labels, 4)
    means = np.stack([features[labels == c].mean(axis=0) for c in range(4)])
    _, shrinkage = ledoit_wolf(features - means[labels], assume_centered=True)
    covariance = np.cov((features - means[labels]).T, bias=True)
    target = np.trace(covariance) / 5 * np.eye(5)
    shrunk = (1 - shrinkage) * covariance + shrinkage * target
    theirs = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=_Fixed(shrunk))
    theirs.fit(features, labels)
    np.testing.assert_allclose(
        np.log(theirs.predict_proba(features)),
        log_softmax(features @ kernel + bias, axis=-1),
        atol=1e-4,
    )


class _Fixed:
    """A covariance that is known."""

    def __init__(self, covariance_):
        self.covariance_ = covariance_

    def fit(self, _):
        return self


@pytest.mark.parametrize("number", [3, 7])
def test_few_images_and_classes_without_any_still_give_a_probe(number):
    images, labels = pictures(SPEC, number)
    fitted = probe.fit_classifier(without_classifier(SPEC), [(images, np.zeros_like(labels))])
    logits = np.asarray(fitted(images))
    assert np.isfinite(logits).all()
    assert (logits.argmax(-1) == 0).all()
