"""What a run would do, how long that takes on this device and what it leaves on disk: --dry_run.

Times are counted in passes of the dense network over one image, one of which is measured; a subnet
takes its share of the multiply-adds.
"""

import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from flora_jax.closed_form.compress import MOMENT_IMAGES
from flora_jax.io.paths import is_url
from flora_jax.models.factory import create
from flora_jax.models.spec import Spec
from flora_jax.preflight.hlo import size_text
from flora_jax.report.table import aligned, human_count
from flora_jax.runs.budgets import extracted_kinds
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings, network_spec
from flora_jax.runs.workdir import Run
from flora_jax.timing import busy_elsewhere, other_work, time_in_turn
from flora_jax.training.settings import Recipe
from flora_jax.weights.export.engines import engine_of

# Passes that an image takes, of a DINOv2 ViT-S/14 at 98 pixels on two CPU cores: three would be the
# products of a training step, the rest are the optimiser, what lies between products, and decoding.
_TRAIN, _CALIBRATE = 4.5, 3
# Compiling, in that of a forward pass: of a training with its looks, of a budget's closed form, of
# scoring; measured there, too.
_TRAINING, _FITTING, _SCORING = 12, 8, 3
_ROUGH = (0.7, 1.4)  # what such counts may be off by
_BYTES = 4  # of a parameter
_REFIT = 2.4  # forward passes of the dense network that a refit takes, at half of its MACs
_CHECKPOINT = 3  # copies of the parameters in it: themselves and AdamW's two moments
_KEPT_CHECKPOINTS = 2
_ROUNDS = 6  # of exchanges, from both starts together
_MOST_IMAGES = 16  # measured at once


class Work(NamedTuple):
    """One thing that a stage does."""

    stage: str
    what: str
    images: int  # that it looks at, 0 for none
    epochs: float  # how often each
    steps: int  # of an optimiser, 0 for none
    passes: float  # of the dense network over one image, in all
    compiling: float = 0  # of programs, in that of the dense network's forward pass


def work_of(settings: Settings, images: Images, steps: Iterable[str]) -> Iterator[Work]:
    """The work of each of these steps of a run with these images."""
    spec, num_train = network_spec(settings), len(images.train)
    space, heldout = settings.space.of(spec), len(images.splits.heldout)
    low, high = space.macs_range()
    middle = (low + high) / 2 / spec.macs()  # the share of a subnet that training draws
    budgets = [sum(window) / 2 for window in settings.spending.ranges]
    kinds = extracted_kinds(settings)
    trainings = {name: recipe for name, recipe, _ in settings.trainings(num_train)}

    def training(stage: str, what: str, recipe: Recipe, share: float, count: int, number: int = 1):
        evaluations = recipe.epochs / recipe.evaluate_epochs if recipe.evaluate_epochs else 0
        passes = recipe.epochs * count * (_TRAIN * share + bool(recipe.distill))
        passes += evaluations * heldout * share
        steps = recipe.settings(count).steps if recipe.epochs else 0
        compiling = _TRAINING * number if steps else 0
        return Work(stage, what, count, recipe.epochs, number * steps, number * passes, compiling)

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
            yield Work(stage, "covariances", number, 1, 0, _CALIBRATE * number, 1)
        elif stage == "filter":
            part = round(num_train * settings.filter.train_fraction)
            recipe, blocks = settings.filter.train, space.num_blocks
            yield training(stage, f"{blocks} local supernets", recipe, 1, part, blocks)
            triples = sum(len(kept) for kept in space.kept)
            yield Work(
                stage, f"{triples} triples scored", heldout, 1, 0, triples * heldout / 2, _SCORING
            )
        elif stage == "compress":
            number = min(settings.compression.images, num_train)
            moments = min(number, MOMENT_IMAGES)
            passes = _CALIBRATE * moments + len(budgets) * _REFIT * number
            yield Work(
                stage,
                f"fitted at {len(budgets)} budgets",
                number,
                1,
                0,
                passes,
                _FITTING * len(budgets),
            )
        elif stage == "allocate":
            number = min(settings.allocation.images, num_train + heldout)
            # Half of the images: half a network for each choice, and some rounds of neighbours.
            networks = sum(map(len, space.choices)) / 2 + len(budgets) * _ROUNDS * space.num_layers
            yield Work(
                stage, "sensitivities and exchanges", number, 1, 0, number / 2 * networks, _SCORING
            )
        elif stage == "search":
            found = settings.search.generations * settings.search.population
            passes = found * heldout * sum(budgets)
            what = f"{found * len(budgets)} subnets scored"
            yield Work(stage, what, heldout, 1, 0, passes, _SCORING)
        elif stage == "finetune":
            for share in budgets:
                number, what = len(kinds), f"{', '.join(kinds)} at {share:.2f}"
                yield training(stage, what, settings.finetune, share, num_train, number)
        elif stage in trainings:  # of a subnet a step
            yield training(stage, "training", trainings[stage], middle, num_train)
        elif stage == "evaluate":
            models = 1 + len(kinds) * len(budgets)
            test = len(images.splits.test)
            yield Work(stage, f"{models} models", test, 1, 0, models * test, models)
        else:
            yield Work(stage, ", ".join(settings.export if stage == "export" else ()), 0, 0, 0, 0)


