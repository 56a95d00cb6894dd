"""Training by a recipe: `flora_jax.train`, and the loop beneath it.

One network, supernet or gated network is trained; an interrupted training goes on from its newest
checkpoint, bit for bit.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from flora_jax.cluster.mesh import make_mesh, replicate, shard_batch, shard_parameters
from flora_jax.cluster.processes import StopRequest, Timer, is_first
from flora_jax.data.labels import check_labels
from flora_jax.data.normalize import Normalization
from flora_jax.errors import InputError, UserError
from flora_jax.evaluation.evaluate import EvaluationSet, HeldOut
from flora_jax.evaluation.outputs import outputs_title
from flora_jax.io.checkpoint import Checkpoints
from flora_jax.io.json_lines import read_records
from flora_jax.io.paths import user_path
from flora_jax.models import functional
from flora_jax.models.functional import Parameters
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.progress import Progress
from flora_jax.training.image_set import ImageSet
from flora_jax.training.metrics import METRICS_FILE, BestParameters, MetricsFile, profiled
from flora_jax.training.settings import Recipe, TrainSettings, seed_of
from flora_jax.training.step import TrainState, initial_state, make_step
from flora_jax.training.stored_predictions import StoredTeacher, Teacher, describe
from flora_jax.training.watch import Watch, not_watched

log = logging.getLogger(__name__)

PREDICTIONS = "predictions"  # stored ones, in the folder of a training
_SAME_LOSS = 0.98


class NonFiniteLossError(UserError, FloatingPointError):
    """The loss or the gradient became NaN or infinite."""


Evaluator = Callable[[Network], Iterable[tuple[str, float]]]


class Wrapped(Protocol):
    """A `Supernet` or a gated network: a dataclass around the network that is trained."""

    @property
    def network(self) -> Network: ...


Model = TypeVar("Model", bound=Network | Wrapped)


def train(
    model: Model,
    images: ImageSet,
    recipe: Recipe = Recipe(),
    *,
    directory: epath.PathLike | None = None,
    name: str = "",
    teacher: Network | None = None,
    penalty: Callable[[Parameters], jax.Array] | None = None,
    sample: str | Callable[[int], np.ndarray] = "low_rank_aware",
    heldout: ImageSet | EvaluationSet | None = None,
    metric: str = "",
    seed: int = 0,
    fsdp: int = 1,
    profile_step: int = 0,
    watch: Watch | None = None,
) -> Model:
    """Trains by a recipe, a subnet a step where the model is a supernet; goes on where it stopped.

    Args:
      model: a network, a `Supernet`, or a gated network of `flora_jax.slim.add_gates`.
      recipe: by default that of FLORA's supernet, which takes 150 epochs.
      directory: receives checkpoints/ and metrics.jsonl, from which an interrupted training goes
        on, bit for bit; None: nothing is kept.
      name: of the training, from which its random numbers follow; by default the directory's.
      teacher: the uncompressed network; where `recipe.distill`, its predictions are the targets, or
        its features where the model has no classes. None: the labels are.
      penalty: of the parameters, added to the loss, such as `flora_jax.slim.SparsityPenalty()`.
      sample: which subnets of a supernet are trained: a sampling of `RankSpace.sample`, or a
        function step -> genes int32 [L].
      heldout: looked at once every `recipe.evaluate_epochs`; its metrics go to metrics.jsonl.
      metric: by which the best parameters are chosen; empty: top-1, or cosine.
      seed: of everything random.
      fsdp: devices that share one copy of the parameters and the optimiser's state.
      profile_step: a profile of this step is written to `directory`; 0 for none.
      watch: what else gets the metrics, as `watching` makes it.

    Raises:
      InputError: more images in a batch than there are, no teacher and labels that are no class of
        the model or all of one class, no teacher of a model without classes, an unknown sampling,
        or what needs a directory (stored predictions, the best parameters, a profile) without one.
      NonFiniteLossError: training diverged; the last good checkpoint is kept.
      Stopped: the process was told to end; the step it was at is saved.
    """
    network = model if isinstance(model, Network) else model.network
    space, spec = getattr(model, "space", None), network.spec
    folder = None if directory is None else user_path(directory)
    name = name or (folder.name if folder is not None else "train")
    measured = None if heldout is None else measured_by(heldout, spec, teacher)
    if not recipe.distill:
        teacher = None
    if teacher is None:
        _check_teaches(images, spec)
    batches = images.batches(recipe, spec.image_shape, seed_of(seed, f"{name}/batches"))
    if teacher is not None and recipe.stored_predictions:
        spec.check_classifies("stored_predictions")
        if folder is None:
            raise InputError("stored_predictions needs a directory to store them in")
        stored = stored_teacher(teacher, images, recipe, name, folder, seed)
        stored.write()
        teacher, batches = None, stored.taught_batches
    trained = run_steps(
        network,
        batches,
        steps_of(recipe, len(images), seed),
        directory=folder,
        name=name,
        normalization=images.normalization,
        draw_genes=None if space is None else _draw(space, sample, seed_of(seed, f"{name}/genes")),
        teacher=teacher,
        penalty=penalty,
        mesh=make_mesh(fsdp),
        evaluators=() if measured is None else [HeldOut(measured, space, metric)],
        evaluate_every=recipe.evaluate_every(len(images)),
        profile_step=profile_step,
        watch=watch,
    )
    if not recipe.distill and folder is not None and is_first():
        losses = [record["loss"] for record in read_records(folder / METRICS_FILE)]
        warn_if_nothing_is_learnt(name, losses)
    if isinstance(model, Network):
        return cast(Model, trained)
    return cast(Model, dataclasses.replace(cast(Any, model), network=trained))


def run_steps(
    model: Network,
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
    settings: TrainSettings,
    *,
    directory: epath.PathLike | None,
    name: str,
    normalization: Normalization,
    draw_genes: Callable[[int], np.ndarray] | None = None,
    teacher: Network | None = None,
    penalty: Callable[[functional.Parameters], jax.Array] | None = None,
    mesh: Mesh | None = None,
    evaluators: Sequence[Evaluator] = (),
    evaluate_every: int = 0,
    profile_step: int = 0,
    watch: Watch | None = None,
) -> Network:
    """Trains until `settings.steps`, going on from the newest checkpoint in `directory`.

    Everything random is a function of the step, so an interrupted run that goes on gives the
    same parameters, bit for bit, as one that was not.

    Args:
      model: where training starts when there is no checkpoint yet.
      batches: step -> this process' batches from that step on: image uint8 [B_local, H, W, C],
        label int32 [B_local].
      directory, name, teacher, penalty, watch: as in `flora_jax.train`. metrics.jsonl has a line a
        step: loss, gradient norm and learning rate; now and then images a second and what the
        evaluators find.
      draw_genes: step -> int32 [L], the subnet that this step trains; None for a plain model.
      mesh: the devices to train on; by default all, every one with whole parameters.
      evaluators: each gets the model as it is, and yields (name, value) pairs; all processes call
        them together. The greatest first value of the first one marks the best parameters.
      evaluate_every: steps between two evaluations, and after the last step; 0 for none.
      profile_step: a profile of this step is written to `directory`/profile; 0 for none.

    Returns:
      A model with the final parameters (their moving average where the settings ask for one), or
      with the best ones where `settings.result` is "best".

    Raises:
      InputError: the network has no classes and no teacher, it has classes and its teacher has
        none, the folder holds a longer training, or there is none to keep the best parameters in.
      NonFiniteLossError: training diverged. The last good checkpoint is kept.
      Stopped: the process was told to end (SIGTERM, Ctrl-C); the step it was at is saved.
    """
    folder = None if directory is None else epath.Path(directory)
    if folder is None and (settings.keep_best or profile_step):
        raise InputError("keep_best and profile_step need a directory to write to")
    _check_can_learn(model, teacher, name)
    structure, parameters = functional.split(model)
    teacher_structure, teacher_parameters = functional.split(teacher) if teacher else (None, None)
    mesh = mesh or make_mesh()
    step_function = make_step(structure, settings, normalization, mesh, teacher_structure, penalty)
    teacher_parameters = replicate(teacher_parameters, mesh)
    state = shard_parameters(initial_state(structure, parameters, settings), mesh)
    evaluate_every = evaluate_every if evaluators else 0

    with contextlib.ExitStack() as stack:
        checkpoints = None
        if folder is not None:
            checkpoints = Checkpoints(folder / "checkpoints", keep_every=settings.keep_every)
            state = stack.enter_context(checkpoints).restore(state)
        start = int(state.step)
        if start > settings.steps:
            raise InputError(
                f"{folder} holds a checkpoint of step {start}, but training ends at step "
                f"{settings.steps}; choose another folder or at least {start} steps"
            )
        best = None
        if folder is not None and evaluate_every and settings.keep_best:
            best = BestParameters(folder / "best", state.final_parameters, mesh)
            stack.enter_context(best)
        if start == settings.steps:
            return _result(structure, state, mesh, best if settings.result == "best" else None)
        if start:
            log.info("%s: goes on at step %d of %d", name, start, settings.steps)
        write = stack.enter_context((watch or not_watched)(start))
        metrics_file = stack.enter_context(
            MetricsFile(folder and folder / METRICS_FILE, start, settings, watch=write)
        )
        progress = stack.enter_context(
            Progress(name, total=settings.steps, start=start, unit="step")
        )
        stream = batches(start)
        if hasattr(stream, "close"):
            stack.callback(stream.close)
        stop_request = stack.enter_context(StopRequest())
        timer = Timer(60 * settings.checkpoint_minutes)

        # Metrics are read back in bulk, so that the device never waits for the host.
        unread: list[jax.Array] = []
        for step in range(start, settings.steps):
            genes = None if draw_genes is None else draw_genes(step)
            batch = shard_batch(next(stream), mesh)
            if folder is not None and profile_step and step == profile_step:
                run = profiled(step_function, folder / "profile")
            else:
                run = step_function
            state, metrics = run(state, batch, genes, teacher_parameters)
            unread.append(metrics)
            done = step + 1
            is_last = done == settings.steps
            stops = stop_request.is_set()
            logs = done % settings.log_every == 0
            is_due = done % settings.checkpoint_every == 0 or (logs and timer.is_due())
            evaluates = evaluate_every and (is_last or done % evaluate_every == 0)
            saves = stops or is_due or is_last
            if saves or logs or evaluates:
                values = np.stack(jax.device_get(unread))
                _check_finite(values, done - len(unread), draw_genes, checkpoints)
                metrics_file.read(values)
                found: dict[str, float] = {}
                if evaluates:
                    network = _result(structure, state, mesh)
                    found = dict(pair for evaluate in evaluators for pair in evaluate(network))
                    if best is not None:
                        best.keep_better(done, state.final_parameters, next(iter(found.values())))
                progress.update(len(unread), **metrics_file.write(found, durable=saves))
                unread.clear()
            if saves and checkpoints is not None:
                checkpoints.save(done, state)
            if stops:
                kept = "was" if checkpoints is None else "is saved"
                raise stop_request.stopped(f"{name} {kept} at step {done} of {settings.steps}")
        return _result(structure, state, mesh, best if settings.result == "best" else None)


def _check_can_learn(model: Network, teacher: Network | None, name: str) -> None:
    if teacher is None:
        model.spec.check_classifies(
            f"training {name} without a teacher", "give the uncompressed network as its teacher"
        )
    elif model.spec.classifies:
        teacher.spec.check_classifies(f"teaching {name} its classes")
    elif model.spec.num_classes and teacher.spec.kind != model.spec.kind:
        raise InputError(
            f"{name}: a network with {outputs_title(teacher.spec)} cannot teach one with "
            f"{outputs_title(model.spec)}"
        )


def _result(
    structure, state: TrainState, mesh: Mesh, best: BestParameters | None = None
) -> Network:
    """Puts the trained model on this process' own device, as one that was loaded."""
    parameters = replicate(state.final_parameters if best is None else best.read(), mesh)
    return functional.merge(
        structure, jax.tree.map(lambda p: jnp.asarray(np.asarray(p)), parameters)
    )


