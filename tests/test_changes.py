"""A run that is changed: what is done anew, what stays, what is said."""

import json
import shutil

import numpy as np
import pytest
from etils import epath

import flora_jax as flora
from flora_jax.configs import digits
from flora_jax.configs.common import IMPROVED_STAGES
from flora_jax.errors import UserError
from flora_jax.methods import start
from flora_jax.methods.listing import stages
from flora_jax.models import functional
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings
from flora_jax.runs.workdir import Run, planned
from tests.helpers.commands import run_flora
from tests.helpers.runs import tiny_config


def config_with(**changes) -> dict:
    config = digits.get_config()
    config.update_from_flattened_dict(changes)
    return Settings.from_config(config).to_config()


def stages_to_redo(before: dict, after: dict) -> list[str]:
    """The steps whose key another config changes."""
    there, here = (
        planned(Run(Settings.from_config(config), epath.Path("nowhere")), start.flora)
        for config in (before, after)
    )
    return [
        name
        for name, step in here.items()
        if not step.is_always_done and (name not in there or there[name].key != step.key)
    ]


def without(*stages: str) -> tuple[str, ...]:
    return tuple(stage for stage in IMPROVED_STAGES if stage not in stages)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"data.num_threads": 3, "fsdp": 2, "supernet.checkpoint_every": 7}, None),
        ({"finetune.accumulate": 2, "keep_checkpoints": True, "watch": ("wandb",)}, None),
        ({"finetune.epochs": 1.0}, "finetune"),
        ({"uniform_baseline": "none"}, "extract"),
        ({"search.mutants": 3}, "search"),
        ({"budget.macs": (0.5, 0.55)}, "allocate"),
        ({"search.latency_batch": 3}, None),  # which MACs do not read
        ({"search.budget": "latency"}, "latency"),
        ({"supernet.learning_rate": 1.0}, "supernet"),
        ({"supernet_sampling": "sandwich", "finetune.epochs": 1.0}, "supernet"),
        ({"metric": "top1"}, "filter"),
        ({"space.ratios": (0.5, 1.0)}, "calibrate"),
        ({"pretrain.epochs": 1.0}, "pretrain"),
        ({"seed": 1}, "pretrain"),
        ({"data.heldout_fraction": 0.1}, "pretrain"),
        ({"stages": without("finetune")}, "evaluate"),
        ({"stages": without("filter")}, "supernet"),
        ({"stages": IMPROVED_STAGES[:5]}, None),
    ],
)
def test_a_change_touches_the_stages_that_read_it(changes, first):
    before, after = config_with(), config_with(**changes)
    order = [name for name in stages() if name in (*after["stages"], first) and name != "report"]
    expected = order[order.index(first) :] if first in order else []
    assert stages_to_redo(before, after) == expected


def test_a_stage_that_is_put_in_is_followed_by_others_anew():
    before = config_with(stages=without("filter"))
    assert stages_to_redo(before, config_with())[0] == "supernet"
    begun = config_with(stages=("pretrain", "calibrate"))
    assert stages_to_redo(begun, config_with())[0] == "filter"  # which is not there yet


@pytest.fixture(scope="module")
def changed_run(finished_run, tmp_path_factory):
    """A finished run, started again with another number of threads and another search budget."""
    workdir = tmp_path_factory.mktemp("changed") / "run"
    shutil.copytree(finished_run, workdir)
    changes = ["--config.budget.macs=(0.6,0.7)", "--config.data.num_threads=2"]
    untrained = "--config.finetune.epochs=0.0"  # which takes no compiling
    return workdir, run_flora(workdir, *changes, untrained)


@pytest.mark.slow
def test_another_budget_reuses_the_supernet(finished_run, changed_run):
    workdir, done = changed_run
    assert done.returncode == 0, done.stderr
    assert "allocate, search, extract, finetune, evaluate are done anew" in done.stderr
    assert "budget.macs: (0.4, 0.6) there, (0.6, 0.7) now" in done.stderr
    assert "supernet: done in" in done.stderr
    assert "search: starts" in done.stderr
    result = json.loads((workdir / "result.json").read_text())
    assert 0.6 < result["subnet"]["macs"] / result["dense"]["macs"] <= 0.7
    same, other = (
        functional.split(flora.load(path / "supernet").network)[1]
        for path in (finished_run, workdir)
    )
    for name, value in same.items():
        np.testing.assert_array_equal(value, other[name])
    aside = workdir / "earlier/1"
    assert (aside / "result.json").read_bytes() == (finished_run / "result.json").read_bytes()
    assert flora.load(aside / "subnet").spec == flora.load(finished_run / "subnet").spec


@pytest.mark.slow
def test_workdir_alone_goes_on_with_the_run_that_is_there(changed_run):
    workdir, _ = changed_run
    before = (workdir / "result.json").stat().st_mtime_ns
    done = run_flora(workdir, config=None)
    assert done.returncode == 0, done.stderr
    assert "done anew" not in done.stderr
    assert (workdir / "result.json").stat().st_mtime_ns == before
    assert json.loads((workdir / "config.json").read_text())["budget"]["macs"] == [0.6, 0.7]


def test_a_plan_counts_what_a_change_makes_necessary(finished_run):
    settings = Settings.from_config(tiny_config(**{"budget.macs": (0.6, 0.7)}))
    _, kept = start.plan_of(Run(settings, epath.Path(finished_run), Images(settings)))
    assert kept == ["pretrain", "calibrate", "filter", "supernet"]


@pytest.mark.slow
def test_a_stage_is_done_again_on_request(own_run, finished_run):
    done = run_flora(own_run, "--stage=search", "--redo")
    assert done.returncode == 0, done.stderr
    best = (own_run / "search/best.json").read_bytes()
    assert best == (finished_run / "search/best.json").read_bytes()
    assert (own_run / "earlier/1/subnet/spec.json").exists()
    assert not (own_run / "subnet").exists()
    assert "supernet" in json.loads((own_run / "stages.json").read_text())


@pytest.mark.slow
def test_nothing_is_put_aside_for_what_cannot_go_on(own_run):
    for changes, asked, message in (
        ({"seed": 3}, {}, "made by another config; choose another --workdir or undo:"),
        ({"budget.macs": (0.001, 0.002)}, {}, "cannot be reached: the space spans"),
        ({}, {"redo": True}, "redo needs the stage to do again: --stage=NAME --redo"),
        ({"finetune.epochs": 2.0}, {"stage": "evaluate"}, "needs 'finetune'"),
    ):
        with pytest.raises(UserError, match=message):
            start.run(tiny_config(**changes), own_run, **asked)
    assert not (own_run / "earlier").exists()
    assert (own_run / "subnet/spec.json").exists()


@pytest.mark.slow
def test_a_finished_run_holds_little_beside_its_models(finished_run):
    def size(*names: str) -> int:
        files = (f for name in names for f in (finished_run / name).rglob("*") if f.is_file())
        return sum(file.stat().st_size for file in files)

    models = size("dense", "subnet", "allocated", "uniform", "supernet/parameters")
    reports = (finished_run / name for name in ("report.png", "report.html"))
    size_of_reports = sum(report.stat().st_size for report in reports)
    assert size("") - size_of_reports <= 3 * models
    assert not list(finished_run.rglob("checkpoints"))
