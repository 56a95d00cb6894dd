"""What a run would do, how long that takes on this device and what it leaves on disk: --dry_run.

Times are counted in passes of the dense network over one image, one of which is measured; a subnet
takes its share of the multiply-adds.
"""

import dataclasses
import shutil
from collections.abc import Collection, Iterable, Iterator

import numpy as np
from etils import epath

from flora_jax.flora.extras.latency import measure_networks
from flora_jax.flora.space import RankSpace
from flora_jax.io.paths import is_url
from flora_jax.models.spec import Spec
from flora_jax.preflight.table import aligned, size_text
from flora_jax.report.table import human_count
from flora_jax.runs.budgets import extracted_kinds
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings, network_spec
from flora_jax.runs.workdir import Run
from flora_jax.training.settings import Recipe

# Passes that an image takes, of a DINOv2 ViT-S/14 at 98 pixels on two CPU cores: three would be the
# products of a training step, the rest are the optimiser, what lies between products, and decoding.
_TRAIN, _CALIBRATE = 4.5, 3
_BYTES = 4  # of a parameter
_CHECKPOINT = 3  # copies of the parameters in it: themselves and AdamW's two moments
_KEPT_CHECKPOINTS = 2
_ROUNDS = 6  # of exchanges, from both starts together
_MOST_IMAGES = 16  # measured at once


@dataclasses.dataclass(frozen=True)
class Work:
    """One thing that a stage does.

    Attributes:
      images: that it looks at, how often each, and in how many optimiser steps; 0 for none.
      passes: of the dense network over one image, in all.
    """

    stage: str
    what: str
    images: int
    epochs: float
    steps: int
    passes: float


def work_of(settings: Settings, images: Images, steps: Iterable[str]) -> Iterator[Work]:
    """The work of each of these steps of a run with these images."""
    spec, num_train = network_spec(settings), len(images.train)
    space, heldout = settings.space.of(spec), len(images.splits.heldout)
    low, high = space.macs_range()
    middle = (low + high) / 2 / spec.macs()  # the share of a subnet that training draws
    budgets = [sum(window) / 2 for window in settings.budget.windows("macs")]
    kinds = extracted_kinds(settings)

    def training(stage: str, what: str, recipe: Recipe, share: float, count: int, number: int = 1):
        evaluations = recipe.epochs / recipe.evaluate_epochs if recipe.evaluate_epochs else 0
        passes = recipe.epochs * count * (_TRAIN * share + bool(recipe.distill))
        passes += evaluations * heldout * share
        steps = recipe.settings(count).steps if recipe.epochs else 0
        return Work(stage, what, count, recipe.epochs, number * steps, number * passes)

    for stage in steps:
        if stage == "pretrain" and settings.trains_dense:
            yield training(stage, "training", settings.pretrain, 1, num_train)
        elif stage == "transfer":
            yield training(stage, "training", settings.finetune, 1, num_train)
        elif stage == "slim":
            yield training(stage, "gates", settings.slim.gates, 1, num_train)
            yield training(stage, "retraining", settings.slim.retrain, 1, num_train)
        elif stage == "calibrate":
            number = min(settings.calibration.images, num_train)
            yield Work(stage, "second moments", number, 1, 0, _CALIBRATE * number)
        elif stage == "filter":
            part = round(num_train * settings.filter.train_fraction)
            recipe, blocks = settings.filter.train, space.num_blocks
            yield training(stage, f"{blocks} local supernets", recipe, 1, part, blocks)
            triples = sum(len(kept) for kept in space.kept)
            yield Work(stage, f"{triples} triples scored", heldout, 1, 0, triples * heldout / 2)
        elif stage == "supernet":
            yield training(stage, "training", settings.supernet, middle, num_train)
        elif stage == "allocate":
            number = min(settings.allocation.images, num_train + heldout)
            passes = _allocation(space, number, len(budgets))
            yield Work(stage, "drops and exchanges", number, 1, 0, passes)
        elif stage == "search":
            found = settings.search.generations * settings.search.population
            passes = found * heldout * sum(budgets)
            what = f"{found * len(budgets)} subnets scored"
            yield Work(stage, what, heldout, 1, 0, passes)
        elif stage == "finetune":
            for share in budgets:
                number, what = len(kinds), f"{', '.join(kinds)} at {share:.2f}"
                yield training(stage, what, settings.finetune, share, num_train, number)
        elif stage == "evaluate":
            models = 1 + len(kinds) * len(budgets)
            test = len(images.splits.test)
            yield Work(stage, f"{models} models", test, 1, 0, models * test)
        elif stage == "export":
            yield Work(stage, ", ".join(settings.export), 0, 0, 0, 0)
        else:
            yield Work(stage, "", 0, 0, 0, 0)


