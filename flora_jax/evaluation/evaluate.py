"""Evaluation of models on images that stay on the devices."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from flora_jax.cluster.mesh import AXES, SPLIT, WHOLE, make_mesh, on_each_device, replicate, spread
from flora_jax.cluster.processes import true_in_all
from flora_jax.data.labels import check_labels
from flora_jax.data.normalize import Normalization
from flora_jax.errors import InputError
from flora_jax.evaluation.outputs import quality_of
from flora_jax.evaluation.quality import AGREEMENT, CLASSIFICATION, Quality
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec


class Genes(Protocol):
    """The space of a supernet's genes, as far as evaluation asks it (`flora_jax.RankSpace`)."""

    def validate(self, genes) -> np.ndarray: ...

    @property
    def full_rank_genes(self) -> np.ndarray: ...

    @property
    def middle_genes(self) -> np.ndarray: ...

    @property
    def cheapest_genes(self) -> np.ndarray: ...


class Supernet(Protocol):
    """A network and the space of its genes, as far as evaluation asks it (`flora_jax.Supernet`)."""

    @property
    def network(self) -> Network: ...

    @property
    def space(self) -> Genes: ...


class EvaluationSet:
    """Batches that stay on the devices, their images as uint8: a quarter of what they become.

    Every process passes the same batches, whole; an image that one of them could not decode counts
    in none.

    Attributes:
      labels: int32 [num_images], in the order of the images.
      is_image: bool [B of all batches together], False for what only fills up the last batch and
        for images that could not be decoded.
      is_image_of: the same of each batch, bool [B].
      num_images: how many are not masked.
      quality: what is measured of a model: what it says about the labels, or, of a set that
        `compared_with` made, how like another's its features are.

    Raises:
      InputError: there is no image.
    """

    def __init__(self, batches: Iterable[dict[str, np.ndarray]], normalization: Normalization):
        self.mesh = mesh = make_mesh()
        self.quality: Quality = CLASSIFICATION
        self._reference: Callable[[jax.Array], Any] | None = None
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
        ends = np.cumsum([len(mask) for mask in masks])
        self.is_image_of = np.split(self.is_image, ends[:-1])
        self._batches = [
            [batch, spread(label, mesh), spread(is_image.astype(np.float32), mesh)]
            for batch, label, is_image in zip(images, labels, self.is_image_of, strict=True)
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

    def compared_with(self, reference: Network) -> "EvaluationSet":
        """The same images, by which models are measured beside this one: how like outputs are.

        Of classifiers these are features, too. It runs once a batch, for all models that are
        measured together; they are never kept, for those of few images would be larger than these.
        """
        structure, parameters = functional.split(reference)
        parameters = replicate(parameters, self.mesh)
        other, quality = copy.copy(self), quality_of(reference.spec)
        other.quality = quality = AGREEMENT if quality.by_labels else quality
        other._reference = functools.partial(_outputs, structure, quality, self.mesh, parameters)
        return other

    @property
    def batches(self) -> Iterator[tuple[jax.Array, Any, jax.Array]]:
        """Normalised images [B, H, W, C], what they are measured by, mask [B].

        That is labels [B], or the outputs of the network that models are compared with. The mask is
        0 where there is no image, as in `is_image`.
        """
        return self.some(slice(None))

    def some(self, batches: slice) -> Iterator[tuple[jax.Array, Any, jax.Array]]:
        """Those of the batches that the slice names."""
        for images, labels, mask in self._batches[batches]:
            normalised = self._normalize(images)
            target = labels if self._reference is None else self._reference(normalised)
            yield normalised, target, mask


def evaluate(
    model: Network | Supernet, evaluation_set: EvaluationSet, genes=None
) -> dict[str, np.ndarray]:
    """Means over the images: how often the right class comes first, and its log-likelihood.

    The likelihood is the finer measure: on few images it predicts a subnet's accuracy on other
    images better than the accuracy itself (docs/decisions.md).

    Of images `compared_with` a network: the cosine between the model's outputs (pooled features, or
    logits) and that network's, and the squared error of the normalised tokens, each as a share of
    its target's square; of one with labels or numbers the metrics of these (`evaluation.outputs`).

    Args:
      model: a plain model, or a supernet.
      genes: of the supernet, int [P, L].

    Returns:
      {"top1": float64 [P], "log_likelihood": float64 [P]}, or {"cosine": float64 [P],
      "relative_error": float64 [P]}; P = 1 for a plain model.

    Raises:
      InputError: labels are none of the model's classes, it has no classifier, or its features have
        another shape than those that they are compared with.
      ValueError: genes that do not fit the supernet, or genes for a plain model.
    """
    found = _on_batches(sum_model_metrics, model, evaluation_set, genes)
    return means([list(own) for own in zip(*found, strict=True)], evaluation_set)


def top1(
    model: Network | Supernet, evaluation_set: EvaluationSet, genes=None
) -> float | np.ndarray:
    """Share of the images whose class comes first; arguments as in `evaluate`.

    Returns:
      A float; float64 [P] for a population of genes [P, L].
    """
    if not evaluation_set.quality.by_labels:
        raise InputError("top1 is of labels, and these images compare outputs: call evaluate")
    values = evaluate(model, evaluation_set, genes)["top1"]
    return values if np.ndim(genes) == 2 else float(values[0])


def evaluate_images(
    model: Network | Supernet, evaluation_set: EvaluationSet, genes=None, batches=slice(None)
) -> dict[str, np.ndarray]:
    """Results of a model on each image, in the order of the images; `evaluate` has the means.

    All processes call it and get the same.

    Args:
      model, genes: as in `evaluate`.
      batches: a slice of the set's, on which alone it is run.

    Returns:
      {"is_correct": bool [n], "log_likelihood": float32 [n] of the right class,
      "predicted": int32 [n], the class that comes first}, n = evaluation_set.num_images; of images
      `compared_with` a network {"cosine": float32 [n], "relative_error": float32 [n]}. Each is
      [P, n] for a population of genes [P, L].

    Raises:
      InputError, ValueError: as `evaluate`.
    """
    found = jax.device_get(_on_batches(of_images, model, evaluation_set, genes, batches))
    is_image = np.concatenate(evaluation_set.is_image_of[batches])
    columns = {
        name: np.concatenate([[each[name] for each in batch] for batch in found], axis=1)
        for name in found[0][0]
    }
    row = ... if np.ndim(genes) == 2 else 0
    return {name: rows[:, is_image][row] for name, rows in columns.items()}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Looks at a model while it trains: an evaluator of `train`.

    It yields each metric as `heldout_NAME`, the deciding one first; of a supernet these of its full
    rank, and with `_middle` and `_smallest` behind them of two subnets. Where less is better it
    yields "heldout_score" before, for the greatest first value marks the best parameters.

    Attributes:
      images: that the model is not trained on.
      space: of the supernet whose network is trained; None for a plain model.
      decides: a metric of the images, by which the best parameters are chosen; empty: the
        top-1, or the cosine of images that are compared with a network.
    """

    images: EvaluationSet
    space: Genes | None = None
    decides: str = ""

    def __call__(self, network: Network) -> Iterator[tuple[str, float]]:
        if self.space is None:
            subnets, found = [""], evaluate(network, self.images)
        else:
            space, subnets = self.space, ["", "_middle", "_smallest"]
            genes = np.stack([space.full_rank_genes, space.middle_genes, space.cheapest_genes])
            found = evaluate(_WithSpace(network, space), self.images, genes)
        quality = self.images.quality
        deciding = quality.metric(self.decides)
        if not deciding.more_is_better:
            yield "heldout_score", float(deciding.score(found[deciding.name])[0])
        for metric in sorted(quality.metrics, key=lambda metric: metric != deciding):
            for subnet, value in zip(subnets, found[metric.name].tolist(), strict=True):
                yield f"heldout_{metric.name}{subnet}", value


class _WithSpace(NamedTuple):
    network: Network
    space: Genes


def _on_batches(
    program: Callable,
    model: Network | Supernet,
    images: EvaluationSet,
    genes,
    batches: slice = slice(None),
) -> list[list[Any]]:
    """The results of a program of a model: of each batch, with each of the genes in turn."""
    if not isinstance(model, Network):
        network, population = model.network, list(np.atleast_2d(model.space.validate(genes)))
    elif genes is None:
        network, population = model, [None]
    else:
        raise ValueError("a plain model has no genes; pass the Supernet itself")
    check_measures(network.spec, images)
    structure, parameters = functional.split(network)
    parameters = replicate(parameters, images.mesh)
    run = functools.partial(program, structure, images.quality, images.mesh, parameters)
    return [[run(batch, one) for one in population] for batch in images.some(batches)]


def check_measures(spec: Spec, evaluation_set: EvaluationSet) -> None:
    """Raises InputError unless the images can say how good a network of this spec is."""
    if not evaluation_set.quality.by_labels:
        return
    spec.check_classifies("top1", "measure it with EvaluationSet.compared_with(the dense model)")
    check_labels(evaluation_set.labels, spec.num_classes, "the evaluation set")


def means(sums: list[list[jax.Array]], images: EvaluationSet) -> dict[str, np.ndarray]:
    """Turns the sums [devices, M] of each model's batches into the metrics, each float64 [P]."""
    names = [metric.name for metric in images.quality.metrics]
    return dict(zip(names, sum_over_devices(sums).T / images.num_images, strict=True))


def sum_over_devices(sums: list[list[jax.Array]]) -> np.ndarray:
    """Adds up the sums [devices, M] of each model's batches: float64 [P, M].

    The devices are read back once, and the processes add up what each of them has read.
    """
    shards = [[[s.data for s in batch.addressable_shards] for batch in batches] for batches in sums]
    local = np.asarray(jax.device_get(shards), np.float64).sum(axis=(1, 2, 3))
    return multihost_utils.process_allgather(local).sum(axis=0, dtype=np.float64)


@jax.jit(static_argnums=(0, 1, 2))
def sum_model_metrics(structure, quality: Quality, mesh, parameters, batch, genes):
    """Sums the metrics of a model over a batch, a row for each device [devices, M]."""

    def on_one_device(parameters, batch, genes):
        images, target, mask = batch
        outputs = quality.of(functional.merge(structure, parameters, genes), images)
        return quality.sums(outputs, target, mask)

    run = on_each_device(on_one_device, mesh, (WHOLE, SPLIT, WHOLE), SPLIT)
    return run(parameters, batch, genes)


@jax.jit(static_argnums=(0, 1, 2))
def of_images(structure, quality: Quality, mesh, parameters, batch, genes):
    """The values of each image of a batch, {name: [B]}, whole on every device."""

    def on_one_device(parameters, batch, genes):
        images, target, _ = batch
        outputs = quality.of(functional.merge(structure, parameters, genes), images)
        found = quality.of_images(outputs, target)
        return jax.lax.all_gather(found, AXES, tiled=True)

    run = on_each_device(on_one_device, mesh, (WHOLE, SPLIT, WHOLE), WHOLE)
    return run(parameters, batch, genes)


@jax.jit(static_argnums=(0, 1, 2))
def _outputs(structure, quality: Quality, mesh, parameters, images):
    """The outputs of a model for normalised images, split over the devices as they are."""

    def on_one_device(parameters, images):
        return quality.of(functional.merge(structure, parameters), images)

    return on_each_device(on_one_device, mesh, (WHOLE, SPLIT), SPLIT)(parameters, images)
