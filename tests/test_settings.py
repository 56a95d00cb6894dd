"""A config becomes settings once: complete, checked, and named where it is wrong."""

import dataclasses
import importlib
import json

import numpy as np
import pytest

import flora_jax as flora
from flora_jax import configs
from flora_jax.configs.common import IMPROVED_STAGES
from flora_jax.data.preprocessing import Crop, Preprocessing
from flora_jax.errors import differences
from flora_jax.flora.evolution import EvolutionSettings
from flora_jax.methods.listing import steps_of
from flora_jax.runs.settings import Settings


@pytest.mark.parametrize("name", sorted(set(configs.names()) - {"yours", "minutes"}))
def test_every_config_is_settings_and_back(name):
    settings = Settings.from_config(
        importlib.import_module(f"flora_jax.configs.{name}").get_config()
    )
    stored = json.loads(json.dumps(settings.to_config()))
    assert Settings.from_config(stored) == settings
    assert Settings.from_config(settings.to_config()).to_config() == settings.to_config()


def test_defaults_are_the_published_method():
    """FLORA (WACV 2024) on DeiT-B, point by point."""
    settings = Settings()
    stages = ("pretrain", "filter", "supernet", "search", "extract", "finetune", "evaluate")
    assert settings.stages == (*stages, "report")  # the plain SVD, and no allocation
    assert settings.model == flora.deit("base")
    assert settings.space.ratios == (1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 1)
    assert settings.supernet_sampling == "low_rank_aware"
    assert (settings.filter.drop, settings.metric) == (0.7, "top1")
    assert settings.search.evolution == EvolutionSettings(20, 50, 10, 25, 25, 0.2)
    assert not settings.search.halving  # every candidate on every held-out image
    assert settings.search.budget == "macs"
    recipe, local = settings.supernet, settings.filter.train
    assert (recipe.epochs, recipe.learning_rate, recipe.batch_size) == (150, 2.5e-5, 1024)
    assert (recipe.warmup_epochs, recipe.warmup_learning_rate) == (5, 5e-7)
    assert (recipe.min_learning_rate, recipe.weight_decay, recipe.clip_norm) == (5e-7, 0.01, 5.0)
    assert (local.epochs, local.learning_rate, local.warmup_epochs) == (20, 7.5e-6, 3)
    for each in (recipe, local, settings.finetune):
        assert (each.distill, each.distill_features, each.mixup, each.cutmix) == (True, 0, 0, 0)
    augmentation = settings.data.augmentation.changes
    assert settings.data.augmentation.name == "deit"
    assert (augmentation["rand_augment"], augmentation["magnitude"]) == (True, 9.0)
    assert (augmentation["color_jitter"], augmentation["erase_probability"]) == (0.0, 0.25)
    assert Settings.from_config({}) == settings
    assert hash(settings.supernet) == hash(Settings.from_config({}).supernet)


@pytest.mark.parametrize("name", ["deit_b", "deit_s", "deit_t", "swin_b", "tiny_vit_21m"])
def test_improved_is_a_switch(name):
    """Published configs differ from `Settings()` in network, ratios, budget and recipe alone."""
    get_config = importlib.import_module(f"flora_jax.configs.{name}").get_config
    published, improved = get_config(), get_config("improved")
    expected = dataclasses.replace(Settings(), model=Settings.from_config(published).model)
    free = ("model", "space", "budget", "supernet.epochs", "supernet.learning_rate", "filter.train")
    for field, *_ in differences(expected.to_config(), published.to_dict()):
        assert field.startswith(free) or field == "metric", field
    ours = list(differences(published.to_dict(), improved.to_dict()))
    assert {"stages", "search.halving"} == {field for field, *_ in ours}
    assert {"calibrate", "allocate"} <= set(improved.stages)
    assert len(ours) <= 12


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"supernett": {}}, r"no setting supernett \(did you mean 'supernet'\?\)"),
        ({"supernet": {"epoch": 1}}, r"no setting supernet\.epoch \(did you mean 'epochs'\?\)"),
        (
            {"slim": {"gates": {"learning_rat": 1}}},
            r"no setting slim\.gates\.learning_rat \(did you mean 'learning_rate'\?\)",
        ),
        ({"slim": {"gates": {"epochs": -1.0}}}, r"slim\.gates\.epochs must be at least 0, got -1"),
        ({"slim": {"budget": {"mlp": 2.0}}}, r"slim\.budget\.mlp must lie in \(0, 1\], got 2\.0"),
        ({"filter": {"train": {"clip_norm": 0.0}}}, r"filter\.train\.clip_norm must be above 0"),
        ({"model": {"family": "vit", "depth": 0}}, "depth must be at least 1, got 0"),
        ({"model": {"family": "vit", "dept": 3}}, r"no field dept \(did you mean 'depth'\?\)"),
        ({"budget": {"macs": (0.5, 0.6, 0.7)}}, "budget.macs must be one window"),
        (
            {"budget": {"macs": ("2G",)}},
            r"budget\.macs must be one window .* such as \(0\.45, 0\.5\)",
        ),
        ({"budget": {"latency": ("0.5", "0.6")}}, r"budget\.latency must be one window"),
        ({"space": {"ratios": (0.5, "1/4")}}, r"space\.ratios must hold numbers alone, got .*1/4"),
        ({"data": {"classes": ["cat"]}}, r"data\.classes must hold numbers alone, got .*cat"),
        ({"filter": {"drop": "half"}}, "filter: a value of another form: .*'<='"),
    ],
)
def test_what_is_wrong_is_named_with_its_section(config, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_config(config)


def test_stages_come_in_the_order_of_the_script():
    assert [name for name in steps_of("flora") if name in IMPROVED_STAGES] == [*IMPROVED_STAGES]


def test_lists_and_arrays_are_as_good_as_tuples():
    spec, swin = flora.deit("tiny"), flora.swin("tiny")
    mean, std = np.float32([0.5, 0.25, 0.5]), [0.25, np.float64(0.5), 1]
    plain = ((0.5, 0.25, 0.5), (0.25, 0.5, 1))
    blocks = [dataclasses.replace(block, ranks=[None] * 3) for block in spec.blocks]
    for given, wanted in (
        (flora.Normalization(mean, std), flora.Normalization(*plain)),
        (Preprocessing(np.int64(8), mean, std), Preprocessing(8, *plain)),
        (Crop([8, 8, 3]), Crop((8, 8, 3))),
        (dataclasses.replace(spec, blocks=blocks), spec),
        (dataclasses.replace(swin, depths=[2, 2, 6, 2], num_heads=np.array(swin.num_heads)), swin),
    ):
        assert given == wanted
        assert hash(given) == hash(wanted)
        assert json.dumps(vars(given), default=vars) == json.dumps(vars(wanted), default=vars)
