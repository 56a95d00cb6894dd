"""Runs the configured stages in order: skips what is done, goes on with what was interrupted."""

import contextlib
import logging
import time
from collections.abc import Mapping

from etils import epath

from flora_jax.cluster.processes import by_the_first, is_first, wait_for_all
from flora_jax.errors import InputError, RunError, listed_differences, unknown
from flora_jax.io.files import is_url, locked, read_json, write_json, write_json_once
from flora_jax.stages import STAGE_FUNCTIONS
from flora_jax.stages.images import Images
from flora_jax.stages.run import CONFIG_FILE, Run, saved_settings
from flora_jax.stages.settings import Settings
from flora_jax.stages.validation import check

log = logging.getLogger(__name__)


def run(config: Mapping, workdir: epath.PathLike, stage: str | None = None) -> None:
    """Runs all stages of the config, or one of them, in `workdir`.

    Args:
      config: as `Settings.from_config` reads it.

    Raises:
      InputError: the config does not make sense, or `workdir` was made by another config.
      MissingFileError: a file that the config names is not there.
      RunError: another run is going on in `workdir`, or the one stage asked for needs an earlier
        one that is not done yet.
    """
    settings = Settings.from_config(config)
    if stage is not None and stage not in settings.stages:
        raise InputError(unknown("stage", stage, settings.stages))
    this_run, images = Run(settings, epath.Path(workdir)), check(settings)
    with _held(this_run.folder):
        _claim_once(this_run)
        _run_stages(this_run, images, stage)


def _run_stages(this_run: Run, images: Images, stage: str | None) -> None:
    stages, done_file = this_run.settings.stages, this_run.folder / "stages.json"
    done = read_json(done_file) if done_file.exists() else {}
    wait_for_all("stages.json is read")
    for name in stages:
        if stage is not None and name != stage:
            if stages.index(name) < stages.index(stage) and name not in done:
                raise RunError(f"stage {stage!r} needs {name!r}, which is not done yet")
            continue
        if name in done and name != "report":
            log.info("%s: done in %.0f s, skipped", name, done[name]["seconds"])
            continue
        log.info("%s: starts", name)
        started = time.monotonic()
        STAGE_FUNCTIONS[name](this_run, images)
        done[name] = {"seconds": round(time.monotonic() - started, 3)}
        write_json_once(done_file, done)


def _held(folder: epath.Path) -> contextlib.AbstractContextManager:
    """Locks the folder of a run, where that can be done; the first process does it for all."""
    if is_url(folder) or not is_first():
        return contextlib.nullcontext()
    return locked(folder / "run.lock")


@by_the_first
def _claim_once(this_run: Run) -> None:
    """Makes the folder this config's own, but for the list of stages, which may change."""
    path, current = this_run.folder / CONFIG_FILE, this_run.settings.to_config()
    if not path.exists():
        write_json(path, current)
        return
    saved = saved_settings(this_run.folder).to_config()
    differing = listed_differences(saved | {"stages": current["stages"]}, current)
    if differing:
        raise InputError(
            f"{this_run.folder} was made by another config; choose another --workdir or undo:"
            f"{differing}"
        )
