"""What settings, images, devices and files must agree on, found before any expensive work.

What concerns one setting alone, the settings check themselves.
"""

import jax
from etils import epath

from flora_jax.cluster.mesh import make_mesh
from flora_jax.cluster.sharing import equal_share
from flora_jax.errors import InputError, MissingFileError
from flora_jax.slim.gates import abstract_gated
from flora_jax.stages.budget import check_macs_budget
from flora_jax.stages.images import Images
from flora_jax.stages.run import network_spec
from flora_jax.stages.settings import Settings
from flora_jax.train.settings import Recipe
from flora_jax.weights.folder import SPEC_FILE


def check(settings: Settings) -> Images:
    """Checks that a run can be finished, and opens its images.

    Raises:
      InputError, MissingFileError: it could not be; says why.
    """
    _check_files(settings)
    spec, data = network_spec(settings), settings.data
    if "slim" in settings.stages:
        abstract_gated(spec, settings.slim.attention, settings.slim.tokens)
    else:  # a slimmed model's shape is not known yet
        check_macs_budget(settings, spec, spec)
    data.augmentation.train(spec.image_shape)
    data.augmentation.evaluation(spec.image_shape)
    make_mesh(settings.fsdp)
    images = Images(settings)
    if not images.splits.num_classes:
        _check_needs_no_labels(settings)
    elif images.splits.num_classes != spec.num_classes:
        raise InputError(
            f"model.num_classes is {spec.num_classes}, but {data.name} has "
            f"{images.splits.num_classes} classes"
        )
    _check_recipes(settings, len(images.train))
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


def _check_files(settings: Settings) -> None:
    path = settings.pretrained
    if "transfer" in settings.stages and not (epath.Path(path or "none") / SPEC_FILE).exists():
        raise MissingFileError(
            f"transfer needs the folder of a finished model: pretrained={path!r}"
        )
    if path and not epath.Path(path).exists():
        raise MissingFileError(f"pretrained: no file or folder {path}")


def _check_recipes(settings: Settings, num_images: int) -> None:
    part = round(num_images * settings.filter.train_fraction)
    for stage, name, recipe, images in (
        ("pretrain", "pretrain", settings.pretrain, num_images),
        ("transfer", "finetune", settings.finetune, num_images),
        ("slim", "slim.gates", settings.slim.gates, num_images),
        ("slim", "slim.retrain", settings.slim.retrain, num_images),
        ("filter", "filter.train", settings.filter.train, part),
        ("supernet", "supernet", settings.supernet, num_images),
        ("finetune", "finetune", settings.finetune, num_images),
    ):
        is_used = settings.trains_dense if stage == "pretrain" else recipe.epochs
        if stage in settings.stages and is_used:
            _check_batch(name, recipe, images)


def _check_batch(name: str, recipe: Recipe, num_images: int) -> None:
    if recipe.batch_size > num_images:
        raise InputError(f"{name}: batch_size {recipe.batch_size} exceeds its {num_images} images")
    equal_share(f"{name}: batch_size", recipe.batch_size, jax.device_count(), recipe.accumulate)
