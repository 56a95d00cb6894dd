"""A classifier to start from: linear, fitted to the features of a pretrained network.

Training from a classifier that knows nothing distorts good features before it has learnt anything
(Kumar et al. 2022, https://arxiv.org/abs/2202.10054); so new classes begin with a linear probe. It
is a discriminant analysis, in closed form for any number of classes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax.experimental import multihost_utils

from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.network import CLASSIFIERS, Network

_HELD_OUT = 5  # one image of so many tells how sure the classifier should be


def has_no_classifier(model: Network) -> bool:
    """True where the model's classifier is all zeros, as where it took the place of another's."""
    parameters = functional.split(model)[1]
    return not any(np.any(parameters[f"{name}.kernel"]) for name in _classifiers(parameters))


def fit_classifier(model: Network, batches: Iterable[tuple[jax.Array, np.ndarray]]) -> Network:
    """Puts a linear probe of the model's features in the place of its classifier.

    All processes pass the same images; the probe that the first one finds counts.

    Args:
      batches: normalised images float32 [B, H, W, C], labels int [B].
    """
    structure, parameters = functional.split(model)
    names = _classifiers(parameters)
    extract = {name: _feature_function(model, name) for name in names}
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    every_label = []
    for images, labels in batches:
        every_label.append(labels)
        for name in names:
            found[name].append(np.asarray(extract[name](images), np.float64))
    labels = np.concatenate(every_label)
    for name in names:
        probe = _probe(np.concatenate(found[name]), labels, model.spec.num_classes)
        kernel, bias = multihost_utils.broadcast_one_to_all(probe)
        parameters |= {f"{name}.kernel": jnp.array(kernel), f"{name}.bias": jnp.array(bias)}
    return functional.merge(structure, parameters)


def with_classes_in_order(model: Network, order: Sequence[int]) -> Network:
    """The model whose class i is the class order[i] of this one, for each of its classes."""
    structure, parameters = functional.split(model)
    for name in _classifiers(parameters):
        for part in (f"{name}.kernel", f"{name}.bias"):
            parameters[part] = parameters[part][..., np.array(order)]
    return functional.merge(structure, parameters)


def _classifiers(parameters: functional.Parameters) -> list[str]:
    return [name for name in CLASSIFIERS if f"{name}.kernel" in parameters]


def _feature_function(model: Network, name: str) -> Callable[[jax.Array], jax.Array]:
    """Makes a function: images [B, H, W, C] -> what this classifier sees of them, [B, D]."""
    parameters = functional.split(model)[1]
    names = _classifiers(parameters)
    width = parameters[f"{name}.kernel"].shape[0]
    for each in names:  # the identity, times as many as there are, for logits are their mean
        kernel = jnp.eye(width) * len(names) if each == name else jnp.zeros((width, width))
        parameters |= {f"{each}.kernel": kernel, f"{each}.bias": jnp.zeros(width)}
    wide = create_abstract(dataclasses.replace(model.spec, num_classes=width))
    structure = functional.split(wide)[0]
    return jax.jit(lambda images: functional.merge(structure, parameters)(images))


def _probe(
    features: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel float32 [D, classes] and bias [classes] for features float64 [n, D]."""
    is_held_out = np.arange(len(labels)) % _HELD_OUT == _HELD_OUT - 1
    kernel, bias = _discriminant(features[~is_held_out], labels[~is_held_out], num_classes)
    logits, right = features[is_held_out] @ kernel + bias, labels[is_held_out]

    def loss(log_scale: float) -> float:
        log_probs = scipy.special.log_softmax(np.exp(log_scale) * logits, axis=-1)
        return -log_probs[np.arange(len(right)), right].sum()

    scale = np.exp(scipy.optimize.minimize_scalar(loss, bounds=(-6, 0), method="bounded").x)
    kernel, bias = _discriminant(features, labels, num_classes)
    return (scale * kernel).astype(np.float32), (scale * bias).astype(np.float32)


def _discriminant(
    features: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Linear discriminant analysis with the covariance of Ledoit and Wolf (2004).

    A class without an image is as unlikely as one with half an image at the mean of all.
    """
    from sklearn.covariance import ledoit_wolf  # half a second, which few runs need

    counts = np.bincount(labels, minlength=num_classes)
    center = features.mean(axis=0)
    means = np.stack(
        [features[labels == c].mean(axis=0) if counts[c] else center for c in range(num_classes)]
    )
    covariance, _ = ledoit_wolf(features - means[labels], assume_centered=True)
    kernel = np.linalg.solve(covariance, (means - center).T)
    priors = np.log(np.maximum(counts, 0.5) / len(labels))
    bias = priors - np.einsum("cd,dc->c", means + center, kernel) / 2
    return kernel, bias
