"""A training of a run: batches, teacher and folder that belong to its name."""

import dataclasses
from collections.abc import Callable, Sequence

import jax

from flora_jax.cluster.mesh import make_mesh
from flora_jax.cluster.processes import is_first
from flora_jax.data.batches import Batches, train_batches
from flora_jax.data.sources import Source
from flora_jax.flora.sampling import Draw
from flora_jax.flora.supernet import Supernet
from flora_jax.io.json_lines import read_records
from flora_jax.models.functional import Parameters
from flora_jax.models.network import Network
from flora_jax.runs.checks import doubt_loss
from flora_jax.stages.run import Run
from flora_jax.training.loop import Evaluator, train
from flora_jax.training.metrics import METRICS_FILE
from flora_jax.training.settings import Recipe, TrainSettings
from flora_jax.training.stored_teacher import StoredTeacher
from flora_jax.training.teacher import Teacher, describe
from flora_jax.training.watch import watching

PREDICTIONS = "predictions"  # stored ones, in the folder of a training


def train_stage(
    run: Run,
    model: Network,
    recipe: Recipe,
    name: str,
    source: Source,
    *,
    teacher: Network | None = None,
    draw_genes: Draw | None = None,
    penalty: Callable[[Parameters], jax.Array] | None = None,
    evaluators: Sequence[Evaluator] = (),
) -> Network:
    """Trains in the run's folder `name`, or goes on with a training that was interrupted there.

    Args:
      model: where the training starts.
      source: the training images.
      teacher: what it learns from where the recipe distils.
      draw_genes, penalty, evaluators: as in `flora_jax.training.loop.train`.
    """
    batches = _batches(run, recipe, name, source)
    if not recipe.distill:
        teacher = None
    if teacher is not None and recipe.stored_predictions:
        stored = stored_teacher(run, teacher, recipe, name, source)
        stored.write()
        teacher, batches = None, stored.taught_batches
    model = train(
        model,
        batches,
        train_settings(recipe, len(source), run.settings.seed),
        directory=run.folder / name,
        name=name,
        normalization=run.settings.data.normalization,
        draw_genes=draw_genes,
        teacher=teacher,
        penalty=penalty,
        mesh=make_mesh(run.settings.fsdp),
        evaluators=evaluators,
        evaluate_every=recipe.evaluate_every(len(source)),
        profile_step=run.settings.profile_step,
        watch=watching(run.settings.watch, run.folder, name),
    )
    if not recipe.distill and is_first():
        records = read_records(run.folder / name / METRICS_FILE)
        doubt_loss(name, [record["loss"] for record in records])
    return model


def train_supernet(
    run: Run,
    supernet: Supernet,
    recipe: Recipe,
    name: str,
    source: Source,
    *,
    draw_genes: Draw,
    teacher: Network,
    evaluators: Sequence[Evaluator] = (),
) -> Supernet:
    """Trains a subnet a step, as `draw_genes` says; otherwise `train_stage`."""
    network = train_stage(
        run,
        supernet.network,
        recipe,
        name,
        source,
        teacher=teacher,
        draw_genes=draw_genes,
        evaluators=evaluators,
    )
    return Supernet(network, supernet.space)


def stored_teacher(
    run: Run, model: Network, recipe: Recipe, name: str, source: Source
) -> StoredTeacher:
    """The model as the teacher of the training `name`, its predictions kept on disk."""
    data = run.settings.data
    teacher = Teacher(model, data.normalization, recipe.compute_dtype)
    description = describe(
        data.name,
        source,
        teacher,
        batch_size=recipe.batch_size,
        steps=train_settings(recipe, len(source)).steps,
        seed=run.settings.seed_of(f"{name}/batches"),
        augmentation={
            "image_shape": run.spec.image_shape,
            "name": data.augmentation.name,
            **data.augmentation.changes,
            "repeats": recipe.repeats,
        },
    )
    folder = run.folder / name / PREDICTIONS
    return StoredTeacher(folder, teacher, description, _batches(run, recipe, name, source))


def train_settings(recipe: Recipe, num_images: int, seed: int = 0) -> TrainSettings:
    """Counts a recipe in steps; on TPU, whose programs are large, blocks are computed in a loop."""
    settings = recipe.settings(num_images, seed)
    return dataclasses.replace(settings, loop_over_blocks=jax.default_backend() == "tpu")


def _batches(run: Run, recipe: Recipe, name: str, source: Source) -> Callable[[int], Batches]:
    """Makes a function: step -> this process' batches of the training `name` from there on."""
    data = run.settings.data
    transform = data.augmentation.train(run.spec.image_shape)

    def batches(start_step: int) -> Batches:
        return train_batches(
            source,
            transform,
            recipe.batch_size,
            run.settings.seed_of(f"{name}/batches"),
            start_step,
            jax.process_index(),
            jax.process_count(),
            data.num_threads,
            data.num_workers,
            recipe.repeats,
        )

    return batches
