"""Runs the configured stages in order: skips what is done, goes on with what was interrupted."""

import json
import logging
import time

from etils import epath
from ml_collections import ConfigDict

from flora_jax.io.files import read_json, write_json
from flora_jax.run import Run
from flora_jax.stages import STAGES
from flora_jax.validation import check, unknown

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
        raise ValueError(unknown("stage", stage, config.stages))
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
