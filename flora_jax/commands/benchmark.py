"""flora_jax --benchmark=FOLDER: milliseconds of finished models, and their real saving."""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence

import jax
from etils import epath

from flora_jax.commands.classifier import check_is_model, holds_model, spec_as_used
from flora_jax.errors import InputError, MissingFileError
from flora_jax.io.files import write_json
from flora_jax.io.paths import absolute, as_text, user_path
from flora_jax.models.network import Network
from flora_jax.report.table import aligned, human_count
from flora_jax.runs.budgets import finished_models
from flora_jax.runs.workdir import BENCHMARK_FILE, Run, done_stages, has_run
from flora_jax.timing import busy_elsewhere, describe_device, other_work
from flora_jax.weights.export.engines import installed_engines
from flora_jax.weights.export.speed import Row, measure
from flora_jax.weights.folder import load_model
from flora_jax.weights.hub import is_repository, local_folder
from flora_jax.weights.metadata.preprocessing import read_preprocessing
from flora_jax.weights.pretrained import from_pretrained

BATCH_SIZES = ("1", "8", "64")


def benchmark(
    folder: epath.PathLike,
    against: epath.PathLike | None = None,
    batch_sizes: Sequence[str] = BATCH_SIZES,
    as_json: bool = False,
) -> None:
    """Times models in every engine that is installed, prints a table, writes benchmark.json there.

    Args:
      folder: of a run, whose finished models are compared with its dense one; or of one model.
      against: the model that all are compared with.
      batch_sizes: images of a batch, whole numbers from 1.
      as_json: print what is written to the file.

    Raises:
      MissingFileError: no model and no run is there, or none of its models is finished.
      InputError: a supernet, a batch size below 1, or as `from_pretrained`.
      StorageError: the folder cannot be written.
    """
    sizes = _batch_sizes(batch_sizes)
    models = _models(folder, against)
    engines, hints = installed_engines()
    cores_elsewhere = other_work()
    rows, too_large = measure(models, engines, sizes)
    busy = cores_elsewhere() if jax.default_backend() == "cpu" else 0.0
    found = {
        "machine": ", ".join((describe_device(), *map(str, engines[1:]))),
        "jax": jax.__version__,
        "rows": [dataclasses.asdict(row) for row in rows],
        "out_of_memory": too_large,
        "busy_cores": round(busy, 2),
    }
    lines = [json.dumps(found)]
    if not as_json:
        macs = {name: model.spec.macs() for name, model in models.items()}
        lines = [str(found["machine"]), table(rows, macs, is_idle=not busy_elsewhere(busy))]
        if beside := busy_elsewhere(busy):
            hint = "what is realised cannot be told; measure again on an idle machine"
            lines.append(f"{beside}: {hint}")
        elif not all(row.is_sure for row in rows):
            lines.append('"?": the rounds differ too much to tell')
        fits = "{engine}: batches of {batch} do not fit into memory with {model}"
        lines += [fits.format(**each) for each in too_large] + hints
    print("\n".join(lines), flush=True)  # before the file, which may not be writable
    if not is_repository(folder):
        write_json(user_path(folder) / BENCHMARK_FILE, found)


def table(rows: Sequence[Row], macs: Mapping[str, int], is_idle: bool = True) -> str:
    """The rows as plain text, a part for each engine and batch size.

    "realised" is the share of the saved multiply-adds that is saved in milliseconds, "?" where the
    rounds do not agree or the machine was not idle.

    Args:
      macs: multiply-adds of an image, by model.
    """
    header = ["ms", "images/s", "share of ms", "quartiles", "MACs", "share of MACs", "realised"]
    lines: list[list[str]] = []
    for (engine, batch), group in itertools.groupby(rows, lambda row: (row.engine, row.batch)):
        lines += [[""] * (1 + len(header))] if lines else []
        lines.append([f"{engine}, batch {batch}", *header])
        for row in group:
            saved = 1 - row.macs_share
            can_tell = saved > 0 and row.is_sure and is_idle
            line = [
                f"  {as_text(row.model)}",
                f"{row.ms:.2f}",
                f"{1000 * batch / row.ms:.1f}",
                f"{row.ratio:.3f}",
                f"{row.low:.3f}..{row.high:.3f}",
                human_count(macs[row.model]),
                f"{row.macs_share:.3f}",
                f"{round(100 * (1 - row.ratio) / saved)} %" if can_tell else "?" * (saved > 0),
            ]
            lines.append(line)
    return aligned(lines)


def _batch_sizes(texts: Sequence[str]) -> list[int]:
    sizes = [int(text) if text.strip().isdecimal() else 0 for text in texts]
    if not sizes or min(sizes) < 1:
        raise InputError(
            f"--batch_sizes must be whole numbers from 1, such as {','.join(BATCH_SIZES)}; "
            f"got {','.join(texts)}"
        )
    return list(dict.fromkeys(sizes))


def _models(folder: epath.PathLike, against: epath.PathLike | None) -> dict[str, Network]:
    """The models to time by their names, first the one that the others are compared with."""
    models = {} if against is None else {_name(against): _open(against)}
    # Folders of models have a config.json, too.
    is_run = not is_repository(folder) and has_run(folder) and not holds_model(user_path(folder))
    found = dict(_of_run(user_path(folder))) if is_run else {_name(folder): _open(folder)}
    if models.keys() & found.keys():
        models = {os.fspath(against or ""): model for model in models.values()}
    return models | found


def _of_run(folder: epath.Path) -> Iterator[tuple[str, Network]]:
    """Every model that the run has finished so far, by the name that its table gives it."""
    run = Run.open(folder)
    done = done_stages(run)
    stages = tuple(stage for stage in run.settings.stages if stage in done)
    so_far = Run(dataclasses.replace(run.settings, stages=stages), folder)
    paths = [(name, folder / path) for _, name, path, _ in finished_models(so_far)]
    if not paths:
        raise MissingFileError(f"{folder}: no model of this run is finished yet")
    yield from ((name, load_model(path)) for name, path in paths)


def _open(path: epath.PathLike) -> Network:
    folder = local_folder(path)
    check_is_model(folder)
    return from_pretrained(folder, spec_as_used(folder, read_preprocessing(folder)))


def _name(path: epath.PathLike) -> str:
    return os.fspath(path) if is_repository(path) else absolute(user_path(path)).name
