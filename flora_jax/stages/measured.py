"""What a run's images say about a model: by their labels, or beside the dense model."""

import logging

from flora_jax.evaluation.evaluate import EvaluationSet, HeldOut, evaluate_images
from flora_jax.flora.space import RankSpace
from flora_jax.runs.images import Images
from flora_jax.stages.run import Run, load_dense
from flora_jax.training.loop import Evaluator

log = logging.getLogger(__name__)


def measured(run: Run, images: Images, evaluation_set: EvaluationSet) -> EvaluationSet:
    """Images of the run, with what models are measured by on them.

    Where there are no labels the dense model stands for them: its features where it has no classes,
    otherwise its predictions.
    """
    if images.are_labelled:
        return evaluation_set
    dense = load_dense(run)
    if not dense.spec.num_classes:
        return evaluation_set.compared_with(dense)
    log.info("the images have no labels: the dense model's predictions stand for them")
    return evaluation_set.relabelled(evaluate_images(dense, evaluation_set)["predicted"])


def heldout(run: Run, images: Images) -> EvaluationSet:
    """The held-out images, as `measured`."""
    return measured(run, images, images.heldout_set)


def heldout_parts(run: Run, images: Images) -> EvaluationSet:
    """The held-out images in batches that are fair samples of them, as `measured`."""
    return measured(run, images, images.heldout_parts)


def evaluators(run: Run, images: Images, space: RankSpace | None = None) -> list[Evaluator]:
    """What looks at a model while it trains, at a supernet of this space or a plain one.

    Nothing where a network has classes and the images have no labels.
    """
    if run.spec.num_classes and not images.are_labelled:
        return []
    return [HeldOut(heldout(run, images), space, run.settings.metric)]
