"""Runs the configured stages in order: skips what is done, goes on with what was interrupted."""

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping

from etils import epath

from flora_jax.cluster.processes import by_the_first, is_first, wait_for_all
from flora_jax.errors import InputError, RunError, UserError, listed, unknown
from flora_jax.io.files import locked, read_json, write_json, write_json_once
from flora_jax.io.paths import is_url, user_path
from flora_jax.io.places import check_can_hold_a_run
from flora_jax.runs.auto_config import settings_of
from flora_jax.runs.images import Images
from flora_jax.runs.validation import check
from flora_jax.stages.budget import check_with_results
from flora_jax.stages.changes import (
    changes_between,
    has_results,
    put_aside,
    stages_from,
    stages_to_redo,
    tidy_once,
)
from flora_jax.stages.companions import describe_models_once, name_run_once
from flora_jax.stages.functions import STAGE_FUNCTIONS, report
from flora_jax.stages.names import STAGES
from flora_jax.stages.run import (
    CONFIG_FILE,
    DONE_FILE,
    IMAGES_FILE,
    Run,
    done_stages,
    has_run,
    saved_settings,
)
from flora_jax.training.watch import opened
from flora_jax.weights.export import check_packages

log = logging.getLogger(__name__)


def run(
    config: Mapping, workdir: epath.PathLike, stage: str | None = None, redo: bool = False
) -> None:
    """Runs all stages of the config, or one of them, in `workdir`.

    Stages that are done there are skipped. Where the config differs from the one that they were
    done with, those whose results it changes are done anew; what they had made goes to
    `workdir`/earlier. The stage "report" alone tells what there is at any time, also while another
    process runs there.

    Args:
      config: as `Settings.from_config` reads it.
      redo: do the one stage again.

    Raises:
      InputError: the config does not make sense, or nothing that is in `workdir` would serve it.
      MissingFileError: a file that the config names is not there.
      MissingPackageError: what it exports or is watched with takes a package that is not installed.
      RunError: another run is going on in `workdir`, the one stage asked for needs an earlier one
        that is not done yet, there is nothing to report on, or Weights & Biases refuses the run.
      StorageError: `workdir` cannot hold a run.
    """
    settings = settings_of(config)
    if stage is not None and stage not in (*settings.stages, "report"):
        raise InputError(_why_not(stage, settings.stages))
    if redo and stage is None:
        raise InputError("redo needs the stage to do again: --stage=NAME --redo")
    this_run = Run(settings, user_path(workdir))
    if stage == "report":
        _report_what_is_there(this_run)
        return
    check_can_hold_a_run(this_run.folder)
    images = check(settings, done_stages(this_run))
    with _held(this_run.folder):
        to_redo = _stages_to_redo(this_run, images)
        if stage is not None:
            _check_earlier_are_done(this_run, stage, to_redo)
            if redo:
                to_redo = stages_from(stage, settings.stages)
        check_with_results(this_run, to_redo)
        if "export" in to_redo:
            check_packages(settings.export)
        wait_for_all("the folder is looked at")
        _claim_once(this_run, images, to_redo)
        name_run_once(this_run.folder, images.class_names)
        stages = settings.stages if stage is None else [stage]
        has_work = not {*stages, "report"} <= {*done_stages(this_run), "report"}
        with opened(settings.watch if has_work else (), this_run.folder, settings.to_config()):
            _run_stages(this_run, images, stages)


def _why_not(stage: str, stages: tuple[str, ...]) -> str:
    """Why this stage is none that the run could do now."""
    if stage == "export":
        return "stage export needs to know as what: --config.export=onnx"
    if stage in STAGES:
        return f"this run has no stage {stage}, only {', '.join(stages)}; --config.stages adds it"
    return unknown("stage", stage, stages)


def _report_what_is_there(this_run: Run) -> None:
    """Reports on a run at any time: it neither locks nor claims the folder, in which another
    process may be going on, and needs neither its images nor all of its stages."""
    if not has_run(this_run.folder):
        raise RunError(f"{this_run.folder} holds no run that could be reported on")
    try:
        images = Images(this_run.settings)
    except UserError as error:
        log.warning("the report goes without the images: %s", error)
        images = None
    others = [stage for stage in _stages_to_redo(this_run, images) if stage != "report"]
    if others:
        changes = listed(changes_between(*_configs(this_run, images)))
        raise RunError(
            f"{this_run.folder} holds {others[0]!r} of another config; undo or run that first:"
            f"{changes}"
        )
    report(this_run, images)


