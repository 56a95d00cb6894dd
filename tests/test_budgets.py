"""Budgets: one window or several, of a whole run, and without labels or a search."""

import json
from unittest import mock

import numpy as np
import pytest
from etils import epath
from PIL import Image

import flora_jax as flora
from flora_jax.closed_form import calibrate as calibration
from flora_jax.cluster.processes import Stopped
from flora_jax.configs import minutes
from flora_jax.methods import start
from flora_jax.methods.flora import flora as flora_method
from flora_jax.runs.images import Images
from flora_jax.runs.settings import BudgetSettings, Settings
from flora_jax.runs.workdir import Run

TWO = ((0.4, 0.5), (0.6, 0.7))


def test_one_window_or_several():
    assert BudgetSettings(macs=(0.4, 0.5)).windows("macs") == ((0.4, 0.5),)
    assert BudgetSettings(macs=TWO[::-1]).windows("macs") == TWO
    assert BudgetSettings(latency=[*TWO]).windows("latency") == TWO


@pytest.mark.parametrize(
    "macs, message",
    [
        (((0.4, 0.5), (0.45, 0.6)), r"\(0\.4, 0\.5\) and \(0\.45, 0\.6\) overlap"),
        (((0.4, 0.5), (0.4, 0.5)), r"\(0\.4, 0\.5\) is given twice"),
        (((0.4, 0.5), (0.7, 0.6)), r"macs \(0\.7, 0\.6\) must be two shares"),
        ((), "macs must be one window"),
        ((0.4, 0.5, 0.6), "macs must be one window"),
        (((0.4, 0.5), (0.55, 0.6, 0.7)), "macs must be one window"),
        ("2G", "macs must be one window"),
        (((0.4, 0.5), 0.6), "macs must be one window"),
        (0.5, "macs must be one window"),
        (((0.3, 0.45), (0.4, 0.45)), "overlap"),
    ],
)
def test_windows_that_make_no_sense(macs, message):
    with pytest.raises(ValueError, match=message):
        BudgetSettings(macs=macs)


@pytest.mark.parametrize("stages", [("pretrain", "allocate"), ("pretrain", "search")])
def test_a_budget_out_of_reach_is_told_before_anything_starts(stages, tmp_path):
    config = minutes.get_config("runlocal")
    config.stages, config.budget.macs = stages, ((0.01, 0.02), (0.5, 0.6))
    with pytest.raises(ValueError, match=r"budget\.macs \(0\.01, 0\.02\) cannot be reached"):
        start.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def unlabelled_config(finished_run, tmp_path, **changes):
    rng, folder = np.random.default_rng(0), tmp_path / "photographs"
    for i in range(40):
        path = folder / f"album {i % 3}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i % 5, 24, 3), np.uint8)).save(path)
    config = minutes.get_config("runlocal")
    config.pretrained = str(finished_run / "dense")
    config.data.name = f"images:{folder}"
    config.data.augmentation = {"name": "inception"}
    config.update_from_flattened_dict({"finetune.epochs": 0.0} | changes)
    return config


@pytest.mark.slow
def test_minutes_without_labels(finished_run, tmp_path, capsys):
    """Two budgets, no training: the models are the refitted ones, and labels are the dense's."""
    config = unlabelled_config(finished_run, tmp_path, **{"budget.macs": TWO})
    run = tmp_path / "run"
    start.run(config, run)
    result = json.loads((run / "result.json").read_text())
    assert result["dense"]["top1"] == 1
    dense = flora.load(run / "dense").spec.macs()
    assert [entry["budget"] for entry in result["subnet"]] == [list(window) for window in TWO]
    for entry, (_, high) in zip(result["subnet"], TWO, strict=True):
        model = flora.load(run / f"subnet_{high}")
        assert model.spec.macs() == entry["macs"] <= high * dense
        assert entry["agreement"] == entry["top1"]
    subnet, cut = (flora.load(run / name) for name in ("subnet_0.5", "compress/subnet_0.5"))
    assert subnet.spec == cut.spec
    table = capsys.readouterr().out
    assert "subnet 0.5 " in table
    assert "subnet 0.7 " in table
    with Image.open(run / "report.png") as image:
        image.verify()


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"stages": ("pretrain", "calibrate", "search")}, "search"),
        ({"train_pretrained": True}, "pretrain"),
        ({"finetune.distill": False, "finetune.epochs": 1.0}, "finetune"),
    ],
)
@pytest.mark.slow
def test_stages_that_need_labels_are_named(finished_run, tmp_path, changes, names):
    config = unlabelled_config(finished_run, tmp_path, **changes)
    with pytest.raises(ValueError, match=f"has no labels, but {names} need"):
        start.run(config, tmp_path / "run")


@pytest.mark.slow
def test_calibration_goes_on_where_it_was_stopped(finished_run, tmp_path, monkeypatch):
    """In groups of one layer: a stop in the middle of a group, and a crash in the next one."""
    config = unlabelled_config(finished_run, tmp_path)
    monkeypatch.setattr(calibration, "layer_groups", lambda spec: [[la] for la in spec.layers])
    monkeypatch.setattr(calibration, "BATCH_SIZE", 8)
    config.stages = ("pretrain", "calibrate", "allocate", "extract")
    inherited = {}
    for name in ("whole", "interrupted"):
        settings = Settings.from_config(config)
        run = Run(settings, epath.Path(tmp_path / name), Images(settings), does="calibrate")
        flora.save(flora.load(finished_run / "dense"), run.folder / "dense")
        if name == "interrupted":
            with monkeypatch.context() as patch:
                answers = mock.Mock(side_effect=[False] * 4 + [True])  # in the second of six groups
                patch.setattr(calibration.StopRequest, "is_set", answers)
                with pytest.raises(Stopped, match="calibrate is saved at image 40 of"):
                    flora_method(run)
            with monkeypatch.context() as patch:
                patch.setattr(calibration, "_write_once", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    flora_method(run)
            assert (run.folder / "calibrate/group_000.safetensors").exists()
        flora_method(run)
        assert not (run.folder / "calibrate").exists()
        inherited[name] = (run.folder / "inherited/model.safetensors").read_bytes()
    assert inherited["interrupted"] == inherited["whole"]
