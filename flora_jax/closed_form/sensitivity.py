"""Sensitivity of subnets: their distance from full rank, on images without labels."""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flora_jax.closed_form.calibrate import image_batches, shared_by
from flora_jax.cluster.mesh import make_mesh, spread
from flora_jax.errors import InputError, unknown
from flora_jax.evaluation.evaluate import sum_over_devices
from flora_jax.flora.block_scorer import BlockScorer, Measure, compiled_method, replicated
from flora_jax.flora.supernet import Supernet
from flora_jax.models.network import Network
from flora_jax.models.spec import LAYERS_PER_BLOCK


def sum_divergence(logits: jax.Array, dense_logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums the Kullback-Leibler divergence from the dense model's predictions, float32 [1, 1]."""
    log_probs, dense_log_probs = jax.nn.log_softmax(logits), jax.nn.log_softmax(dense_logits)
    divergence = optax.losses.kl_divergence_with_log_targets(log_probs, dense_log_probs)
    return jnp.sum(divergence * mask)[None, None]


def sum_squared_error(features: jax.Array, dense: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums the squared error as a share of the dense features' own size, float32 [1, 1]."""
    error = jnp.sum((features - dense) ** 2, axis=-1) / jnp.sum(dense**2, axis=-1)
    return jnp.sum(error * mask)[None, None]


MEASURES: dict[str, Measure] = {"divergence": sum_divergence, "squared_error": sum_squared_error}


class _Part(NamedTuple):
    """Images on the devices, what full rank makes of them, and masks; and how many there are."""

    batches: list[tuple[jax.Array, jax.Array, jax.Array]]
    num_images: int


class Sensitivity:
    """The distance of a supernet's subnets from its full rank, on calibration images.

    Choices are measured on one half of the images and whole subnets are judged on the other, so
    that no choice is made for the sake of single images.

    Args:
      supernet, images, measure: as in `allocate`.
      reference: the network that subnets should be like; None: the supernet at full rank, which is
        no longer the dense model once it was trained.

    Raises:
      InputError: the images do not fit, or the measure is unknown.
    """

    def __init__(
        self,
        supernet: Supernet,
        images: np.ndarray | Iterable[np.ndarray],
        measure: str | None = None,
        reference: Network | None = None,
    ):
        spec = supernet.space.spec
        if measure is None:
            measure = "divergence" if spec.classifies else "squared_error"
        if measure == "divergence":
            spec.check_classifies("measure 'divergence'")
        if measure not in MEASURES:
            raise InputError(unknown("measure", measure, MEASURES))
        self.space, self._measure = supernet.space, MEASURES[measure]
        self._mesh = mesh = make_mesh()
        self._scorer = BlockScorer(supernet, mesh)
        if reference is None:
            full_rank = self.space.full_rank_genes
            self._reference = functools.partial(self._scorer.logits, genes=full_rank)
        else:
            whole = compiled_method(replicated(reference, mesh), type(reference).__call__, mesh)
            self._reference = functools.partial(whole, None)
        every_image = np.concatenate(image_batches(images, self.space.spec))
        # Every other one, for images often come class by class.
        self._to_try = self._on_devices(every_image[::2])
        self._to_judge = self._on_devices(every_image[len(every_image) > 1 :: 2])
        self._losses: dict[tuple[int, ...], float] = {}

    def _on_devices(self, images: np.ndarray) -> "_Part":
        batches = []
        for batch in image_batches(images, self.space.spec):
            on_devices, mask = (
                spread(array, self._mesh) for array in shared_by(self._mesh.size, batch)
            )
            batches.append((on_devices, self._reference(on_devices), mask))
        return _Part(batches, len(images))

    def loss(self, genes: np.ndarray | tuple[int, ...]) -> float:
        """The measure of one subnet, genes int32 [L], on the other half of the images."""
        key = tuple(map(int, genes))
        if key not in self._losses:
            triple = np.array(genes[:LAYERS_PER_BLOCK])[None]
            self._losses[key] = float(self._means(0, triple, np.array(genes), self._to_judge)[0])
        return self._losses[key]

    def of_choices(
        self, genes: np.ndarray | None = None, reach: int | None = None
    ) -> list[np.ndarray]:
        """The change of the loss by each choice of each layer, on one half of the images.

        DeiT-B with 7 ratios takes 19 runs of half the network on average for each of its blocks,
        7 where the reach is 1.

        Args:
          genes: int32 [L], the choices of all other layers; None: full rank.
          reach: choices measured on either side of a layer's own; None: all.

        Returns:
          One float64 array [choices] a layer; infinite where it was not measured.
        """
        blocks = range(self.space.num_blocks)
        return [layer for block in blocks for layer in self.of_block(block, genes, reach)]

    def of_block(
        self, block: int, genes: np.ndarray | None = None, reach: int | None = None
    ) -> list[np.ndarray]:
        """The same of the layers of one block."""
        space, found = self.space, []
        genes = space.full_rank_genes if genes is None else np.asarray(genes)
        own = slice(LAYERS_PER_BLOCK * block, LAYERS_PER_BLOCK * (block + 1))
        triples = _one_layer_at_a_time(space.choices[own], genes[own], reach)
        means = self._means(block, triples, genes, self._to_try)
        for place, choices in enumerate(space.choices[own]):
            of_layer = np.full(len(choices), np.inf)
            is_own = (np.delete(triples - genes[own], place, axis=1) == 0).all(axis=1)
            of_layer[triples[is_own, place]] = means[is_own] - means[0]
            found.append(of_layer)
        return found

    def _means(
        self, block: int, triples: np.ndarray, others: np.ndarray, part: "_Part"
    ) -> np.ndarray:
        sums = self._scorer.sums(block, triples, others, part.batches, self._measure)
        return sum_over_devices(sums)[:, 0] / part.num_images


def _one_layer_at_a_time(
    choices: Sequence[Sequence[int]], triple: np.ndarray, reach: int | None
) -> np.ndarray:
    """The triples int32 [K, 3] that differ from `triple`, the first, in one layer at most."""
    found = [triple]
    for place, ranks in enumerate(choices):
        for gene in range(len(ranks)):
            distance = abs(gene - triple[place])
            if distance and (reach is None or distance <= reach):
                found.append(np.where(np.arange(LAYERS_PER_BLOCK) == place, gene, triple))
    return np.array(found, np.int32)
