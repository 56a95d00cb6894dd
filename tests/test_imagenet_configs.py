"""The table of ImageNet configs: as published, improved, and shrunk to a laptop."""

import importlib

import pytest

from flora_jax.configs import imagenet
from flora_jax.runs.settings import Settings


@pytest.mark.parametrize("name", [*imagenet.FLORA, *imagenet.SLIM])
def test_every_network_of_the_table_is_a_config(name):
    config = importlib.import_module(f"flora_jax.configs.{name}").get_config()
    assert config.to_dict() == imagenet.config(name)().to_dict()
    assert "allocate" not in config.stages


@pytest.mark.parametrize(("name", "macs"), [("deit_b", 8.04e9), ("deit_s", 2.73e9)])
def test_the_published_subnet_lies_in_the_budget(name, macs):
    settings = Settings.from_config(imagenet.config(name)())
    low, high = settings.budget.macs
    assert low <= macs / settings.model.macs() <= high


def test_arguments_come_in_any_order():
    of_deit = imagenet.config("deit_b")
    assert {"calibrate", "allocate"} <= set(of_deit("improved").stages)
    both = of_deit("improved,runlocal").to_dict()
    assert both == of_deit("runlocal,improved").to_dict()
    assert both["model"] == of_deit("runlocal").model.to_dict()


@pytest.mark.parametrize(
    ("name", "argument"), [("deit_b", "runlocl"), ("vit_slim_deit_b", "improved")]
)
def test_unknown_arguments_are_refused(name, argument):
    with pytest.raises(ValueError, match=f"argument {argument!r}; accepted: runlocal"):
        imagenet.config(name)(argument)
