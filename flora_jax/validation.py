"""Everything in a config that can be wrong, found before any expensive work."""

import difflib

import jax
from etils import epath
from ml_collections import ConfigDict

from flora_jax.data.augment import eval_transform, train_transform
from flora_jax.evaluation import METRICS
from flora_jax.io import folder
from flora_jax.mesh import make_mesh
from flora_jax.run import Run, train_settings
from flora_jax.slim import SparsityPenalty, abstract_gated
from flora_jax.stages import STAGES

UNIFORM_BASELINES = ("supernet", "alone", "none")


def check(state: Run) -> None:
    """Raises ValueError or FileNotFoundError for a run that could not be finished."""
    config = state.config
    for name in config.stages:
        if name not in STAGES:
            raise ValueError(unknown("stage", name, STAGES))
    order = [name for name in STAGES if name in config.stages]
    if list(config.stages) != order:
        raise ValueError(f"stages {list(config.stages)} must come once each, in the order {order}")
    _check_teachers(config)
    for name, (low, high) in config.budget.items():
        if not 0 < low < high <= 1:
            raise ValueError(
                f"budget.{name} {(low, high)} must be two shares of the dense model's, "
                f"0 < low < high <= 1"
            )
    if config.search.budget not in config.budget:
        raise ValueError(unknown("search.budget", config.search.budget, config.budget))
    if config.search.latency_batch < 1:
        raise ValueError(
            f"search.latency_batch must be at least 1, got {config.search.latency_batch}"
        )
    if "slim" not in config.stages:  # a slimmed model's shape is not known yet
        state.check_budget(state.spec)
    if config.uniform_baseline not in UNIFORM_BASELINES:
        raise ValueError(unknown("uniform_baseline", config.uniform_baseline, UNIFORM_BASELINES))
    if config.metric not in METRICS:
        raise ValueError(unknown("metric", config.metric, METRICS))
    if not 0 <= config.filter.drop < 1:
        raise ValueError(f"filter.drop must lie in [0, 1), got {config.filter.drop}")
    if not 0 < config.filter.train_fraction < 1:
        raise ValueError(
            f"filter.train_fraction must lie in (0, 1), got {config.filter.train_fraction}"
        )
    _ = state.evolution_settings
    if "slim" in config.stages:
        _check_slim(state)
    train_transform(**state.augmentation)
    eval_transform(config.data.augmentation.name, state.spec.image_shape)
    make_mesh(config.fsdp)
    _check_recipes(state)
    if state.splits.num_classes != state.spec.num_classes:
        raise ValueError(
            f"model.num_classes is {state.spec.num_classes}, but {config.data.name} has "
            f"{state.splits.num_classes} classes"
        )
    if config.pretrained and not epath.Path(config.pretrained).exists():
        raise FileNotFoundError(f"pretrained: no file or folder {config.pretrained}")


def _check_recipes(state: Run) -> None:
    config = state.config
    num_images = len(state.splits.train)
    part = round(num_images * config.filter.train_fraction)
    for stage, name, recipe, images in (
        ("pretrain", "pretrain", config.pretrain, num_images),
        ("transfer", "finetune", config.finetune, num_images),
        ("slim", "slim.gates", config.slim.gates, num_images),
        ("slim", "slim.retrain", config.slim.retrain, num_images),
        ("filter", "filter.train", config.filter.train, part),
        ("supernet", "supernet", config.supernet, num_images),
        ("finetune", "finetune", config.finetune, num_images),
    ):
        if stage not in config.stages:
            continue
        try:
            train_settings(recipe, images)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if recipe.batch_size > images:
            raise ValueError(f"{name}: batch_size {recipe.batch_size} exceeds its {images} images")
        if recipe.repeats < 1:
            raise ValueError(f"{name}: repeats must be at least 1, got {recipe.repeats}")
        _check_share(name, recipe)
        if recipe.distill and recipe.stored_predictions and (recipe.mixup or recipe.cutmix):
            raise ValueError(
                f"{name}: stored predictions are of single images and cannot teach mixed ones; "
                f"set mixup and cutmix to 0, or stored_predictions to False"
            )


def _check_share(name: str, recipe: ConfigDict) -> None:
    """Each device takes an equal share of every micro-batch."""
    share = jax.device_count() * recipe.accumulate
    if recipe.batch_size % share:
        nearest = max(1, round(recipe.batch_size / share)) * share
        raise ValueError(
            f"{name}: batch_size {recipe.batch_size} cannot be shared by {jax.device_count()} "
            f"devices in {recipe.accumulate} parts; the nearest that can: {nearest}"
        )


def _check_teachers(config: ConfigDict) -> None:
    if config.pretrain.distill:
        raise ValueError("pretrain.distill must be False: the dense model has no teacher")
    if "transfer" in config.stages:
        if config.finetune.distill:
            raise ValueError("finetune.distill must be False: nobody teaches the new classes")
        others = set(config.stages) - {"transfer", "evaluate", "report"}
        if others:
            raise ValueError(f"transfer stands alone, without {', '.join(sorted(others))}")
        if not (epath.Path(config.pretrained or "none") / folder.SPEC_FILE).exists():
            raise FileNotFoundError(
                f"transfer needs the folder of a finished model: pretrained={config.pretrained!r}"
            )


def _check_slim(state: Run) -> None:
    settings = state.config.slim
    abstract_gated(state.spec, settings.attention, settings.tokens)
    SparsityPenalty(**settings.penalty)
    for kind, share in settings.budget.items():
        if not (0 < share <= 1 or (kind == "macs" and share == 0)):
            raise ValueError(f"slim.budget.{kind} must lie in (0, 1], got {share}")
    if settings.tile < 1:
        raise ValueError(f"slim.tile must be at least 1, got {settings.tile}")
    high = state.config.budget.macs[1]
    if "search" in state.config.stages and 0 < settings.budget.macs < high:
        raise ValueError(
            f"slim.budget.macs {settings.budget.macs} is below the subnet's, {high}: the slimmed "
            f"model must leave something to save"
        )


def unknown(what: str, name: str, known) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"unknown {what} {name!r}; choose one of {', '.join(known)}{hint}"