def _check_finite(
    values: np.ndarray, first: int, draw_genes, checkpoints: Checkpoints | None
) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if not bad.size:
        return
    step = first + int(bad[0])
    loss, gradient_norm = values[bad[0]]
    genes = "" if draw_genes is None else f" with genes {np.asarray(draw_genes(step)).tolist()}"
    last_good = None if checkpoints is None else checkpoints.latest_path()
    raise NonFiniteLossError(
        f"loss {loss} and gradient norm {gradient_norm} at step {step}{genes}. "
        f"The last good checkpoint is {last_good or 'none yet'}; "
        f"a lower learning rate, longer warm-up or a smaller clip_norm usually helps."
    )


def steps_of(recipe: Recipe, num_images: int, seed: int = 0) -> TrainSettings:
    """A recipe in steps; on TPU, whose programs are large, blocks are computed in a loop."""
    settings = recipe.settings(num_images, seed)
    return dataclasses.replace(settings, loop_over_blocks=jax.default_backend() == "tpu")


def stored_teacher(
    teacher: Network, images: ImageSet, recipe: Recipe, name: str, folder: epath.Path, seed: int
) -> StoredTeacher:
    """The teacher of the training `name` in `folder`, its predictions kept there on disk."""
    teaches = Teacher(teacher, images.normalization, recipe.compute_dtype)
    image_shape, batches_seed = teacher.spec.image_shape, seed_of(seed, f"{name}/batches")
    description = describe(
        images.name,
        images.source,
        teaches,
        batch_size=recipe.batch_size,
        steps=steps_of(recipe, len(images)).steps,
        seed=batches_seed,
        augmentation={
            "image_shape": image_shape,
            "name": images.augmentation.name,
            **images.augmentation.changes,
            "repeats": recipe.repeats,
        },
    )
    batches = images.batches(recipe, image_shape, batches_seed)
    return StoredTeacher(folder / PREDICTIONS, teaches, description, batches)


