"""Accuracy and likelihood over a set of images that stays on the device."""

import copy
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from flora_jax.cluster.mesh import AXES, SPLIT, WHOLE, make_mesh, on_each_device, replicate, spread
from flora_jax.cluster.processes import true_in_all
from flora_jax.data.labels import check_labels
from flora_jax.data.normalize import Normalization
from flora_jax.errors import InputError
from flora_jax.lowrank.space import RankSpace
from flora_jax.lowrank.supernet import Supernet
from flora_jax.models import functional
from flora_jax.models.network import Network


class EvaluationSet:
    """Batches that stay on the devices, their images as uint8: a quarter of what they become.

    Every process passes the same batches, whole; an image that one of them could not decode counts
    in none.

    Attributes:
      labels: int32 [num_images], in the order of the images.
      is_image: bool [B of all batches together], False for what only fills up the last batch and
        for images that could not be decoded.
      num_images: how many are not masked.

    Raises:
      InputError: there is no image.
    """

    def __init__(self, batches: Iterable[dict[str, np.ndarray]], normalization: Normalization):
        self.mesh = mesh = make_mesh()
        self._normalize = jax.jit(normalization)
        images, labels, masks = [], [], []
        for batch in batches:
            labels.append(batch["label"])
            masks.append(batch["mask"])
            images.append(spread(batch["image"], mesh))
        self.is_image = true_in_all(np.concatenate([*masks, np.zeros(0)]) > 0)
        if not self.is_image.any():
            raise InputError("an evaluation set needs at least one image")
        self.labels = np.concatenate(labels)[self.is_image]
        self.num_images = len(self.labels)
        own = np.split(self.is_image.astype(np.float32), np.cumsum([len(mask) for mask in masks]))
        self._batches = [
            [batch, spread(label, mesh), spread(mask, mesh)]
            for batch, label, mask in zip(images, labels, own[:-1], strict=True)
        ]

    def relabelled(self, labels: np.ndarray) -> "EvaluationSet":
        """The same images with other labels, int32 [num_images]."""
        padded = np.zeros(len(self.is_image), np.int32)
        padded[self.is_image] = labels
        other, start = copy.copy(self), 0
        other.labels, other._batches = labels, []
        for images, old, mask in self._batches:
            own = padded[start : start + len(old)]
            other._batches.append([images, spread(own, self.mesh), mask])
            start += len(old)
        return other

    @property
    def batches(self) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
        """Normalised images [B, H, W, C], labels [B], mask [B].

        The mask is 0 where there is no image, as in `is_image`.
        """
        for images, labels, mask in self._batches:
            yield self._normalize(images), labels, mask


METRICS = ("top1", "log_likelihood")


def _log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Of the right class: logits [B, classes], labels [B] -> float32 [B]."""
    return -optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def sum_metrics(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums the METRICS of logits [B, classes], labels [B], mask [B] over B: float32 [1, 2]."""
    is_correct = logits.argmax(-1) == labels
    metrics = jnp.stack([is_correct.astype(jnp.float32), _log_likelihood(logits, labels)])
    return jnp.sum(metrics * mask[None], axis=1)[None]


@jax.jit(static_argnums=(0, 1))
def sum_model_metrics(structure, mesh, parameters, batch, genes):
    """Sums the METRICS of a model over a batch, a row for each device [devices, 2]."""

    def on_one_device(parameters, batch, genes):
        images, labels, mask = batch
        logits = functional.merge(structure, parameters, genes)(images)
        return sum_metrics(logits, labels, mask)

    run = on_each_device(on_one_device, mesh, (WHOLE, SPLIT, WHOLE), SPLIT)
    return run(parameters, batch, genes)


def sum_over_devices(sums: list[list[jax.Array]]) -> np.ndarray:
    """Adds up the sums [devices, M] of each model's batches: float64 [P, M].

    The devices are read back once, and the processes add up what each of them has read.
    """
    shards = [[[s.data for s in batch.addressable_shards] for batch in batches] for batches in sums]
    local = np.asarray(jax.device_get(shards), np.float64).sum(axis=(1, 2, 3))
    return multihost_utils.process_allgather(local).sum(axis=0, dtype=np.float64)


def means(sums: list[list[jax.Array]], num_images: int) -> dict[str, np.ndarray]:
    """Turns the sums [devices, 2] of each model's batches into the METRICS, each float64 [P]."""
    return dict(zip(METRICS, sum_over_devices(sums).T / num_images, strict=True))


