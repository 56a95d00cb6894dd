"""Runs the configured stages in order: skips what is done, goes on with what was interrupted."""

import difflib
import json
import logging
import time

from etils import epath
from ml_collections import ConfigDict

from flora_jax.data.augment import eval_transform, train_transform
from flora_jax.evaluation import METRICS
from flora_jax.io import folder
from flora_jax.io.files import read_json, write_json
from flora_jax.run import Run, train_settings
from flora_jax.slim import SparsityPenalty, abstract_gated
from flora_jax.stages import STAGES

UNIFORM_BASELINES = ("supernet", "alone", "none")

log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: epath.PathLike, stage: str | None = None) -> None:
    """Runs all stages of the config, or one of them, in `workdir`.

    Raises:
      ValueError: the config does not make sense, or `workdir` was made by another config.
      RuntimeError: the one stage asked for needs an earlier one that is not done yet.
    """
    state = Run(config, epath.Path(workdir))
    check(state)
    if stage is not None and stage not in config.stages:
        raise ValueError(_unknown("stage", stage, config.stages))
    _claim(state)
    done_file = state.folder / "stages.json"
    done = read_json(done_file) if done_file.exists() else {}
    for name in config.stages:
        if stage is not None and name != stage:
            if config.stages.index(name) < config.stages.index(stage) and name not in done:
                raise RuntimeError(f"stage {stage!r} needs {name!r}, which is not done yet")
            continue
        if name in done and name != "report":
            log.info("%s: done in %.0f s, skipped", name, done[name]["seconds"])
            continue
        log.info("%s: starts", name)
        started = time.monotonic()
        STAGES[name](state)
        done[name] = {"seconds": round(time.monotonic() - started, 3)}
        write_json(done_file, done)


def check(state: Run) -> None:
    """Everything in the config that can be wrong, before any expensive work."""
    config = state.config
    for name in config.stages:
        if name not in STAGES:
            raise ValueError(_unknown("stage", name, STAGES))
    order = [name for name in STAGES if name in config.stages]
    if list(config.stages) != order:
        raise ValueError(f"stages {list(config.stages)} must come once each, in the order {order}")
    _check_teachers(config)
    low, high = config.budget.macs
    if not 0 < low < high <= 1:
        raise ValueError(
            f"budget.macs {(low, high)} must be two shares of the dense model's MACs, "
            f"0 < low < high <= 1"
        )
    if "slim" not in config.stages:  # a slimmed model's shape is not known yet
        state.check_budget(state.spec)
    if config.uniform_baseline not in UNIFORM_BASELINES:
        raise ValueError(_unknown("uniform_baseline", config.uniform_baseline, UNIFORM_BASELINES))
    if config.metric not in METRICS:
        raise ValueError(_unknown("metric", config.metric, METRICS))
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
    if state.splits.num_classes != state.spec.num_classes:
        raise ValueError(
            f"model.num_classes is {state.spec.num_classes}, but {config.data.name} has "
            f"{state.splits.num_classes} classes"
        )
    if config.pretrained and not epath.Path(config.pretrained).exists():
        raise FileNotFoundError(f"pretrained: no file or folder {config.pretrained}")


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


def _claim(state: Run) -> None:
    """A folder belongs to one config; the list of stages may change."""
    path = state.folder / "config.json"
    current = json.loads(state.config.to_json())
    if not path.exists():
        write_json(path, current)
        return
    differences = [
        f"{name}: {there!r} there, {here!r} now"
        for name, there, here in _differences(read_json(path), current)
        if name != "stages"
    ]
    if differences:
        raise ValueError(
            f"{state.folder} was made by another config; choose another --workdir or undo:\n  "
            + "\n  ".join(differences)
        )


def _differences(there, here, name: str = ""):
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            inner = f"{name}.{key}" if name else key
            yield from _differences(there.get(key), here.get(key), inner)
    elif there != here:
        yield name, there, here


def _unknown(what: str, name: str, known) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"unknown {what} {name!r}; choose one of {', '.join(known)}{hint}"
