"""What can hardly be meant is said, with its figure; what is well is not spoken of."""

import logging
import re

import numpy as np
import pytest

import flora_jax as flora
from flora_jax.configs import digits
from flora_jax.runs import checks
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings
from flora_jax.training.train import warn_if_nothing_is_learnt


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


@pytest.mark.parametrize("end, is_said", [(2.3, True), (2.0, False)])
def test_a_loss_that_has_not_moved(end, is_said, caplog):
    noise = np.random.default_rng(0).normal(0, 0.05, 200)
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


def test_a_warm_up_without_end_is_warned_of():
    with pytest.warns(
        UserWarning, match=r"warmup_epochs 4.0 is more than epochs 1.0.*reaches 0.25"
    ):
        flora.Recipe(epochs=1.0, warmup_epochs=4.0).settings(10_000)


@pytest.mark.parametrize("heldout, is_said", [(0.97, True), (0.84, False), (0.7, False)])
def test_held_out_images_that_the_weights_have_seen(heldout, is_said, caplog):
    checks.warn_of_remembered_images(heldout, 1000, 0.82, 2000)
    assert ("97.00 % top-1 on the held-out images and 82.00 % on" in caplog.text) == is_said
