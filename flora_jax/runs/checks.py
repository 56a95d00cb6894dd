"""Checks of a run before any expensive work: settings, images, devices and files must agree.

Values that can never be right raise; those that are allowed but can hardly be meant are said with
the figure. A check of one setting alone is with the setting.
"""

import logging
import math
import warnings
from collections.abc import Collection, Container, Mapping, Sequence

import jax
import numpy as np

from flora_jax.closed_form.compress import check_reachable, variants
from flora_jax.cluster.mesh import equal_share, make_mesh
from flora_jax.cluster.processes import is_first
from flora_jax.errors import InputError, MissingFileError
from flora_jax.evaluation.outputs import outputs_title, quality_of
from flora_jax.flora.space import RankSpace
from flora_jax.models.spec import Spec
from flora_jax.runs.budgets import Budget, budgets_of
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings, Spending, network_spec
from flora_jax.runs.workdir import Run, SavedSpace
from flora_jax.slim.gates import abstract_gated
from flora_jax.training.settings import Recipe
from flora_jax.training.watch import check_can_watch
from flora_jax.weights.export import check_packages
from flora_jax.weights.export.engines import engine_of
from flora_jax.weights.export.latency import time_specs
from flora_jax.weights.folder import load_spec
from flora_jax.weights.hub import local_folder
from flora_jax.weights.load_parameters import NotFiniteWarning
from flora_jax.weights.metadata.class_names import read_class_names
from flora_jax.weights.pretrained import from_pretrained

log = logging.getLogger(__name__)

_LATENCY_SLACK = 1.25  # how far five rounds may be off


def check(settings: Settings, done: Container[str] = ()) -> Images:
    """Checks that a run can be finished, and opens its images.

    Args:
      done: stages whose results are there, so that what they read may be gone.

    Raises:
      InputError, MissingFileError, MissingPackageError: it could not be; says why.
    """
    if "export" not in done:
        check_packages(settings.export)
    check_can_watch(settings.watch)
    _check_weights(settings, done)
    spec, data = network_spec(settings), settings.data
    quality_of(spec).metric(settings.metric)
    if "slim" in settings.stages:
        abstract_gated(spec, settings.slim.attention, settings.slim.tokens)
    else:  # a slimmed model's shape is not known yet
        check_macs_budget(settings, spec, spec)
    data.augmentation.train(spec.image_shape)
    make_mesh(settings.fsdp)
    images = Images(settings)
    if not spec.classifies:
        _check_has_no_classes(settings, spec)
    elif not images.splits.num_classes:
        _check_needs_no_labels(settings)
    elif images.splits.num_classes != spec.num_classes:
        raise InputError(
            f"model.num_classes is {spec.num_classes}, but {data.name} has "
            f"{images.splits.num_classes} classes"
        )
    for name, recipe, num_images in settings.trainings(len(images.train)):
        _check_batch(name, recipe, num_images)
    if settings.spends_latency and "slim" not in settings.stages and "latency" not in done:
        _check_latency(settings, spec)
    if not all(stage in done for stage in settings.stages):
        warn_of_doubtful_settings(settings, images)
    return images


def _check_needs_no_labels(settings: Settings) -> None:
    """Without labels nothing can be learnt from them, nor triples or subnets be ranked by them."""
    stages = {"transfer", "slim", "filter", "search"} & set(settings.stages)
    trainings = settings.trainings(0)
    stages |= {name.partition(".")[0] for name, recipe, _ in trainings if not recipe.distill}
    if stages:
        raise InputError(
            f"{settings.data.name} has no labels, but {', '.join(sorted(stages))} need them: give "
            f"weights with pretrained= and leave these stages out, or use folder:PATH"
        )


