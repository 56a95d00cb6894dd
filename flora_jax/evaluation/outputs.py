"""What the outputs of a network mean, and all that follows from it.

Each kind is one value, from which losses, metrics, commands, exports and cards take what differs.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from flora_jax.evaluation import quality
from flora_jax.evaluation.quality import Quality
from flora_jax.models.spec import Spec


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The meaning of outputs [B, n].

    Attributes:
      title: in words, of n of them.
      card: what such a network does, after its name.
      quality: how good a network is.
      read: outputs -> what people read of them, float32 [B, n].
      loss: (outputs, the teacher's) -> float32 [B]; None: a network learns its tokens alone.
      shown: the format of one value for people; empty: they are nothing to read.
    """

    title: str
    card: str
    quality: Quality
    read: Callable[[jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array] | None
    shown: str = ""

    @property
    def are_logits(self) -> bool:
        """Whether what people read of them are probabilities, the largest first."""
        return self.shown.endswith("%")


def unit_vectors(x: jax.Array) -> jax.Array:
    """Vectors [..., D] at length one."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def probabilities(logits: jax.Array) -> jax.Array:
    """Softmax of logits [B, classes] in float32."""
    return jax.nn.softmax(logits.astype(jnp.float32))


def _of_classes(logits: jax.Array, taught: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), probabilities(taught))


def _of_labels(logits: jax.Array, taught: jax.Array) -> jax.Array:
    logits, taught = logits.astype(jnp.float32), taught.astype(jnp.float32)
    return optax.sigmoid_binary_cross_entropy(logits, jax.nn.sigmoid(taught)).sum(-1)


def _of_numbers(values: jax.Array, taught: jax.Array) -> jax.Array:
    return jnp.square(values.astype(jnp.float32) - taught.astype(jnp.float32)).sum(-1)


# fmt: off
OUTPUTS = {
    "classes": Outputs(
        "{:,} classes", "that tells {} classes apart",
        quality.CLASSIFICATION, jax.nn.softmax, _of_classes, ".1%",
    ),
    "labels": Outputs(
        "{:,} independent labels", "that says of each of {} labels whether it applies",
        quality.OF_LABELS, jax.nn.sigmoid, _of_labels, ".1%",
    ),
    "numbers": Outputs(
        "{:,} estimated numbers", "that estimates numbers, {} of each image",
        quality.OF_NUMBERS, jnp.asarray, _of_numbers, ".4g",
    ),
    "embedding": Outputs(
        "an embedding of {:,} dimensions", "for embeddings of {} dimensions, in a space with texts",
        quality.AGREEMENT, unit_vectors, quality.relative_error,
    ),
    "features": Outputs("no classes", "for features", quality.AGREEMENT, unit_vectors, None),
}
# fmt: on


def outputs_of(spec: Spec) -> Outputs:
    """What the outputs of networks of this spec mean."""
    return OUTPUTS[spec.kind]


def outputs_title(spec: Spec) -> str:
    """The same in words: "10 classes"."""
    return outputs_of(spec).title.format(spec.num_classes)


def quality_of(spec: Spec) -> Quality:
    """The quality of networks of this spec: of one without classes, that of its outputs."""
    return outputs_of(spec).quality
