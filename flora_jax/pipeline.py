"""Runs the configured stages in order: skips what is done, goes on with what was interrupted."""

import contextlib
import json
import logging
import time

import jax
from etils import epath
from ml_collections import ConfigDict

from flora_jax.io.files import dump_json, is_url, locked, read_json, write_json
from flora_jax.processes import by_the_first, wait_for_all
from flora_jax.run import Run
from flora_jax.stages import STAGES
from flora_jax.validation import check, unknown

log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: epath.PathLike, stage: str | None = None) -> None:
    """Runs all stages of the config, or one of them, in `workdir`.

    Raises:
      ValueError: the config does not make sense, or `workdir` was made by another config.
      RuntimeError: another run is going on in `workdir`, or the one stage asked for needs an
        earlier one that is not done yet.
    """
    state = Run(config, epath.Path(workdir))
    check(state)
    if stage is not None and stage not in config.stages:
        raise ValueError(unknown("stage", stage, config.stages))
    with _held(state.folder):
        _claim(state)
        _run_stages(state, stage)


def _run_stages(state: Run, stage: str | None) -> None:
    config = state.config
    done_file = state.folder / "stages.json"
    done = read_json(done_file) if done_file.exists() else {}
    wait_for_all("stages.json is read")
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


def _held(folder: epath.Path) -> contextlib.AbstractContextManager:
    """One run at a time, where the folder can be locked; the first process does it for all."""
    if is_url(folder) or jax.process_index() > 0:
        return contextlib.nullcontext()
    return locked(folder / "run.lock")


@by_the_first
def _claim(state: Run) -> None:
    """A folder belongs to one config; the list of stages may change."""
    path = state.folder / "config.json"
    current = json.loads(state.config.to_json())
    if not path.exists():
        dump_json(path, current)
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
