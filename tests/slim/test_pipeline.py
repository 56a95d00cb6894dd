"""ViT-Slim, FLORA on top of it, and the transfer of the result, from end to end."""

import json

import pytest
from ml_collections import ConfigDict

import flora_jax as flora
from flora_jax.configs import (
    digits_slim,
    digits_swin,
    flora_on_slim_deit_b,
    transfer,
    vit_slim_deit_b,
    vit_slim_deit_s,
)
from flora_jax.models import functional
from flora_jax.runs import checks
from flora_jax.runs.settings import Settings
from flora_jax.runs.workdir import Run
from flora_jax.slim.threshold import DECISION_FILE, read_decision

pytestmark = pytest.mark.slow


def tiny_config(module=flora_on_slim_deit_b, **changes) -> ConfigDict:
    config = module.get_config("runlocal")
    for recipe in (
        *(config.pretrain, config.slim.gates, config.slim.retrain),
        *(config.filter.train, config.supernet, config.finetune),
    ):
        recipe.epochs = 2.0
    config.space.ratios = (0.25, 0.5, 1.0)  # fewer programs to compile
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder of a run that slims and then searches, and hands out both."""
    workdir = tmp_path_factory.mktemp("both") / "run"
    flora.run(tiny_config(export=("stablehlo", "timm"), uniform_baseline="none"), workdir)
    return workdir


def test_flora_goes_on_from_the_slimmed_model(both):
    result = json.loads((both / "result.json").read_text())
    assert set(result) == {"dense", "slim", "subnet", "data"}
    macs = {name: row["macs"] for name, row in result.items() if name != "data"}
    assert macs["slim"] <= 0.8 * macs["dense"]
    assert 0.45 * macs["dense"] <= macs["subnet"] <= 0.47 * macs["dense"]
    slim, subnet = flora.load(both / "slim").spec, flora.load(both / "subnet").spec
    assert [block.mlp_dim for block in subnet.blocks] == [block.mlp_dim for block in slim.blocks]
    assert [block.tokens for block in subnet.blocks] == [block.tokens for block in slim.blocks]
    assert slim.blocks != Run.open(both).spec.blocks
    for name in ("slim.png", "report.png"):
        assert (both / name).stat().st_size > 10_000
    assert "<h2>What slimming leaves</h2>" in (both / "report.html").read_text()


def test_what_was_compressed_is_handed_out(both):
    result = json.loads((both / "result.json").read_text())
    assert sorted(path.name for path in (both / "export").iterdir()) == ["slim", "subnet"]
    for name in ("slim", "subnet"):
        folder = both / "export" / name
        assert (folder / "model.stablehlo.bin").exists()
        ours, saved = flora.load(folder / "timm"), flora.load(both / name)
        assert ours.spec == saved.spec
        card, top1 = (folder / "README.md").read_text(), result[name]["top1"]
        assert f"| top-1 % | {100 * top1:.2f} | {100 * result['dense']['top1']:.2f} |" in card
        assert "Against the dense model on the same images: " in card
        assert "Measured on 450 test images of digits, by the labels of the dataset." in card
        assert ("FLORA" in card) == (name == "subnet")


def test_the_decision_is_kept(both):
    gates, masks = read_decision(both / DECISION_FILE)
    blocks = flora.load(both / "slim").spec.blocks
    assert [mask.sum() for mask in masks.mlp] == [block.mlp_dim for block in blocks]
    assert {kind: len(values) for kind, values in gates.items()} == dict.fromkeys(
        ("attn", "mlp", "patch"), len(blocks)
    )


def test_a_slimmed_model_moves_to_other_classes(both, tmp_path):
    config = transfer.get_config("digits")
    config.update_from_flattened_dict(
        {"pretrained": str(both / "slim"), "finetune.epochs": 2.0, "finetune.warmup_epochs": 0.0}
    )
    config.export = ("timm",)
    with pytest.warns(UserWarning, match="head has 10 classes in the weights and 5 in the spec"):
        flora.run(config, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) == {"transfer", "data"}
    slim, moved = flora.load(both / "slim"), flora.load(tmp_path / "transfer")
    assert moved.spec.blocks == slim.spec.blocks
    assert moved.spec.num_classes == 5
    before, after = (functional.split(model)[1] for model in (slim, moved))
    assert before["head.kernel"].shape != after["head.kernel"].shape
    assert flora.load(tmp_path / "export/transfer/timm").spec == moved.spec
    card = (tmp_path / "export/transfer/README.md").read_text()
    assert "The model slim took on the classes of digits" in card
    assert 'tags: ["vision-transformer", "compressed"]' in card


BAD_CONFIGS = {
    "budget": ({"slim.budget.mlp": 0.0}, r"slim\.budget\.mlp must lie in \(0, 1\], got 0"),
    "large budget": ({"slim.budget.attn": 1.5}, r"slim\.budget\.attn must lie in \(0, 1\]"),
    "gates": ({"slim.attention": "heads"}, "slim.attention 'heads' is unknown; choose one of dim"),
    "tile": ({"slim.tile": 0}, r"slim\.tile must be at least 1"),
    "nothing left": ({"slim.budget.macs": 0.4}, r"0\.4 is below the subnet's, 0\.47"),
    "batch": ({"slim.retrain.batch_size": 5000}, "slim.retrain: batch_size 5000 exceeds"),
}


@pytest.mark.parametrize("changes, message", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_config_fails_before_any_work(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        flora.run(tiny_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_token_gates_of_a_swin_are_refused(tmp_path):
    config = digits_swin.get_config()
    config.stages = digits_slim.get_config().stages
    config.slim.tokens = True
    with pytest.raises(ValueError, match="no token gates here: the windows of a Swin"):
        flora.run(config, tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pretrained": "nowhere"}, "no file or folder .*nowhere"),
        ({"pretrained": ""}, "transfer needs weights: set pretrained"),
        ({"finetune.distill": True}, "nobody teaches the new classes"),
        ({"stages": ("transfer", "filter")}, "transfer has no stage filter, only transfer"),
        ({"data.classes": (1, 1, 2)}, r"classes \(1, 1, 2\) must be different ones of 0\.\.9"),
        ({"data.classes": (9, 10)}, r"must be different ones of 0\.\.9"),
        ({"data.classes": (1, 2)}, "num_classes is 5, but digits has 2 classes"),
    ],
)
def test_bad_transfer(both, changes, message, tmp_path):
    config = transfer.get_config("digits")
    config.pretrained = str(both / "slim")
    config.update_from_flattened_dict(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        flora.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", [vit_slim_deit_b, vit_slim_deit_s, flora_on_slim_deit_b])
def test_published_configs_make_sense(module, tmp_path):
    assert Settings.from_config(module.get_config()).model.image_size == 224
    checks.check(Settings.from_config(module.get_config("runlocal")))
    with pytest.raises(ValueError, match="accepted: runlocal"):
        module.get_config("runlocl")
