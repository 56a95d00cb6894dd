"""The training loop of every stage: dense, local supernets, supernet, fine-tuning."""

import contextlib
import json
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from flora_jax.data.normalize import Normalization
from flora_jax.io.checkpoint import Checkpoints
from flora_jax.io.files import is_url, replacing
from flora_jax.mesh import make_mesh, replicate, shard_batch, shard_parameters
from flora_jax.models import functional
from flora_jax.processes import Stopped, StopRequest
from flora_jax.report.progress import Progress
from flora_jax.train.settings import TrainSettings
from flora_jax.train.step import TrainState, initial_state, make_step


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient became NaN or infinite."""


def train(
    model: nnx.Module,
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
    settings: TrainSettings,
    *,
    directory: epath.PathLike,
    name: str,
    normalization: Normalization,
    draw_genes: Callable[[int], np.ndarray] | None = None,
    teacher: nnx.Module | None = None,
    penalty: Callable[[functional.Parameters], jax.Array] | None = None,
    mesh: Mesh | None = None,
) -> nnx.Module:
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
    graphdef, parameters = functional.split(model)
    teacher_graphdef, teacher_parameters = functional.split(teacher) if teacher else (None, None)
    mesh = mesh or make_mesh()
    step_function = make_step(graphdef, settings, normalization, mesh, teacher_graphdef, penalty)
    teacher_parameters = replicate(teacher_parameters, mesh)
    state = shard_parameters(initial_state(parameters, settings), mesh)

    with contextlib.ExitStack() as stack:
        # Where it goes on.
        checkpoints = stack.enter_context(
            Checkpoints(directory / "checkpoints", keep_every=settings.keep_every)
        )
        state = checkpoints.restore(state)
        start = int(state.step)
        if start > settings.steps:
            raise ValueError(
                f"{directory} holds a checkpoint of step {start}, but training ends at step "
                f"{settings.steps}; choose another folder or at least {start} steps"
            )
        if start == settings.steps:
            return _result(graphdef, state, mesh)
        log = stack.enter_context(_MetricsLog(directory / "metrics.jsonl", start))
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
                log.write(first, values, saves)
                progress.update(len(unread), loss=float(values[:, 0].mean()))
                unread.clear()
            if saves:
                checkpoints.save(done, state)
            if stops:
                raise Stopped(f"{name} is saved at step {done} of {settings.steps}")
        return _result(graphdef, state, mesh)


def _result(graphdef, state: TrainState, mesh: Mesh) -> nnx.Module:
    """On this process' own device, as a model that was loaded."""
    parameters = replicate(state.parameters if state.average is None else state.average, mesh)
    return functional.merge(
        graphdef, jax.tree.map(lambda p: jnp.asarray(np.asarray(p)), parameters)
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


class _MetricsLog:
    """metrics.jsonl: a line a step; lines of steps that a resumed run repeats are dropped.

    Where files cannot be appended to, it is written anew with every checkpoint.
    """

    def __init__(self, path: epath.Path, start: int):
        self._path, self._is_first = path, jax.process_index() == 0
        self._lines: list[str] = []
        if self._is_first and path.exists():
            self._lines = path.read_text().splitlines(keepends=True)[:start]

    def __enter__(self):
        if self._is_first:
            self._write_anew()
            self._file = None if is_url(self._path) else self._path.open("a")
        return self

    def __exit__(self, *exception):
        if self._is_first and self._file:
            self._file.close()

    def write(self, first: int, values: np.ndarray, saves: bool) -> None:
        if not self._is_first:
            return
        lines = [
            json.dumps({"step": first + offset, "loss": loss, "gradient_norm": norm}) + "\n"
            for offset, (loss, norm) in enumerate(values.tolist())
        ]
        if self._file:
            self._file.writelines(lines)
            self._file.flush()
            return
        self._lines += lines
        if saves:
            self._write_anew()

    def _write_anew(self) -> None:
        with replacing(self._path) as partial:
            partial.write_text("".join(self._lines))
