"""Subnets of a supernet, scored image by image on held-out images."""

import numpy as np

from flora_jax.evaluation.evaluate import EvaluationSet, evaluate_images
from flora_jax.flora.extras.halving import ImageScores, looks_at
from flora_jax.flora.supernet import Supernet


def image_scores(
    supernet: Supernet, images: EvaluationSet, metric: str, *, halving: bool = True
) -> ImageScores:
    """Scores by a metric of the images, and shows the first one that they have.

    Args:
      images: in an order of which every beginning is a fair sample, in several batches.
      metric: a name, as `Quality.metric` takes it.
      halving: whether candidates are compared before they have seen all images.
    """
    deciding, shown = images.quality.metric(metric), images.quality.shown
    ends = np.cumsum([is_image.sum() for is_image in images.is_image_of])

    def of(genes: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop)
        found = evaluate_images(supernet, images, genes, slice(first, last + 1))
        return deciding.score(found[deciding.of_image]), found[shown.of_image]

    num_images = images.num_images
    return ImageScores(of, num_images, looks_at(num_images) if halving else (num_images,))
