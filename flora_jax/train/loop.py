"""The training loop of every stage: dense, local supernets, supernet, fine-tuning."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from flora_jax.cluster.mesh import make_mesh, replicate, shard_batch, shard_parameters
from flora_jax.cluster.processes import Stopped, StopRequest, is_first
from flora_jax.data.normalize import Normalization
from flora_jax.errors import InputError, UserError
from flora_jax.io.checkpoint import Checkpoints
from flora_jax.io.json_lines import JsonLines, read_lines
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.progress import Progress
from flora_jax.train.settings import TrainSettings
from flora_jax.train.step import TrainState, initial_state, make_step


class NonFiniteLossError(UserError, FloatingPointError):
    """The loss or the gradient became NaN or infinite."""


def train(
    model: Network,
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
    settings: TrainSettings,
    *,
    directory: epath.PathLike,
    name: str,
    normalization: Normalization,
    draw_genes: Callable[[int], np.ndarray] | None = None,
    teacher: Network | None = None,
    penalty: Callable[[functional.Parameters], jax.Array] | None = None,
    mesh: Mesh | None = None,
) -> Network:
    """Trains until `settings.steps`, going on from the newest checkpoint in `directory`.

    Everything random is a function of the step, so an interrupted run that goes on gives the
    same parameters, bit for bit, as one that was not.

    Args:
      model: where training starts when there is no checkpoint yet.
      batches: step -> this process' batches from that step on: image uint8 [B_local, H, W, C],
        label int32 [B_local].
      directory: receives checkpoints/ and metrics.jsonl (step, loss, gradient norm).
      name: what the progress display calls the stage.
      draw_genes: step -> int32 [L], the subnet that this step trains; None for a plain model.
      teacher: its soft predictions on the same images are the targets; None: the labels are.
      penalty: of the parameters, added to the loss.
      mesh: the devices to train on; by default all, every one with whole parameters.

    Returns:
      A model with the final parameters (their moving average where the settings ask for one).

    Raises:
      NonFiniteLossError: training diverged. The last good checkpoint is kept.
      Stopped: the process was told to end (SIGTERM); the step it was at is saved.
    """
    # What runs.
    directory = epath.Path(directory)
    structure, parameters = functional.split(model)
    teacher_structure, teacher_parameters = functional.split(teacher) if teacher else (None, None)
    mesh = mesh or make_mesh()
    step_function = make_step(structure, settings, normalization, mesh, teacher_structure, penalty)
    teacher_parameters = replicate(teacher_parameters, mesh)
    state = shard_parameters(initial_state(structure, parameters, settings), mesh)

    with contextlib.ExitStack() as stack:
        # Where it goes on.
        checkpoints = stack.enter_context(
            Checkpoints(directory / "checkpoints", keep_every=settings.keep_every)
        )
        state = checkpoints.restore(state)
        start = int(state.step)
        if start > settings.steps:
            raise InputError(
                f"{directory} holds a checkpoint of step {start}, but training ends at step "
                f"{settings.steps}; choose another folder or at least {start} steps"
            )
        if start == settings.steps:
            return _result(structure, state, mesh)
        log = stack.enter_context(_metrics_log(directory / "metrics.jsonl", start))
        progress = stack.enter_context(
            Progress(name, total=settings.steps, start=start, unit="step")
        )
        stream = batches(start)
        if hasattr(stream, "close"):
            stack.callback(stream.close)
        stop_request = stack.enter_context(StopRequest())

        # The loop. Metrics are read back in bulk, so that the device never waits for the host.
        unread: list[jax.Array] = []
        for step in range(start, settings.steps):
            genes = None if draw_genes is None else draw_genes(step)
            batch = shard_batch(next(stream), mesh)
            state, metrics = step_function(state, batch, genes, teacher_parameters)
            unread.append(metrics)
            done = step + 1
            stops = stop_request.is_set()
            saves = stops or done % settings.checkpoint_every == 0 or done == settings.steps
            if saves or done % settings.log_every == 0:
                values = np.stack(jax.device_get(unread))
                first = done - len(unread)
                _check_finite(values, first, draw_genes, checkpoints)
                if log is not None:
                    log.append(_records(first, values), durable=saves)
                progress.update(len(unread), loss=float(values[:, 0].mean()))
                unread.clear()
            if saves:
                checkpoints.save(done, state)
            if stops:
                raise Stopped(f"{name} is saved at step {done} of {settings.steps}")
        return _result(structure, state, mesh)


def _result(structure, state: TrainState, mesh: Mesh) -> Network:
    """Puts the trained model on this process' own device, as one that was loaded."""
    parameters = replicate(state.parameters if state.average is None else state.average, mesh)
    return functional.merge(
        structure, jax.tree.map(lambda p: jnp.asarray(np.asarray(p)), parameters)
    )


def _check_finite(values: np.ndarray, first: int, draw_genes, checkpoints: Checkpoints) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if not bad.size:
        return
    step = first + int(bad[0])
    loss, gradient_norm = values[bad[0]]
    genes = "" if draw_genes is None else f" with genes {np.asarray(draw_genes(step)).tolist()}"
    raise NonFiniteLossError(
        f"loss {loss} and gradient norm {gradient_norm} at step {step}{genes}. "
        f"The last good checkpoint is {checkpoints.latest_path() or 'none yet'}; "
        f"a lower learning rate, longer warm-up or a smaller clip_norm usually helps."
    )


def _metrics_log(
    path: epath.Path, start: int
) -> contextlib.AbstractContextManager[JsonLines | None]:
    """The first process' file of a line a step, without those that a resumed run repeats."""
    return JsonLines(path, read_lines(path)[:start]) if is_first() else contextlib.nullcontext()


def _records(first: int, values: np.ndarray) -> list[dict]:
    return [
        {"step": step, "loss": loss, "gradient_norm": norm}
        for step, (loss, norm) in enumerate(values.tolist(), start=first)
    ]