def _draw(space, sample: str | Callable[[int], np.ndarray], seed: int):
    if callable(sample):
        return sample
    space.sample(np.random.default_rng(seed), 1, sample)  # raises for an unknown one
    return lambda step: space.sample(np.random.default_rng([seed, step]), 1, sample)[0]


def measured_by(
    images: ImageSet | EvaluationSet,
    spec: Spec,
    teacher: Network | None,
    part: int | None = None,
) -> EvaluationSet:
    """Images on the devices by which a network is measured: labels, or its teacher's features.

    Args:
      images: an `EvaluationSet` is taken as it is.
      part: of so many images at most, shuffled; None: in order.
    """
    if isinstance(images, EvaluationSet):
        return images
    on_devices = images.on_devices if part is None else images.in_parts(part)
    if spec.classifies:
        return on_devices
    if teacher is None:
        raise InputError(
            f"a network with {outputs_title(spec)} is measured by its teacher's outputs: give the "
            f"uncompressed network as teacher="
        )
    return on_devices.compared_with(teacher)


def _check_teaches(images: ImageSet, spec: Spec) -> None:
    spec.check_classifies("training without a teacher", "give the uncompressed network as teacher=")
    if not isinstance(images.images, np.ndarray):
        return  # the labels of a source are checked as it is opened
    if images.labels is None:
        raise InputError("images without labels teach nothing: give a teacher, or labels")
    labels = images.labels
    check_labels(labels, spec.num_classes, "the images")
    if len(labels) and (labels == labels[0]).all():
        raise InputError(f"all images are of the class {labels[0]}, of which nothing can be learnt")


def warn_if_nothing_is_learnt(name: str, losses: Sequence[float]) -> None:
    """Warns of a training at whose end the loss [steps] is that of its beginning."""
    tenth = len(losses) // 10
    if not tenth:
        return
    first, last = np.mean(losses[:tenth]), np.mean(losses[-tenth:])
    if last > _SAME_LOSS * first:
        log.warning(
            "%s: the loss has not moved, %.4g in its first tenth and %.4g in its last: see "
            "learning rate, epochs and labels",
            *(name, first, last),
        )
