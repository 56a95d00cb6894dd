"""Bad input: every mistake is named before any work starts."""

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

import flora_jax as flora
from flora_jax import main
from flora_jax.configs import (
    deit_b,
    deit_s,
    deit_t,
    digits,
    swin_b,
    swin_s,
    swin_t,
    tiny_vit_5m,
    tiny_vit_11m,
    tiny_vit_21m,
)
from flora_jax.methods import start
from flora_jax.runs import checks
from flora_jax.runs.budgets import budgets_of
from flora_jax.runs.settings import Settings
from flora_jax.weights.export.timm import export_timm
from tests.helpers.commands import run_flora

PUBLISHED = (
    *(deit_b, deit_s, deit_t, swin_b, swin_s, swin_t),
    *(tiny_vit_5m, tiny_vit_11m, tiny_vit_21m),
)


def tiny_config(**changes) -> ConfigDict:
    config = deit_t.get_config("improved,runlocal")
    config.update_from_flattened_dict(changes)
    return config


BAD_CONFIGS = {
    "stage": ({"stages": ("pretrain", "serach")}, r"unknown stage 'serach'.*did you mean 'search'"),
    "first": ({"stages": ("slim", "evaluate")}, "must begin with pretrain"),
    "cut": ({"stages": ("pretrain", "extract")}, "extract needs allocate or search"),
    "ratio": ({"space.ratios": (0.5, 1.5)}, r"ratio 1\.5 lies outside \(0, 1\]"),
    "zero ratio": ({"space.ratios": (0.0, 1.0)}, r"ratio 0\.0 lies outside"),
    "heads": ({"model.num_heads": 5}, "embed_dim 24 is not a multiple of num_heads 5.*25"),
    "family": ({"model.family": "swim"}, "unknown model family 'swim'; known: vit, swin"),
    "patch": ({"model.patch_size": 5}, "image_size 16 is not a multiple of patch_size 5.*15"),
    "window": (
        {"budget.macs": (0.01, 0.02)},
        r"cannot be reached: the space spans 0\.\d+\.\.1.* of the dense model's MACs",
    ),
    "budget": ({"search.budget": "latancy"}, "search.budget 'latancy'.*did you mean 'latency'"),
    "latency window": ({"budget.latency": (0.6, 1.5)}, r"budget\.latency \(0\.6, 1\.5\) must be"),
    "latency batch": ({"search.latency_batch": 0}, "latency_batch must be at least 1, got 0"),
    "tile": ({"space.tile": 0}, "tile must be at least 1, got 0"),
    "empty window": ({"budget.macs": (0.6, 0.4)}, "0 < low < high"),
    "classes": ({"model.num_classes": 7}, "num_classes is 7, but digits has 10 classes"),
    "dataset": ({"data.name": "digit"}, "unknown dataset 'digit'"),
    "augmentation": ({"data.augmentation.name": "mixup"}, "unknown augmentation 'mixup'"),
    "batch": ({"supernet.batch_size": 5000}, "supernet: batch_size 5000 exceeds its 1078 images"),
    "dtype": ({"finetune.compute_dtype": "float8"}, "finetune.compute_dtype 'float8' is unknown"),
    "population": ({"search.parents": 99}, "99 parents exceed the population"),
    "baseline": ({"uniform_baseline": "alon"}, "uniform_baseline 'alon' is unknown.*mean 'alone'"),
    "metric": ({"metric": "accuracy"}, "metric 'accuracy' is unknown; choose one of top1, log"),
    "teacher": ({"pretrain.distill": True}, "pretrain.distill must be False"),
    "drop": ({"filter.drop": 1.0}, r"filter\.drop must lie in \[0, 1\)"),
    "mixing": (
        {"supernet.stored_predictions": True, "supernet.mixup": 0.8},
        "supernet: stored predictions are of single images",
    ),
    "negative mixing": ({"pretrain.cutmix": -1.0}, "pretrain.cutmix must be at least 0"),
    "repeats": ({"finetune.repeats": 0}, "finetune.repeats must be at least 1, got 0"),
    "fsdp": ({"fsdp": 3}, r"fsdp 3 does not divide the 1 devices; choose one of \[1\]"),
    "mean": ({"data.mean": (123.7, 116.3, 103.5)}, r"data.*mean must.*\[0, 1\].*0\.4851, 0\.4561"),
    "std": ({"data.std": (0.0, 0.2, 0.2)}, r"std must lie in \(0, 1\]"),
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
def test_workdir_of_another_config(own_run):
    with pytest.raises(ValueError, match=r"made by another config(.|\n)*seed: 0 there, 3 now"):
        start.run(tiny_config(seed=3), own_run)


@pytest.mark.slow
def test_command_line_errors_are_one_line(tmp_path):
    done = run_flora(tmp_path / "run", "--stage=serach")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: unknown stage 'serach'")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_unknown_field_on_the_command_line(tmp_path):
    done = run_flora(tmp_path / "run", "--config.supernet.epoch=3")
    assert done.returncode == 1
    assert done.stderr.strip() == """error: 'epoch' Did you mean "epochs" instead of "epoch"?"""


@pytest.mark.parametrize("config_file", PUBLISHED)
def test_published_configs_make_sense(config_file, tmp_path):
    config = config_file.get_config()
    settings = Settings.from_config(config)
    least, most = settings.space.of(settings.model).macs_range()
    for budget in budgets_of(settings.spending, settings.model):
        assert least < budget.window[0] < budget.window[1] < most
    small = Settings.from_config(config_file.get_config("runlocal"))
    assert small.model.family == settings.model.family
    checks.check(small)
    with pytest.raises(ValueError, match="accepted: runlocal, improved"):
        config_file.get_config("runlocl")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_digits_is_the_default_config():
    assert digits.get_config().data.name == "digits"
    values = flags.FlagValues()
    default = main._with_config_file(["flora_jax"])[1].removeprefix("--config=")
    config_flags.DEFINE_config_file("config", default, flag_values=values)
    values(["flora"])
    assert values.config.to_dict() == digits.get_config().to_dict()
