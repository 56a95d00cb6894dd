"""Metrics for those who watch a run, in TensorBoard or Weights & Biases, beside the JSON lines.

A training that goes on repeats what came after its last checkpoint. TensorBoard is told where it
begins again, and hides what it has from there on; Weights & Biases, where nothing can be taken
back, gets the steps that it has not had yet, which is the same since repeated steps are equal.
"""

import contextlib
import importlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from etils import epath

from flora_jax.cluster.processes import is_first
from flora_jax.errors import InputError, MissingPackageError, RunError
from flora_jax.io.files import read_json, write_json
from flora_jax.io.paths import is_url

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # each brought by the extra of its key
WANDB_FILE = (
    "wandb.json"  # in the folder of a run: its id there, and the next step of each training
)

Write = Callable[[Sequence[Mapping[str, float]]], None]  # records, each with its "step"
Watch = Callable[[int], AbstractContextManager[Write]]  # from this step on


def check_can_watch(names: Sequence[str]) -> None:
    """Raises MissingPackageError where the package of one of the `PACKAGES` is not installed."""
    for name in names:
        _package(name)


@contextlib.contextmanager
def opened(names: Sequence[str], folder: epath.Path, config: Mapping) -> Iterator[None]:
    """Holds the run of Weights & Biases, where that is among the names, or goes on with it.

    Args:
      folder: of the run, whose name it has there.
      config: what is shown of the run.

    Raises:
      InputError: TensorBoard, and the folder is in a bucket.
      RunError: Weights & Biases does not take it; says why.
    """
    if "tensorboard" in names and is_url(folder):
        raise InputError(
            f"watch 'tensorboard' appends to files, which {folder} cannot: leave it out, or use "
            f"'wandb'"
        )
    if "wandb" not in names or not is_first():
        yield
        return
    wandb, file = _package("wandb"), folder / WANDB_FILE
    state = read_json(file) if file.exists() else {"id": secrets.token_hex(4), "logged": {}}
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "flora_jax"),
            name=folder.name,
            id=state["id"],
            resume="allow",
            dir=None if is_url(folder) else os.fspath(folder),
            config=dict(config),
        )
    except wandb.Error as error:
        raise RunError(
            f"Weights & Biases: {error}; `wandb login` once, or WANDB_MODE=offline"
        ) from error
    write_json(file, state)
    with run:
        yield


def watching(names: Sequence[str], folder: epath.Path, name: str) -> Watch:
    """Makes a function: step -> a context, and in it what takes the records from there on.

    Args:
      names: of `PACKAGES`; Weights & Biases is `opened` already.
      folder: of the run.
      name: of the training, which stands before those of its metrics: supernet/loss.
    """

    @contextlib.contextmanager
    def watch(start: int) -> Iterator[Write]:
        writes: list[Write] = []
        with contextlib.ExitStack() as stack:
            if is_first() and "tensorboard" in names:
                writes.append(stack.enter_context(_tensorboard(folder, name, start)))
            if is_first() and "wandb" in names:
                writes.append(_wandb(folder, name))

            def write(records: Sequence[Mapping[str, float]]) -> None:
                for each in writes:
                    each(records)

            yield write

    return watch


def not_watched(start: int) -> AbstractContextManager[Write]:
    """The `Watch` of a training whose records go nowhere."""
    return contextlib.nullcontext(lambda records: None)


@contextlib.contextmanager
def _tensorboard(folder: epath.Path, name: str, start: int) -> Iterator[Write]:
    """Events in the training's own folder: with it they are put aside, and their steps hidden."""
    make, suffix = _package("tensorboard").SummaryWriter, f".{start}"  # files of the same second
    with make(os.fspath(folder / name), purge_step=start, filename_suffix=suffix) as writer:

        def write(records: Sequence[Mapping[str, float]]) -> None:
            for record in records:
                for metric, value in _values(name, record).items():
                    writer.add_scalar(metric, value, record["step"])
            writer.flush()  # a kill leaves what the checkpoints after it count on

        yield write


def _wandb(folder: epath.Path, name: str) -> Write:
    """Each training has steps of its own; the run counts on over all of them."""
    run, file = _package("wandb").run, folder / WANDB_FILE
    before = sum(n for other, n in read_json(file)["logged"].items() if other != name)
    run.define_metric(f"{name}/step", hidden=True)
    run.define_metric(f"{name}/*", step_metric=f"{name}/step")

    def write(records: Sequence[Mapping[str, float]]) -> None:
        state = read_json(file)
        first = state["logged"].get(name, 0)
        new = [record for record in records if record["step"] >= first]
        if not new:
            return
        state["logged"][name] = int(new[-1]["step"]) + 1
        write_json(file, state)  # before: a kill between the two loses points, and doubles none
        for record in new:
            step = int(record["step"])
            run.log({f"{name}/step": step, **_values(name, record)}, step=before + step)

    return write


def _values(name: str, record: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{metric}": value for metric, value in record.items() if metric != "step"}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError as error:
        raise MissingPackageError(
            f"watch {name!r} needs {PACKAGES[name]}: pip install 'flora_jax[{name}]'"
        ) from error
