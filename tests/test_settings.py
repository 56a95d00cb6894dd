"""A config becomes settings once: complete, checked, and named where it is wrong."""

import importlib
import json

import pytest

from flora_jax import configs
from flora_jax.configs.common import IMPROVED_STAGES
from flora_jax.methods.listing import stages
from flora_jax.runs.settings import Settings


@pytest.mark.parametrize("name", sorted(set(configs.names()) - {"yours"}))
def test_every_config_is_settings_and_back(name):
    settings = Settings.from_config(
        importlib.import_module(f"flora_jax.configs.{name}").get_config()
    )
    stored = json.loads(json.dumps(settings.to_config()))
    assert Settings.from_config(stored) == settings
    assert Settings.from_config(settings.to_config()).to_config() == settings.to_config()


def test_defaults_are_the_published_method():
    settings = Settings()
    assert settings.stages == IMPROVED_STAGES
    assert settings.supernet.epochs == 150.0
    assert (settings.supernet.learning_rate, settings.finetune.epochs) == (2.5e-5, 30.0)
    assert Settings.from_config({}) == settings
    assert hash(settings.supernet) == hash(Settings.from_config({}).supernet)


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
        ({"stages": ["report", "search"]}, "in the order"),
        ({"budget": {"macs": (0.5,)}}, "budget.macs must be one window"),
        ({"filter": {"drop": "half"}}, "filter: a value of another form: .*'<='"),
    ],
)
def test_what_is_wrong_is_named_with_its_section(config, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_config(config)


def test_stages_come_in_one_order():
    assert [name for name in stages() if name in IMPROVED_STAGES] == list(IMPROVED_STAGES)