def _check_has_no_classes(settings: Settings, spec: Spec) -> None:
    """A network without classes has nothing to learn from but the dense model's outputs."""
    stages = {"transfer", "slim"} & set(settings.stages)
    stages |= {"pretrain"} if settings.trains_dense else set()
    if stages:
        raise InputError(
            f"the model has {outputs_title(spec)} (model.num_classes is {spec.num_classes}), but "
            f"{', '.join(sorted(stages))} need exclusive classes to learn"
        )
    for name, recipe, _ in settings.trainings(0):
        if not recipe.distill or recipe.stored_predictions:
            raise InputError(
                f"{name}: distill must be True and stored_predictions False: a network without "
                f"classes learns what its teacher gives in every step"
            )


def _check_weights(settings: Settings, done: Container[str]) -> None:
    """Reads the weights once, before anything else, where a stage is going to."""
    path = settings.pretrained
    reads = [stage for stage in ("pretrain", "transfer") if stage in settings.stages]
    if not reads or reads[0] in done:
        return
    if "transfer" in settings.stages and not path:
        raise InputError("transfer needs weights: set pretrained to their file or folder")
    if path and not local_folder(path).exists():
        raise MissingFileError(f"pretrained: no file or folder {path}")
    if path:
        read_class_names(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the stage itself warns
            warnings.simplefilter("error", NotFiniteWarning)
            try:
                from_pretrained(path, network_spec(settings))
            except NotFiniteWarning as found:
                raise InputError(f"{path}: {found}") from None


def _check_latency(settings: Settings, spec: Spec) -> None:
    """A quick look at whether the cheapest subnet is quick enough; the table decides later."""
    of_all = settings.space.of(spec).variants() if settings.finds_ranks else variants(spec)
    specs = {"dense": spec, "cheapest": of_all.spec_of(np.zeros_like(of_all.largest))}
    engine = engine_of(settings.latency.engine, settings.finetune.compute_dtype)
    batch_size = settings.search.latency_batch
    ms = time_specs(specs, engine, batch_size, rounds=5)
    least = ms["cheapest"].min() / ms["dense"].min()  # which other work on the machine spoils last
    for window in settings.budget.windows("latency"):
        if window[1] < least / _LATENCY_SLACK:
            raise InputError(
                f"budget.latency {window} cannot be reached in {engine}: at {batch_size} images "
                f"the cheapest subnet takes about {least:.2f} of the dense model's time"
            )


def _check_batch(name: str, recipe: Recipe, num_images: int) -> None:
    if recipe.batch_size > num_images:
        raise InputError(f"{name}: batch_size {recipe.batch_size} exceeds its {num_images} images")
    equal_share(f"{name}: batch_size", recipe.batch_size, jax.device_count(), recipe.accumulate)


def check_macs_budget(settings: Settings, dense: Spec, base: Spec) -> None:
    """Checks that FLORA, where it will run, can reach its MAC budgets from a model of spec `base`.

    Raises:
      InputError: it cannot; names the budget and what can be reached.
    """
    if settings.finds_ranks:
        _check_macs(settings, dense, settings.space.of(base))
    elif settings.cuts_by:
        cost, spends_macs = variants(base).macs, not settings.spends_latency
        budgets = budgets_of(settings.spending, dense) if spends_macs else []
        check_reachable(cost, [budget.window[1] for budget in budgets], dense.macs())


def check_with_results(run: Run, to_redo: Collection[str]) -> None:
    """Checks the MAC budgets with what the run has found: the slimmed model, the candidates.

    Args:
      to_redo: steps whose results do not count.

    Raises:
      InputError: as `check_macs_budget`.
    """
    settings = run.settings
    found = {"slim": "slim/spec.json", "filter": "filter/space.json"}
    deciding = [stage for stage in found if stage in settings.stages]
    is_known = all((run.folder / found[s]).exists() and s not in to_redo for s in deciding)
    if not (deciding and is_known and settings.finds_ranks) or settings.spends_latency:
        return
    if "filter" in deciding:
        space = SavedSpace(found["filter"]).load(run.folder)
    else:
        space = settings.space.of(load_spec(run.folder / "slim"))
    _check_macs(settings, run.spec, space)


def _check_macs(settings: Settings, dense: Spec, space: RankSpace) -> None:
    for budget in budgets_of(Spending("macs", settings.budget.windows("macs")), dense):
        reached = space.macs_cost.range_over(space.kept)
        check_budget("macs", budget, reached, dense.macs(), "MACs")


def check_budget(
    name: str, budget: Budget, reached: tuple[int, int], dense: float, dense_cost: str
) -> None:
    """Raises InputError where no subnet costs what this budget allows, least and most of all."""
    (least, most), (low, high) = reached, budget.window
    if high < least or low > most:
        raise InputError(
            f"budget.{name} {budget.shares} cannot be reached: the space spans "
            f"{least / dense:.3f}..{most / dense:.3f} of the dense model's {dense_cost}"
        )


# What can hardly be meant.

_SAMPLE = 32  # images whose pixels are looked at
_FAR_MEAN, _FAR_STD = 2.0, 4.0  # standard deviations off, and times too wide or too narrow
_FEW_A_CLASS, _FEW_IN_ALL = 20, 200
_LEAST_TRAVEL = 2e-3  # a tenth of the standard deviation that weights start with
_FAR_ACCURACY = 0.03
_SAME_GATE = 0.05


def warn_of_doubtful_settings(settings: Settings, images: Images) -> None:
    """The first process logs a warning for each setting that is unlikely to be meant.

    All processes call it together.
    """
    doubts = (
        *_of_pixels(settings, images),
        *_of_heldout(settings, images),
        *_of_copies(settings, images),
        *_of_learning_rates(settings, len(images.train)),
    )
    for doubt in doubts if is_first() else ():
        log.warning("%s", doubt)


def _of_pixels(settings: Settings, images: Images):
    """Normalisation that some training images do not look like."""
    pixels = np.concatenate(list(images.without_augmentation(_SAMPLE, "doubts"))) / 255
    channels = pixels.reshape(-1, pixels.shape[-1])
    mean, std = channels.mean(axis=0), np.maximum(channels.std(axis=0), 1 / 255)
    shift = abs(mean - settings.data.mean) / settings.data.std
    spread = std / settings.data.std
    if shift.max() > _FAR_MEAN or not (1 / _FAR_STD < spread.min() <= spread.max() < _FAR_STD):
        yield (
            f"data.mean {settings.data.mean} and data.std {settings.data.std} are far from those "
            f"of {len(pixels)} training images: {_rounded(mean)} and {_rounded(std)}"
        )


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(value, 3) for value in values.tolist())