def evaluate(
    model: Network | Supernet, evaluation_set: EvaluationSet, genes=None
) -> dict[str, np.ndarray]:
    """Means over the images: how often the right class comes first, and its log-likelihood.

    The likelihood is the finer measure: on few images it predicts a subnet's accuracy on other
    images better than the accuracy itself (docs/decisions.md).

    Args:
      model: a plain model, or a supernet.
      genes: of the supernet, int [P, L].

    Returns:
      {"top1": float64 [P], "log_likelihood": float64 [P]}, P = 1 for a plain model.

    Raises:
      InputError: the model has no classifier, or the labels are none of its classes.
      ValueError: genes that do not fit the supernet, or genes for a plain model.
    """
    population: Sequence[np.ndarray | None] = [None]
    if isinstance(model, Supernet):
        population = list(np.atleast_2d(model.space.validate(genes)))
        model = model.network
    elif genes is not None:
        raise ValueError("a plain model has no genes; pass the Supernet itself")
    _check_classes(model, evaluation_set)
    structure, parameters = functional.split(model)
    mesh = evaluation_set.mesh
    parameters = replicate(parameters, mesh)
    run = functools.partial(sum_model_metrics, structure, mesh, parameters)
    sums = [[run(batch, one) for batch in evaluation_set.batches] for one in population]
    return means(sums, evaluation_set.num_images)


def _check_classes(model: Network, evaluation_set: EvaluationSet) -> None:
    model.spec.check_classifies("top1")
    check_labels(evaluation_set.labels, model.spec.num_classes, "the evaluation set")


def top1(
    model: Network | Supernet, evaluation_set: EvaluationSet, genes=None
) -> float | np.ndarray:
    """Share of the images whose class comes first; arguments as in `evaluate`.

    Returns:
      A float; float64 [P] for a population of genes [P, L].
    """
    values = evaluate(model, evaluation_set, genes)["top1"]
    return values if np.ndim(genes) == 2 else float(values[0])


@jax.jit(static_argnums=(0, 1))
def _predict(structure, mesh, parameters, batch):
    """Top class int32 [B] and log-likelihood float32 [B] of a batch, whole on every device."""

    def on_one_device(parameters, batch):
        images, labels, _ = batch
        logits = functional.merge(structure, parameters)(images)
        found = logits.argmax(-1), _log_likelihood(logits, labels)
        return jax.lax.all_gather(found, AXES, tiled=True)

    return on_each_device(on_one_device, mesh, (WHOLE, SPLIT), WHOLE)(parameters, batch)


def evaluate_images(model: Network, evaluation_set: EvaluationSet) -> dict[str, np.ndarray]:
    """What a plain model makes of each image, in the order of the images; `evaluate` has the means.

    All processes call it and get the same.

    Returns:
      {"is_correct": bool [n], "log_likelihood": float32 [n] of the right class,
      "predicted": int32 [n], the class that comes first}, n = evaluation_set.num_images.

    Raises:
      InputError: the model has no classifier, or the labels are none of its classes.
    """
    _check_classes(model, evaluation_set)
    structure, parameters = functional.split(model)
    mesh = evaluation_set.mesh
    run = functools.partial(_predict, structure, mesh, replicate(parameters, mesh))
    found = jax.device_get([run(batch) for batch in evaluation_set.batches])
    predicted, log_likelihood = (
        np.concatenate(batches)[evaluation_set.is_image] for batches in zip(*found, strict=True)
    )
    return {
        "is_correct": predicted == evaluation_set.labels,
        "log_likelihood": log_likelihood,
        "predicted": predicted,
    }


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Looks at a model while it trains: an evaluator of `train`.

    It yields "heldout_top1" and "heldout_log_likelihood", the deciding one first; of a supernet
    these of its full rank, and with "_middle" and "_smallest" behind them of two subnets.

    Attributes:
      images: that the model is not trained on.
      space: of the supernet whose network is trained; None for a plain model.
      decides: one of METRICS, by which the best parameters are chosen.
    """

    images: EvaluationSet
    space: RankSpace | None = None
    decides: str = "log_likelihood"

    def __call__(self, network: Network) -> Iterator[tuple[str, float]]:
        if self.space is None:
            subnets, found = [""], evaluate(network, self.images)
        else:
            space, subnets = self.space, ["", "_middle", "_smallest"]
            genes = np.stack([space.full_rank_genes, space.middle_genes, space.cheapest_genes])
            found = evaluate(Supernet(network, space), self.images, genes)
        for metric in sorted(METRICS, key=lambda metric: metric != self.decides):
            for subnet, value in zip(subnets, found[metric].tolist(), strict=True):
                yield f"heldout_{metric}{subnet}", value
