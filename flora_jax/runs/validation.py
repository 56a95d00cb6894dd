"""What settings, images, devices and files must agree on, found before any expensive work.

What concerns one setting alone, the settings check themselves.
"""

import warnings
from collections.abc import Container

import jax

from flora_jax.cluster.mesh import make_mesh
from flora_jax.cluster.sharing import equal_share
from flora_jax.errors import InputError, MissingFileError
from flora_jax.evaluation.quality import quality_of
from flora_jax.flora.extras.latency import measure_networks
from flora_jax.models.spec import Spec
from flora_jax.runs.checks import say_doubts
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings
from flora_jax.slim.gates import abstract_gated
from flora_jax.stages.budget import check_macs_budget
from flora_jax.stages.run import network_spec
from flora_jax.training.settings import Recipe
from flora_jax.training.watch import check_can_watch
from flora_jax.weights.export.kinds import check_packages
from flora_jax.weights.hub import local_folder
from flora_jax.weights.load_parameters import NotFiniteWarning
from flora_jax.weights.pretrained import from_pretrained

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
    if not spec.num_classes:
        _check_learns_features(settings)
    elif not images.splits.num_classes:
        _check_needs_no_labels(settings)
    elif images.splits.num_classes != spec.num_classes:
        raise InputError(
            f"model.num_classes is {spec.num_classes}, but {data.name} has "
            f"{images.splits.num_classes} classes"
        )
    for name, recipe, num_images in settings.trainings(len(images.train)):
        _check_batch(name, recipe, num_images)
    if settings.spends_latency and "slim" not in settings.stages and "search" not in done:
        _check_latency(settings, spec)
    if not all(stage in done for stage in settings.stages):
        say_doubts(settings, images)
    return images


def _check_needs_no_labels(settings: Settings) -> None:
    stages = set(settings.stages) & {"transfer", "slim", "filter", "search"}
    if settings.trains_dense:
        stages.add("pretrain")
    recipes = {"supernet": settings.supernet, "finetune": settings.finetune}
    stages |= {name for name, recipe in recipes.items() if not recipe.distill} & set(
        settings.stages
    )
    if stages:
        raise InputError(
            f"{settings.data.name} has no labels, but {', '.join(sorted(stages))} need them: give "
            f"weights with pretrained= and leave these stages out, or use folder:PATH"
        )


def _check_learns_features(settings: Settings) -> None:
    """A network without classes has nothing to learn from but the dense model's features."""
    stages = {"transfer", "slim"} & set(settings.stages)
    if settings.trains_dense:
        stages.add("pretrain")
    if stages:
        raise InputError(
            f"model.num_classes is 0, but {', '.join(sorted(stages))} need classes to learn: give "
            f"weights with pretrained=, leave train_pretrained=False, and leave transfer and slim "
            f"out"
        )
    for name, recipe, _ in settings.trainings(0):
        for field, needed in (("distill", True), ("stored_predictions", False)):
            if getattr(recipe, field) != needed:
                raise InputError(
                    f"{name}.{field} must be {needed}: model.num_classes is 0, and such a network "
                    f"learns the features of its teacher in every step"
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the stage itself warns
            warnings.simplefilter("error", NotFiniteWarning)
            try:
                from_pretrained(path, network_spec(settings))
            except NotFiniteWarning as found:
                raise InputError(f"{path}: {found}") from None


def _check_latency(settings: Settings, spec: Spec) -> None:
    """A quick look at whether the cheapest subnet is quick enough; the table decides later."""
    space = settings.space.of(spec)
    specs = {"dense": spec, "cheapest": space.extracted_spec(space.cheapest_genes)}
    batch_size, dtype = settings.search.latency_batch, settings.finetune.compute_dtype
    ms = measure_networks(specs, batch_size, dtype, rounds=5)
    least = ms["cheapest"].min() / ms["dense"].min()  # which other work on the machine spoils last
    for window in settings.budget.windows("latency"):
        if window[1] < least / _LATENCY_SLACK:
            raise InputError(
                f"budget.latency {window} cannot be reached on this device: at {batch_size} images "
                f"the cheapest subnet takes about {least:.2f} of the dense model's time"
            )


def _check_batch(name: str, recipe: Recipe, num_images: int) -> None:
    if recipe.batch_size > num_images:
        raise InputError(f"{name}: batch_size {recipe.batch_size} exceeds its {num_images} images")
    equal_share(f"{name}: batch_size", recipe.batch_size, jax.device_count(), recipe.accumulate)