def kept_stages(this_run: Run, images: Images) -> list[str]:
    """The stages that are done in the folder and that `run` would not do anew. Raises as `run`."""
    to_redo = _stages_to_redo(this_run, images)
    return [stage for stage in done_stages(this_run) if stage not in to_redo]


def _stages_to_redo(this_run: Run, images: Images | None) -> list[str]:
    """The stages whose results in the folder are another config's."""
    if not has_run(this_run.folder):
        return []
    saved, current = _configs(this_run, images)
    to_redo = [
        stage for stage in stages_to_redo(saved, current) if has_results(this_run.folder, [stage])
    ]
    if to_redo and to_redo[0] == this_run.settings.stages[0]:
        raise InputError(
            f"{this_run.folder} was made by another config; choose another --workdir or undo:"
            f"{listed(changes_between(saved, current))}"
        )
    return to_redo


@by_the_first
def _claim_once(this_run: Run, images: Images, to_redo: list[str]) -> None:
    """Makes the folder this config's own, and puts aside what it does not vouch for."""
    if to_redo:
        saved, current = _configs(this_run, images)
        changes = listed(changes_between(saved, current))
        why = f", because the config has changed:{changes}" if changes else ""
        log.info("%s are done anew%s", ", ".join(to_redo), why)
        done = {name: of for name, of in done_stages(this_run).items() if name not in to_redo}
        write_json(this_run.folder / DONE_FILE, done)
        put_aside(this_run.folder, to_redo)
    is_known = has_run(this_run.folder) and saved_settings(this_run.folder) == this_run.settings
    if not (is_known and (this_run.folder / IMAGES_FILE).exists()):
        write_json(this_run.folder / IMAGES_FILE, {"signature": images.signature})
    write_json(this_run.folder / CONFIG_FILE, this_run.settings.to_config())


def _configs(this_run: Run, images: Images | None) -> tuple[dict, dict]:
    """What the folder was made with, wherever the same images lay then, and what it runs with.

    Images that are not there count as the same.
    """
    saved, current = saved_settings(this_run.folder).to_config(), this_run.settings.to_config()
    place = {name: current["data"][name] for name in ("name", "data_dir")}
    is_moved = not place.items() <= saved["data"].items()
    file = this_run.folder / IMAGES_FILE
    is_same = images is None or (
        is_moved and file.exists() and read_json(file)["signature"] == images.signature
    )
    if is_same:
        saved["data"] |= place
    return saved, current


def _check_earlier_are_done(this_run: Run, stage: str, to_redo: list[str]) -> None:
    stages, done = this_run.settings.stages, done_stages(this_run)
    for earlier in stages[: stages.index(stage)]:
        if earlier not in done or earlier in to_redo:
            raise RunError(f"stage {stage!r} needs {earlier!r}, which is not done yet")


def _run_stages(this_run: Run, images: Images, stages: Iterable[str]) -> None:
    done = done_stages(this_run)
    wait_for_all("stages.json is read")
    for name in stages:
        if name in done and name != "report":
            log.info("%s: done in %.0f s, skipped", name, done[name]["seconds"])
        else:
            log.info("%s: starts", name)
            started = time.monotonic()
            STAGE_FUNCTIONS[name](this_run, images)
            describe_models_once(this_run, name, images.class_names)
            done[name] = {"seconds": round(time.monotonic() - started, 3)}
            write_json_once(this_run.folder / DONE_FILE, done)
        if not this_run.settings.keep_checkpoints:
            tidy_once(this_run.folder, name)


def _held(folder: epath.Path) -> contextlib.AbstractContextManager:
    """Locks the folder of a run, where that can be done; the first process does it for all."""
    if is_url(folder) or not is_first():
        return contextlib.nullcontext()
    return locked(folder / "run.lock")