def _allocation(space: RankSpace, images: int, budgets: int) -> float:
    """Half of the images: half a network for each choice, and some rounds of their neighbours."""
    choices = sum(map(len, space.choices))
    return images / 2 * (choices / 2 + budgets * _ROUNDS * space.num_layers)


def bytes_of(settings: Settings, spec: Spec) -> int:
    """The most that a run has on disk, while the supernet trains and with all models."""
    layers = settings.space.of(spec).spec.layers
    wider = sum(layer.num_weights(layer.full_rank) - layer.num_weights(None) for layer in layers)
    supernet, dense = spec.num_params() + wider, spec.num_params()
    shares = [sum(window) / 2 for window in settings.budget.windows("macs")]
    models = dense + 2 * len(extracted_kinds(settings)) * sum(shares) * dense
    models += len(settings.export) * (sum(shares) if "extract" in settings.stages else 1) * dense
    if "supernet" not in settings.stages:
        return round(_BYTES * (models + supernet + _KEPT_CHECKPOINTS * _CHECKPOINT * dense))
    return round(_BYTES * (models + 2 * supernet + _KEPT_CHECKPOINTS * _CHECKPOINT * supernet))


def plan(run: Run, steps: Iterable[str], done: Collection[str]) -> str:
    """The table that --dry_run prints: a line for each thing that a run would do, and its sums."""
    settings, images, steps = run.settings, run.images, list(steps)
    assert images is not None
    spec, work = network_spec(settings), list(work_of(settings, images, steps))
    batch = min(_MOST_IMAGES, settings.data.eval_batch_size)
    ms = np.median(measure_networks({"dense": spec}, batch, rounds=5)["dense"]) / batch
    longest = max(map(len, steps))
    rows, total = [["stage", "images", "epochs", "steps", "minutes"]], 0.0
    for each in work:
        minutes = 0.0 if each.stage in done else each.passes * ms / 60_000
        total += minutes
        rows.append(
            [
                f"{each.stage:<{longest}}  {each.what}",
                f"{each.images:,}" if each.images else "",
                f"{each.epochs:g}" if each.steps else "",
                f"{each.steps:,}" if each.steps else "",
                "done" if each.stage in done else f"{minutes:.1f}",
            ]
        )
    splits, needed = images.splits, bytes_of(settings, spec)
    return "\n".join(
        [
            *aligned(rows),
            "",
            f"{len(splits.train):,} images to train with, {len(splits.heldout):,} to choose by, "
            f"{len(splits.test):,} to report on; {splits.num_classes or 'no'} classes",
            f"dense: {human_count(spec.macs())} multiply-adds, {human_count(spec.num_params())} "
            f"parameters, {ms:.3g} ms an image on this device",
            f"about {total:.0f} minutes, apart from compiling, and "
            f"{size_text(needed)} on disk at most{_free(run.folder)}",
        ]
    )


def _free(folder: epath.Path) -> str:
    if is_url(folder):
        return ""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return f", where {size_text(shutil.disk_usage(there).free)} are free"
