"""Metrics: of a model's predictions by labels, or of its outputs beside another model's.

Each is one value, from which evaluation, search, comparison and report take what differs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flora_jax.errors import InputError
from flora_jax.errors.hints import choices
from flora_jax.models.network import Network, run_blocks


@dataclasses.dataclass(frozen=True)
class Metric:
    """A mean over images, and how it is shown.

    Attributes:
      name: in settings and files.
      title: in words, of an axis.
      column: the title of its column in a table.
      of_image: the name of its values, one an image.
      in_percent: whether people read it in percent, a difference in percentage points.
      more_is_better: whether the greatest value is the best.
    """

    name: str
    title: str
    column: str
    of_image: str
    in_percent: bool = False
    more_is_better: bool = True

    @property
    def scale(self) -> int:
        """The factor by which a value is shown."""
        return 100 if self.in_percent else 1

    @property
    def label(self) -> str:
        """The title of an axis."""
        return f"{self.title} (%)" if self.in_percent else self.title

    @property
    def digits(self) -> int:
        """Decimals of a shown value."""
        return 2 if self.in_percent else 4

    def score(self, values: np.ndarray) -> np.ndarray:
        """The same values, such that the greatest is the best."""
        return values if self.more_is_better else -values


TOP1 = Metric("top1", "top-1 accuracy", "top-1 %", "is_correct", in_percent=True)
LOG_LIKELIHOOD = Metric("log_likelihood", "log-likelihood", "log-likelihood", "log_likelihood")
COSINE = Metric("cosine", "cosine to the dense model", "cosine", "cosine")
RELATIVE_ERROR = Metric(
    "relative_error",
    "relative error of the features",
    "relative error",
    "relative_error",
    more_is_better=False,
)
LABELS = Metric("same_labels", "labels of the dense model", "same labels %", "same_labels", True)
ABSOLUTE_ERROR, SQUARED_ERROR = (
    Metric(name, f"{title} to the dense model", title, name, more_is_better=False)
    for name, title in (("absolute_error", "absolute error"), ("squared_error", "squared error"))
)
METRICS = (TOP1, LOG_LIKELIHOOD, COSINE, RELATIVE_ERROR, LABELS, ABSOLUTE_ERROR, SQUARED_ERROR)


@dataclasses.dataclass(frozen=True)
class Quality:
    """The metrics of a kind of network, and their computation on a batch. Hashable.

    Attributes:
      metrics: the first is the one that is shown wherever there is room for one.
      networks: which it is of, for messages.
      by_labels: whether a target is the label of an image, and not another network's outputs.
      outputs: (network, tokens [B*N, D] of its last block) -> what is measured, arrays [B, ...].
      of_images: (outputs, target) -> {name: [B]}, all that is kept of each image.
    """

    metrics: tuple[Metric, ...]
    networks: str
    by_labels: bool
    outputs: Callable[[Network, jax.Array], Any]
    of_images: Callable[[Any, Any], dict[str, jax.Array]]

    @property
    def shown(self) -> Metric:
        return self.metrics[0]

    def of(self, network: Network, images: jax.Array) -> Any:
        """The outputs of a network for normalised images [B, H, W, C]."""
        return self.outputs(network, run_blocks(network.blocks, network.embed(images)))

    def sums(self, outputs: Any, target: Any, mask: jax.Array) -> jax.Array:
        """Sums each metric over the images whose mask [B] is not 0: float32 [1, metrics]."""
        found = self.of_images(outputs, target)
        values = jnp.stack([found[metric.of_image].astype(jnp.float32) for metric in self.metrics])
        return jnp.sum(values * mask[None], axis=1)[None]

    def metric(self, name: str) -> Metric:
        """The metric of this name, "" standing for the one that is shown.

        Raises:
          InputError: it is none of these; names the nearest.
        """
        name = name or self.shown.name
        known = {metric.name: metric for metric in self.metrics}
        if name in known:
            return known[name]
        of_others = {
            metric.name: own
            for other in QUALITIES
            for metric, own in zip(other.metrics, known, strict=True)
        }
        if name not in of_others:
            raise InputError(f"metric {name!r} is unknown; {choices(name, known)}")
        raise InputError(
            f"metric {name!r} does not fit a network {self.networks}; choose one of "
            f"{', '.join(known)} (did you mean {of_others[name]!r}?)"
        )


def classify(network: Network, tokens: jax.Array) -> jax.Array:
    return network.classify(tokens)


def _of_labelled(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    predicted = logits.argmax(-1)
    return {
        "is_correct": predicted == labels,
        "log_likelihood": -optax.softmax_cross_entropy_with_integer_labels(logits, labels),
        "predicted": predicted,
    }


def _features(network: Network, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    return network.normalised(tokens), network.classify(tokens)


def _of_features(
    outputs: tuple[jax.Array, jax.Array], target: tuple[jax.Array, jax.Array]
) -> dict[str, jax.Array]:
    (tokens, pooled), (target_tokens, target_pooled) = outputs, target
    dot = jnp.sum(pooled * target_pooled, axis=-1)
    norms = jnp.linalg.norm(pooled, axis=-1) * jnp.linalg.norm(target_pooled, axis=-1)
    return {
        "cosine": dot / jnp.maximum(norms, 1e-12),
        "relative_error": relative_error(tokens, target_tokens).mean(-1),
    }


def relative_error(features: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error of features [..., D] as a share of the target's own square, float32 [...].

    Raises:
      InputError: their shapes differ, as where tokens of one have left.
    """
    if features.shape != target.shape:
        raise InputError(
            f"features have shape {features.shape[1:]}, the teacher's {target.shape[1:]}: a "
            f"network whose tokens leave cannot be compared with them or learn from them, set "
            f"distill_features to 0"
        )
    features, target = features.astype(jnp.float32), target.astype(jnp.float32)
    error = jnp.square(features - target).sum(-1)
    return error / (jnp.square(target).sum(-1) + 1e-6)


def _of_labels(logits: jax.Array, target: jax.Array) -> dict[str, jax.Array]:
    losses = optax.sigmoid_binary_cross_entropy(logits, jax.nn.sigmoid(target))
    return {
        "same_labels": ((logits > 0) == (target > 0)).mean(-1),
        "log_likelihood": -losses.sum(-1),
    }


def _of_numbers(values: jax.Array, target: jax.Array) -> dict[str, jax.Array]:
    errors = jnp.abs(values - target)
    return {"absolute_error": errors.mean(-1), "squared_error": jnp.square(errors).mean(-1)}


CLASSIFICATION = Quality((TOP1, LOG_LIKELIHOOD), "with classes", True, classify, _of_labelled)
AGREEMENT = Quality((COSINE, RELATIVE_ERROR), "without classes", False, _features, _of_features)
OF_LABELS = Quality((LABELS, LOG_LIKELIHOOD), "with labels", False, classify, _of_labels)
OF_NUMBERS = Quality(
    (ABSOLUTE_ERROR, SQUARED_ERROR), "that estimates numbers", False, classify, _of_numbers
)
QUALITIES = (CLASSIFICATION, AGREEMENT, OF_LABELS, OF_NUMBERS)


def commonest_share(labels: np.ndarray) -> float:
    """Share in 0..1 of the commonest of the labels int [n]: what always saying it gets right."""
    return float(np.bincount(labels).max() / len(labels))
