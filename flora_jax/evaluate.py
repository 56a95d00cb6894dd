"""Top-1 accuracy over a set of images that stays on the device."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flora_jax.data.normalize import Normalization
from flora_jax.lowrank.supernet import Supernet
from flora_jax.mesh import make_mesh, replicate, spread
from flora_jax.models import functional


class EvaluationSet:
    """Normalised batches on the device: images [B, H, W, C], labels [B], mask [B].

    The mask is 0 for the images that only fill up the last batch. Every process passes the same
    batches, whole.

    Raises:
      ValueError: there is no image.
    """

    def __init__(self, batches: Iterable[dict[str, np.ndarray]], normalization: Normalization):
        mesh = make_mesh()
        normalize = jax.jit(normalization)
        self.batches = []
        self.num_images = 0
        for batch in batches:
            self.num_images += int(batch["mask"].sum())
            images, labels, mask = (
                spread(batch[name], mesh) for name in ("image", "label", "mask")
            )
            self.batches.append((normalize(images), labels, mask))
        if not self.num_images:
            raise ValueError("an evaluation set needs at least one image")


def count_correct(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """logits [B, classes], labels [B], mask [B] -> int32 []"""
    return jnp.sum((logits.argmax(-1) == labels) * mask).astype(jnp.int32)


@jax.jit(static_argnums=0)
def _count_correct(graphdef, parameters, batch, genes):
    images, labels, mask = batch
    return count_correct(functional.merge(graphdef, parameters)(images, genes), labels, mask)


def top1(
    model: nnx.Module | Supernet, evaluation_set: EvaluationSet, genes=None
) -> float | np.ndarray:
    """Share of the images whose class comes first.

    Args:
      model: a plain model, or a supernet.
      genes: of the supernet: int [L] for one subnet, int [P, L] for a population.

    Returns:
      A float, or float64 [P] for a population. The device is read back once.

    Raises:
      ValueError: genes that do not fit the supernet.
    """
    if isinstance(model, Supernet):
        genes, model = model.space.validate(genes), model.network
    graphdef, parameters = functional.split(model)
    parameters = replicate(parameters, make_mesh())
    population = [None] if genes is None else np.atleast_2d(np.asarray(genes, np.int32))
    correct = [
        sum(_count_correct(graphdef, parameters, batch, one) for batch in evaluation_set.batches)
        for one in population
    ]
    scores = np.asarray(jax.device_get(correct), np.float64) / evaluation_set.num_images
    return scores if np.ndim(genes) == 2 else float(scores[0])