def _of_heldout(settings: Settings, images: Images):
    """Held-out images too few to rank subnets by."""
    classes = images.splits.num_classes if images.are_labelled else 0
    number = len(images.splits.heldout)
    ranks_subnets = {"filter", "search"} & set(settings.stages)
    if ranks_subnets and classes and number < max(_FEW_A_CLASS * classes, _FEW_IN_ALL):
        noise = 100 * 1.96 * math.sqrt(0.8 * 0.2 / number)
        yield (
            f"only {number} images are held out to rank subnets, {number / classes:.0f} a class: "
            f"a top-1 of 80 % is known to ±{noise:.1f} points. Raise data.heldout_fraction "
            f"({settings.data.heldout_fraction})"
            + (", or set metric='log_likelihood'" if settings.metric == "top1" else "")
        )


def _of_copies(settings: Settings, images: Images):
    """Images that models are chosen by or reported on, and know."""
    heldout, test = images.copies or (0, 0)
    if heldout:
        data = settings.data
        can_avoid = data.name.startswith("folder:") and not data.heldout_split
        can_avoid &= data.heldout_by != "content"
        advice = "; data.heldout_by='content' avoids it" if can_avoid else ""
        yield (
            f"{heldout} of the {len(images.splits.heldout)} held-out images are copies of training "
            f"images: models are chosen by what they were trained on{advice}"
        )
    if test:
        yield (
            f"{test} of the {len(images.splits.test)} test images are copies of images that are "
            f"trained or searched with: what is reported is better than on pictures that are new"
        )


