"""Starts the method of a config in the folder of a run."""

import logging
from collections.abc import Mapping

from etils import epath

from flora_jax.cluster.processes import wait_for_all
from flora_jax.errors import InputError, RunError, UserError, listed, unknown
from flora_jax.io.paths import user_path
from flora_jax.io.places import check_can_hold_a_run
from flora_jax.methods import listing
from flora_jax.methods.closed_form import closed_form
from flora_jax.methods.flora import flora
from flora_jax.methods.slim import slim
from flora_jax.methods.transfer import transfer
from flora_jax.runs import checks
from flora_jax.runs.auto_config import settings_of
from flora_jax.runs.images import Images
from flora_jax.runs.model_files import name_run_once
from flora_jax.runs.settings import Settings
from flora_jax.runs.workdir import (
    Planned,
    Run,
    Script,
    changes,
    check_earlier_are_done,
    claim_once,
    dependents,
    done_stages,
    has_run,
    held,
    planned,
    stale_steps,
)
from flora_jax.training.watch import opened
from flora_jax.weights.export import check_packages

log = logging.getLogger(__name__)


def run(
    config: Mapping, workdir: epath.PathLike, stage: str | None = None, redo: bool = False
) -> None:
    """Runs all steps of the config's method, or one of them, in `workdir`.

    Steps that are done there are skipped. Where the config differs from the one that they were
    done with, those whose results it changes are done anew; what they had made goes to
    `workdir`/earlier. The stage "report" alone tells what there is at any time, also while another
    process runs there.

    Args:
      config: as `Settings.from_config` reads it.
      redo: do the one step again.

    Raises:
      InputError: the config does not make sense, or nothing that is in `workdir` would serve it.
      MissingFileError: a file that the config names is not there.
      MissingPackageError: what it exports or is watched with takes a package that is not installed.
      RunError: another run is going on in `workdir`, the one step asked for needs an earlier one
        that is not done yet, there is nothing to report on, or Weights & Biases refuses the run.
      StorageError: `workdir` cannot hold a run.
    """
    settings = settings_of(config)
    this_run, script = Run(settings, user_path(workdir)), script_of(settings)
    if redo and stage is None:
        raise InputError("redo needs the stage to do again: --stage=NAME --redo")
    check_stages(this_run, stage)
    if settings.note:
        log.info("%s", settings.note)
    if stage == "report":
        _report_what_is_there(this_run)
        return
    check_can_hold_a_run(this_run.folder)
    images = this_run.images = checks.check(settings, done_stages(this_run))
    if settings.given:
        log.info("set: %s", ", ".join(settings.given))
    log.info("%s", images.splits)
    plan = planned(this_run, script)
    with held(this_run.folder):
        to_redo = stale_steps(this_run, plan) if has_run(this_run.folder) else []
        if stage is not None:
            check_earlier_are_done(this_run, plan, stage)
            if redo:
                to_redo = dependents(stage, plan)
        checks.check_with_results(this_run, to_redo)
        if "export" in to_redo:
            check_packages(settings.export)
        wait_for_all("the folder is looked at")
        claim_once(this_run, plan, to_redo)
        name_run_once(this_run.folder, images.class_names)
        this_run.does = stage or True
        wanted = {stage} if stage else set(plan)
        has_work = not wanted <= {*done_stages(this_run), "report"}
        with opened(settings.watch if has_work else (), this_run.folder, settings.to_config()):
            script(this_run)


def script_of(settings: Settings) -> Script:
    """The first of the methods that have most of the stages."""

    def count(method: Script) -> int:
        return len(set(settings.stages) & set(listing.steps_of(method.__name__)))

    return max((transfer, slim, closed_form, flora), key=count)


_NEEDED = {"extract": {"allocate", "search"}, "finetune": {"extract", "compress"}}


def check_stages(this_run: Run, stage: str | None = None) -> None:
    """Raises InputError where the settings, or --stage, name a step that the method lacks."""
    settings, script = this_run.settings, script_of(this_run.settings)
    names, every = listing.steps_of(script.__name__), listing.stages()
    for name in settings.stages:
        if name not in every:
            raise InputError(unknown("stage", name, every))
        if name not in names:
            raise InputError(f"{script.__name__} has no stage {name}, only {', '.join(names)}")
    stages = set(settings.stages)
    for name, needed in _NEEDED.items():
        if name in stages and not needed & stages:
            raise InputError(f"stage {name} needs {' or '.join(sorted(needed))} before it")
    if not {"pretrain", "transfer"} & stages:
        raise InputError(f"stages {settings.stages} must begin with pretrain, or be a transfer")
    if stage is None or stage in planned(this_run, script) or stage == "report":
        return
    if stage == "export":
        raise InputError("stage export needs to know as what: --config.export=onnx")
    if stage in names:
        there = ", ".join(settings.stages)
        raise InputError(f"this run has no stage {stage}, only {there}; --config.stages adds it")
    raise InputError(unknown("stage", stage, settings.stages))


def plan_of(this_run: Run) -> tuple[dict[str, Planned], list[str]]:
    """The steps of a run, and the names of those that are done and that `run` would not do anew."""
    plan = planned(this_run, script_of(this_run.settings))
    to_redo = stale_steps(this_run, plan) if has_run(this_run.folder) else []
    done = done_stages(this_run)
    return plan, [n for n in plan if n in done and n not in to_redo and not plan[n].is_always_done]


def _report_what_is_there(this_run: Run) -> None:
    """Reports on a run at any time: it neither locks nor claims the folder, in which another
    process may be going on, and needs neither its images nor all of its steps."""
    if not has_run(this_run.folder):
        raise RunError(f"{this_run.folder} holds no run that could be reported on")
    try:
        this_run.images = Images(this_run.settings)
    except UserError as error:
        log.warning("the report goes without the images: %s", error)
    plan = planned(this_run, script_of(this_run.settings))
    if others := stale_steps(this_run, plan):
        raise RunError(
            f"{this_run.folder} holds {others[0]!r} of another config; undo or run that first:"
            f"{listed(changes(this_run))}"
        )
    from flora_jax.report.report import report  # Matplotlib takes 0.4 seconds

    report(this_run, this_run.images)
