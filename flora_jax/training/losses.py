"""Losses: the labels, and distillation from the uncompressed model (FLORA, section 4).

The published target is the uncompressed model itself on the same augmented image, its top 100
probabilities, the rest of the mass spread evenly over the other classes:

    loss = soft cross entropy(logits, targets)

Outputs that are no classes have the loss of their kind (`evaluation.outputs`). Ours beside it is
the weight `distill_features`, of how far the tokens are from the teacher's.
"""

import jax
import jax.numpy as jnp
import optax

from flora_jax.evaluation.outputs import outputs_of
from flora_jax.evaluation.quality import relative_error
from flora_jax.models.spec import Spec

READ_SHARE = 0.5  # weight of tokens that outputs are made of, as a share of all others together

Outputs = tuple[jax.Array, jax.Array]  # logits or pooled feature [B, ...], tokens [B, N, D]


def task_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Soft cross entropy of logits [B, classes] against probabilities [B, classes], mean over B."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets).mean()


def soft_targets(probs: jax.Array, index: jax.Array, num_classes: int) -> jax.Array:
    """The likeliest classes of a prediction, and the rest of the mass evenly over the others.

    Args:
      probs: float [B, k], as they were stored, k at most num_classes.
      index: integer [B, k], the class of each; no class twice in a row.

    Returns:
      float32 [B, num_classes], rows sum to 1.
    """
    probs = probs.astype(jnp.float32)
    rest = jnp.maximum(1 - probs.sum(-1), 0)
    others = rest / max(num_classes - probs.shape[-1], 1)
    targets = jax.vmap(lambda other, i, p: jnp.full(num_classes, other).at[i].set(p))(
        others, index.astype(jnp.int32), probs
    )
    return targets / targets.sum(-1, keepdims=True)  # rounding may have left more or less than 1


def feature_error(features: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error of features [B, N, D], a token's as a share of its target's square; mean."""
    return relative_error(features, target).mean()


def features_loss(
    outputs: tuple[jax.Array, jax.Array], taught: tuple[jax.Array, jax.Array], spec: Spec
) -> jax.Array:
    """All that a network without classes learns from a teacher: (pooled [B, D], tokens [B, N, D]).

    Tokens in front that alone are read weigh half of all others. A pooled feature that is none of
    the tokens counts as one more: the weights of an attention pool would learn nothing from the
    tokens, and only decay.
    """
    (pooled, tokens), (target_pooled, target_tokens) = outputs, taught
    if not spec.pools_prefix:
        return feature_error(tokens, target_tokens) + feature_error(pooled, target_pooled)
    read = spec.num_read_tokens
    of_read = feature_error(tokens[:, :read], target_tokens[:, :read])
    of_others = feature_error(tokens[:, read:], target_tokens[:, read:])
    return (of_others + READ_SHARE * of_read) / (1 + READ_SHARE)


def distillation_loss(
    outputs: Outputs, taught: Outputs, spec: Spec, distill_features: float
) -> jax.Array:
    """The loss of a network beside its teacher's outputs on the same images, float32 [].

    Args:
      spec: of the network; without a head it learns the features alone.
      distill_features: weight of the tokens' error; 0 for none, and for 1 without a head.
    """
    loss = outputs_of(spec).loss
    if loss is None:
        return (distill_features or 1.0) * features_loss(outputs, taught, spec)
    extra = distill_features * feature_error(outputs[1], taught[1]) if distill_features else 0.0
    return loss(outputs[0], taught[0]).mean() + extra
