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
from tests.helpers.pictures import save, scene
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
    "weights": ({"pretrained": "nowhere.safetensors"}, r"no file or folder .*nowhere\.safetensors"),
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
    assert done.stderr == "error: no setting supernet.epoch (did you mean 'supernet.epochs'?)\n"
    done = run_flora(tmp_path / "run", "--config.budget.macs=2G")
    assert done.returncode == 1
    assert done.stderr.startswith("error: budget.macs must be one window")
    assert done.stderr.count("\n") == 1  # and no word of libraries


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


def answers(counts) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions, of a table of how often a class (row) is taken for another."""
    pairs = np.argwhere(np.ones_like(counts)).repeat(np.ravel(counts), axis=0)
    return pairs[:, 0], pairs[:, 1]


def guesses(right: int) -> tuple[np.ndarray, np.ndarray]:
    """Of 270 digits, of which so many are right; the others go to the next class."""
    labels = np.arange(270) % 10
    return labels, np.where(np.arange(270) < right, labels, (labels + 1) % 10)


CONSTANT, RARE_ARE_FOUND, HALF_FOUND = [[285, 0], [15, 0]], [[285, 0], [5, 10]], [[270, 15], [6, 9]]
SHUFFLED = [[271, 14], [14, 1]]


def test_a_model_that_guesses_is_not_compressed():
    """It has what its answers have by chance: of one that always says the commonest class, 95 %."""
    two = {"model.num_classes": 2}
    for found, changes, refusal in (
        (guesses(34), {}, r"12.59 % top-1 on 270 held-out.*10.00 % by chance.*pretrain longer"),
        (guesses(27), {"pretrained": "w"}, "fine-tune it first with train_pretrained=True"),
        (
            answers(CONSTANT),
            two,
            r"95.00 % top-1 .* 95.00 % by chance .* commonest .* 95.00 %:",
        ),
        (
            answers(SHUFFLED),
            two,
            r"90.67 % top-1 .* 90.50 % by chance .* commonest .* 95.00 %:",
        ),
    ):
        with pytest.raises(ValueError, match=refusal):
            checks.check_not_chance(settings_of(**changes), *found)
    checks.check_not_chance(settings_of(), *guesses(38))
    for learned in (RARE_ARE_FOUND, HALF_FOUND):
        checks.check_not_chance(settings_of(**two), *answers(learned))
    for changes in (
        {"refuse_near_chance": False},
        {"stages": ("pretrain", "evaluate")},
        {"model.num_classes": 0, "metric": "cosine"},
    ):
        checks.check_not_chance(settings_of(**changes), *guesses(0))


def test_copies_across_the_splits_are_said(tmp_path, caplog):
    for i in range(24):
        save(tmp_path / f"data/train/{'ab'[i % 2]}/{i}.png", scene(i))
    for i in range(6):
        for split, first, size in (("val", 0, (40, 30)), ("unseen", 21, (100, 75))):
            name = f"{'ab'[i % 2]}/other {i}.jpg"
            save(tmp_path / "data" / split / name, scene(first + i, size), quality=95)
    changes = {"data.name": f"folder:{tmp_path / 'data'}", "model.num_classes": 2}
    changes["model.in_channels"] = 3
    for more, copies, words in (
        ({}, (0, 6), ["6 of the 6 test images are copies"]),
        (
            {"data.heldout_split": "unseen"},
            (3, 6),
            ["3 of the 6 held-out", "6 of the 6 test"],
        ),
        ({"data.test_split": "unseen"}, (0, 3), ["3 of the 6 test images"]),
        ({"data.name": f"folder:{tmp_path / 'data/train'}"}, (0, 0), []),
    ):
        caplog.clear()
        settings = settings_of(**changes | {"data.heldout_fraction": 0.25} | more)
        images = Images(settings)
        assert images.copies == copies
        with caplog.at_level(logging.WARNING, checks.__name__):
            checks.warn_of_doubtful_settings(settings, images)
        said = [message for message in caplog.messages if "are copies of" in message]
        assert len(said) == len(words)
        assert all(word in message for word, message in zip(words, said, strict=True))
    assert Images(settings_of()).copies is None  # in no folder


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
