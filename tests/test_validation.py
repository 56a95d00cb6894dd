"""Bad input is named before any work starts; what can hardly be meant is said, with its figure."""

import logging
import re

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

import flora_jax as flora
from flora_jax import main
from flora_jax.configs import digits, imagenet
from flora_jax.methods import start
from flora_jax.runs import checks
from flora_jax.runs.budgets import budgets_of
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings
from flora_jax.training.train import warn_if_nothing_is_learnt
from flora_jax.weights.export.timm import export_timm
from tests.helpers.commands import run_flora
from tests.helpers.runs import tiny_config

BAD_CONFIGS = {
    "stage": ({"stages": ("pretrain", "serach")}, r"unknown stage 'serach'.*did you mean 'search'"),
    "first": ({"stages": ("slim", "evaluate")}, "must begin with pretrain"),
    "cut": ({"stages": ("pretrain", "extract")}, "extract needs allocate or search"),
    "ratio": ({"space.ratios": (0.5, 1.5)}, r"ratio 1\.5 lies outside \(0, 1\]"),
    "heads": ({"model.num_heads": 5}, "embed_dim 24 is not a multiple of num_heads 5.*25"),
    "family": ({"model.family": "swim"}, "unknown model family 'swim'; known: vit, swin"),
    "window": (
        {"budget.macs": (0.01, 0.02)},
        r"cannot be reached: the space spans 0\.\d+\.\.1.* of the dense model's MACs",
    ),
    "empty window": ({"budget.macs": (0.6, 0.4)}, "0 < low < high"),
    "latency window": ({"budget.latency": (0.6, 1.5)}, r"budget\.latency \(0\.6, 1\.5\) must be"),
    "tile": ({"space.tile": 0}, "tile must be at least 1, got 0"),
    "classes": ({"model.num_classes": 7}, "num_classes is 7, but digits has 10 classes"),
    "dataset": ({"data.name": "digit"}, "unknown dataset 'digit'"),
    "augmentation": ({"data.augmentation.name": "mixup"}, "unknown augmentation 'mixup'"),
    "batch": ({"supernet.batch_size": 5000}, "supernet: batch_size 5000 exceeds its 1078 images"),
    "population": ({"search.parents": 99}, "99 parents exceed the population"),
    "metric": ({"metric": "accuracy"}, "metric 'accuracy' is unknown; choose one of top1, log"),
    "teacher": ({"pretrain.distill": True}, "pretrain.distill must be False"),
    "mixing": (
        {"supernet.stored_predictions": True, "supernet.mixup": 0.8},
        "supernet: stored predictions are of single images",
    ),
    "fsdp": ({"fsdp": 3}, r"fsdp 3 does not divide the 1 devices; choose one of \[1\]"),
    "mean": ({"data.mean": (123.7, 116.3, 103.5)}, r"data\.mean must lie in \[0, 1\]"),
    "weights": ({"pretrained": "nowhere.safetensors"}, "no file or folder nowhere"),
}