def _of_learning_rates(settings: Settings, num_images: int):
    """Learning rates, scaled to the batch, by which no weight gets anywhere."""
    for name, recipe, images in settings.trainings(num_images):
        if name == "finetune" and "compress" in settings.stages:
            continue  # weights that are fitted already should not get far
        training = recipe.settings(images)
        travel = training.learning_rate * training.steps / 2  # AdamW's step, a cosine's mean
        if travel < _LEAST_TRAVEL:
            needed = recipe.learning_rate * _LEAST_TRAVEL / travel if travel else 5e-4
            yield (
                f"{name}: learning_rate {recipe.learning_rate:.2g} is for 512 images and becomes "
                f"{training.learning_rate:.2g} at batch_size {recipe.batch_size}: in "
                f"{training.steps} steps a weight moves by about {travel:.1g}, which changes "
                f"little. {needed:.1g} or more, or more epochs, would"
            )


def check_not_chance(settings: Settings, labels: np.ndarray, predicted: np.ndarray) -> None:
    """Refuses to compress a dense model that has learned nothing.

    Chance is what its answers would get right of shuffled labels, as in Cohen's kappa: of a model
    that always says the commonest class, that class' share.

    Args:
      labels, predicted: int [n], of the held-out images.

    Raises:
      InputError: what it gets right could be chance (one-sided, 95 %).
    """
    compresses = set(settings.stages) - {"pretrain", "evaluate", "export", "report"}
    classes = settings.model.num_classes
    if not settings.refuse_near_chance or not compresses or not classes:
        return
    number, top1 = len(labels), float((labels == predicted).mean())
    truth, answers = (np.bincount(of, minlength=classes) / number for of in (labels, predicted))
    chance = float(truth @ answers)
    if top1 > chance + 1.64 * math.sqrt(chance * (1 - chance) / number):
        return
    if settings.pretrained and not settings.train_pretrained:
        advice = (
            "fine-tune it first with train_pretrained=True, or see whether classes, mean and std "
            "are those that it was trained with"
        )
    else:
        advice = "pretrain longer or with another learning rate"
    raise InputError(
        f"the dense model has {100 * top1:.2f} % top-1 on {number} held-out images, where its "
        f"answers have {100 * chance:.2f} % by chance and the commonest class alone has "
        f"{100 * truth.max():.2f} %: there is nothing to keep by compressing it; {advice} "
        f"(refuse_near_chance=False goes on all the same)"
    )


def warn_of_remembered_images(heldout: float, num_heldout: int, test: float, num_test: int) -> None:
    """Warns where weights know the images that subnets were ranked by.

    Args:
      heldout, test: the dense model's top-1 on so many held-out and test images.
    """
    variance = sum(p * (1 - p) / n for p, n in ((heldout, num_heldout), (test, num_test)))
    if heldout - test > max(_FAR_ACCURACY, 3 * math.sqrt(variance)):
        log.warning(
            "the dense model has %.2f %% top-1 on the held-out images and %.2f %% on the test "
            "images: its weights may have been trained on the former, and subnets were ranked by "
            "what it remembers. data.heldout_split names images that it has not seen",
            100 * heldout,
            100 * test,
        )


def warn_of_idle_gates(gates: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Warns of kinds of gates, one array a block, that have stayed where they started, at 1."""
    for kind, of_blocks in gates.items():
        values = np.concatenate([block.ravel() for block in of_blocks])
        if values.size and abs(values - 1).max() < _SAME_GATE:
            log.warning(
                "the %s gates have hardly moved from 1 (%.3f to %.3f): what is cut is chosen by "
                "noise. Train them longer, or with a higher slim.gates.learning_rate or penalty",
                kind,
                values.min(),
                values.max(),
            )