def bytes_of(settings: Settings, spec: Spec) -> int:
    """The most that a run has on disk, while the supernet trains and with all models."""
    layers = settings.space.of(spec).spec.layers
    wider = sum(layer.num_weights(layer.full_rank) - layer.num_weights(None) for layer in layers)
    supernet, dense = spec.num_params() + wider, spec.num_params()
    share = sum(sum(window) / 2 for window in settings.spending.ranges)
    models = dense + 2 * len(extracted_kinds(settings)) * share * dense
    models += len(settings.export) * (share if settings.cuts_by else 1) * dense
    trained = supernet if settings.trains_supernet else dense
    checkpoints = _KEPT_CHECKPOINTS * _CHECKPOINT * trained
    return round(_BYTES * (models + (1 + settings.trains_supernet) * supernet + checkpoints))


def plan(run: Run, steps: Iterable[str], done: Collection[str]) -> str:
    """The table that --dry_run prints: a line for each thing that a run would do, and its sums."""
    settings, images, steps = run.settings, run.images, list(steps)
    assert images is not None
    spec, work = network_spec(settings), list(work_of(settings, images, steps))
    batch = min(_MOST_IMAGES, settings.data.eval_batch_size)
    network = create(spec)
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed as if for once
    cores_elsewhere, started = other_work(), time.perf_counter()
    forward = engine_of("jax").open(network)(batch)
    forward()
    compiling = time.perf_counter() - started
    rounds = time_in_turn({"dense": forward}, rounds=5)["dense"]
    busy, ms = cores_elsewhere(), np.percentile(rounds, (0, 50, 100)) / batch
    compiling = max(compiling - rounds[0] / 1000, 0)
    longest = max(map(len, steps))
    rows, to_do = [["stage", "images", "epochs", "steps", "minutes"]], []
    for each in work:
        to_do += [each] if each.stage not in done else []
        numbers = [f"{each.images:,}" if each.images else ""]
        numbers += [f"{each.epochs:g}", f"{each.steps:,}"] if each.steps else ["", ""]
        minutes = (each.passes * ms[1] / 1000 + each.compiling * compiling) / 60
        shown = "done" if each.stage in done else f"{minutes:.1f}"
        rows.append([f"{each.stage:<{longest}}  {each.what}", *numbers, shown])
    compiled = sum(each.compiling for each in to_do) * compiling / 60
    low, middle, high = sum(each.passes for each in to_do) * ms / 60_000 + compiled
    beside = busy_elsewhere(busy)
    least, most = _ROUGH[0] * low, _ROUGH[1] * high
    needed, free = bytes_of(settings, spec), ""
    if not is_url(run.folder):
        parents = run.folder.absolute().parents
        there = next(place for place in (run.folder, *parents) if place.exists())
        free = f", where {size_text(shutil.disk_usage(there).free)} are free"
    return "\n".join(
        [
            aligned(rows),
            "",
            str(images.splits),
            f"dense: {human_count(spec.macs())} multiply-adds, {human_count(spec.num_params())} "
            f"parameters, {ms[1]:.3g} ms an image on this device{beside and ', while '}{beside}",
            f"about {middle:.0f} minutes ({least:.0f} to {most:.0f}), of which compiling "
            f"{compiled:.1f} where no run has done it before",
            f"{size_text(needed)} on disk at most{free}",
        ]
    )