@pytest.mark.parametrize("changes, message", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_config_fails_before_any_work(changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        start.run(tiny_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_start_no_run(tmp_path):
    config = tiny_config(pretrained=str(tmp_path / "diverged.safetensors"))
    model = flora.create(Settings.from_config(config).model)
    model.blocks[1].norm2.scale[...] *= np.nan
    export_timm(model, config.pretrained)
    with pytest.raises(ValueError, match=r"diverged\.safetensors: .*NaN.*blocks\.1\.norm2\.weight"):
        start.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_command_line_errors_are_one_line(tmp_path):
    done = run_flora(tmp_path / "run", "--config.supernet.epoch=3")
    assert done.returncode == 1
    assert done.stderr.strip() == """error: 'epoch' Did you mean "epochs" instead of "epoch"?"""


@pytest.mark.parametrize("name", imagenet.FLORA)
def test_published_configs_make_sense(name):
    settings = Settings.from_config(imagenet.config(name)())
    least, most = settings.space.of(settings.model).macs_range()
    for budget in budgets_of(settings.spending, settings.model):
        assert least < budget.window[0] < budget.window[1] < most
    small = Settings.from_config(imagenet.config(name)("runlocal"))
    assert small.model.family == settings.model.family
    checks.check(small)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_digits_is_the_default_config():
    assert digits.get_config().data.name == "digits"
    values = flags.FlagValues()
    default = main._with_config_file(["flora_jax"])[1].removeprefix("--config=")
    config_flags.DEFINE_config_file("config", default, flag_values=values)
    values(["flora"])
    assert values.config.to_dict() == digits.get_config().to_dict()


def settings_of(**changes) -> Settings:
    config = digits.get_config()
    config.update_from_flattened_dict(changes)
    return Settings.from_config(config)


DOUBTS = {
    "none": ({}, None),
    "pixels": ({"data.mean": (0.9,), "data.std": (0.1,)}, r"are far from those of 32 .*\(0\.[23]"),
    "spread": ({"data.std": (0.05,)}, r"data\.std \(0\.05,\) are far from .*\(0\.3\d*,\)"),
    "held-out": ({"data.heldout_fraction": 0.1}, "136 images.*14 a class.*known to ±6.7 points"),
    "rate": (
        {"supernet.learning_rate": 3e-4, "supernet.epochs": 5.0},
        "supernet: learning_rate 0.0003 .*at batch_size 64: in 84 .*0.0004 or more",
    ),
    "advised rate": ({"supernet.learning_rate": 4e-4, "supernet.epochs": 5.0}, None),
}


@pytest.mark.parametrize("changes, expected", DOUBTS.values(), ids=DOUBTS)
def test_what_can_hardly_be_meant_is_said(changes, expected, caplog):
    settings = settings_of(**changes)
    with caplog.at_level(logging.WARNING, checks.__name__):
        checks.warn_of_doubtful_settings(settings, Images(settings))
    assert caplog.text.count("WARNING") == (expected is not None), caplog.text
    assert re.search(expected or "", caplog.text), caplog.text


def test_a_model_that_guesses_is_not_compressed():
    for top1, changes, refusal in (
        (0.128, {}, r"12.80 % top-1 on 270 held-out.*10.00 %.*pretrain longer"),
        (0.1, {"pretrained": "w"}, "fine-tune it first with train_pretrained=True"),
    ):
        with pytest.raises(ValueError, match=refusal):
            checks.check_not_chance(settings_of(**changes), top1, 270)
    checks.check_not_chance(settings_of(), 0.14, 270)
    for changes in (
        {"refuse_near_chance": False},
        {"stages": ("pretrain", "evaluate")},
        {"model.num_classes": 0, "metric": "cosine"},
    ):
        checks.check_not_chance(settings_of(**changes), 0.0, 270)


def test_a_loss_that_has_not_moved(caplog):
    noise = np.random.default_rng(0).normal(0, 0.05, 200)
    for end, is_said in ((2.0, False), (2.3, True)):
        warn_if_nothing_is_learnt("pretrain", np.linspace(2.3, end, 200) + noise)
        assert ("pretrain: the loss has not moved" in caplog.text) == is_said


def test_gates_that_have_not_moved(caplog):
    model = flora.create(
        flora.ViTSpec(image_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2)
    )
    gates = flora.slim.add_gates(model).gates()
    checks.warn_of_idle_gates(gates)
    assert caplog.text.count("hardly moved from 1 (1.000 to 1.000)") == 2, "attention and MLP"
    assert "patch gates have hardly moved" in caplog.text
    caplog.clear()
    checks.warn_of_idle_gates({"attn": [np.ones((2, 4)), np.full((2, 4), 0.8)]})
    assert not caplog.text


def test_held_out_images_that_the_weights_have_seen(caplog):
    for heldout, is_said in ((0.84, False), (0.7, False), (0.97, True)):
        checks.warn_of_remembered_images(heldout, 1000, 0.82, 2000)
        assert ("97.00 % top-1 on the held-out images and 82.00 % on" in caplog.text) == is_said
