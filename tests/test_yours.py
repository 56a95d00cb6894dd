"""One's own weights and pictures in one command: what is left open follows from them."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

import flora_jax as flora
from flora_jax.configs import minutes, yours
from flora_jax.configs.common import IMPROVED_STAGES
from flora_jax.methods import shared, start
from flora_jax.models import functional
from flora_jax.preflight.plan import plan
from flora_jax.runs import auto_config
from flora_jax.runs.auto_config import settings_of
from flora_jax.runs.checks import check
from flora_jax.runs.settings import Settings
from flora_jax.runs.workdir import Run
from flora_jax.weights.metadata.preprocessing import save_preprocessing
from tests.helpers import modern
from tests.helpers.commands import run_flora
from tests.helpers.pictures import save


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A headless DINOv2 as transformers saves it."""
    folder = tmp_path_factory.mktemp("dinov2")
    (folder / "config.json").write_text(json.dumps(modern.config("hf_dinov2")["config"]))
    processor = {"image_processor_type": "BitImageProcessor", "resample": 2}
    processor |= {"size": {"shortest_edge": 48}, "crop_size": {"height": 42, "width": 42}}
    processor |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    save_file(modern.arrays("hf_dinov2"), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes of noise in their own colour, without train and val."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label, name in enumerate(("red", "green", "blue")):
        for i in range(40):
            picture = rng.integers(0, 160, size=(40, 56, 3), dtype=np.uint8)
            picture[..., label] += 95
            save(folder / name / f"{i}.png", picture)
    return folder


def config_of(weights, pictures, **changes):
    config = yours.get_config()
    config.pretrained, config.data.name = str(weights), f"folder:{pictures}"
    for name, value in changes.items():
        config[name] = value
    return config


def test_all_follows_from_weights_and_pictures(weights, pictures):
    settings = settings_of(config_of(weights, pictures))
    assert settings.model == dataclasses.replace(modern.SPECS["hf_dinov2"], num_classes=3)
    data = settings.data
    assert (data.mean, data.std) == ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert (data.crop_pct, data.crop_mode, data.interpolation) == (42 / 48, "center", "bilinear")
    assert settings.train_pretrained
    assert settings.metric == "log_likelihood"
    assert (data.heldout_fraction, data.heldout_by) == (0.25, "content")
    assert settings.pretrain.batch_size == 8
    assert settings.stages == ("pretrain", "compress", "finetune", "evaluate", "report")


def test_what_is_said_stands(weights, pictures):
    config = config_of(weights, pictures, image_size=28, metric="top1", train_pretrained=False)
    config.finetune.epochs, config.data.mean = 1.0, (0.1, 0.1, 0.1)
    settings = settings_of(config)
    assert settings.model.image_size == 28
    assert (settings.metric, settings.train_pretrained) == ("top1", False)
    assert (settings.finetune.epochs, settings.data.mean) == (1.0, (0.1, 0.1, 0.1))
    assert settings.supernet.epochs == auto_config._epochs(8.0, 68)


def test_unlabelled_pictures_of_a_headless_network(weights, pictures):
    config = config_of(weights, pictures)
    config.data.name = f"images:{pictures}"
    settings = settings_of(config)
    assert settings.model.num_classes == 0
    assert not settings.train_pretrained
    assert (settings.metric, settings.data.heldout_by) == ("cosine", "name")
    assert "compress" in settings.stages


def test_a_classifier_of_other_names_is_trained(pictures, tmp_path):
    flora.save(
        flora.create(dataclasses.replace(modern.SPECS["hf_dinov2"], num_classes=3)), tmp_path
    )
    assert not settings_of(config_of(tmp_path, pictures)).train_pretrained
    for names, is_trained in (
        (("Blue", "green", "red"), False),
        (("red", "green", "blue"), False),  # they are put in the order of the folders
        (("red", "green", "violet"), True),
    ):
        (tmp_path / "classes.json").write_text(json.dumps(names))
        assert settings_of(config_of(tmp_path, pictures)).train_pretrained == is_trained


def test_a_recipe_is_said_where_something_is_trained(weights, pictures, caplog):
    caplog.set_level("INFO", "flora_jax")
    config = config_of(weights, pictures)
    settings_of(config)
    assert "pretrain.epochs" in caplog.text
    caplog.clear()
    config.data.name = f"images:{pictures}"
    settings_of(config)
    assert "train_pretrained = False" in caplog.text
    assert "finetune.epochs" in caplog.text
    assert not re.search(r"(pretrain|supernet)\.(epochs|batch_size|learning_rate)", caplog.text)


def test_paths_hold_wherever_a_run_goes_on(weights, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(weights.parent)
    settings = settings_of(config_of(weights.name, f"../{pictures.parent.name}/{pictures.name}"))
    assert settings.pretrained == str(weights)
    assert settings.data.name == f"folder:{pictures}"
    config = {"pretrained": "hf:owner/vit", "data": {"name": "tfds:a/b", "data_dir": "sets"}}
    others = settings_of(config)
    assert (others.pretrained, others.data.name) == ("hf:owner/vit", "tfds:a/b")
    assert others.data.data_dir == str(weights.parent / "sets")
    remote = {"pretrained": "gs://bucket/vit", "data": {"name": "digits"}}
    assert settings_of(remote).pretrained == "gs://bucket/vit"
    assert settings_of(remote).data == Settings.from_config(remote).data


def test_what_cannot_be(weights, pictures):
    for change, message in (
        ({"pretrained": None}, r"nothing to start from: give --config\.pretrained=FOLDER"),
        ({"image_size": 40}, "image_size 40 is not a multiple of patch_size 14; .* 42"),
        ({"model": "vit_small_patch14_dino"}, "unknown kind of vit: 'dino'"),
    ):
        with pytest.raises(ValueError, match=message):
            settings_of(config_of(weights, pictures, **change))


def test_too_few_pictures_and_low_rank_layers_are_no_start(weights, pictures, tmp_path):
    for i in range(6):
        picture = np.full((9, 9, 3), 40 * i, np.uint8)
        save(tmp_path / "few" / "ab"[i % 2] / f"{i}.png", picture)
    with pytest.raises(ValueError, match=r"leaves 3 images to train with.*at least 8 are needed"):
        settings_of(config_of(weights, tmp_path / "few"))
    spec = flora.read_spec(weights)
    low_rank = flora.create(spec.with_ranks((3,) * len(spec.layers)))
    flora.save(low_rank, tmp_path / "low_rank")
    flora.export_torch(low_rank, tmp_path / "torch")
    for name in ("low_rank", "torch"):
        with pytest.raises(ValueError, match=r"low-rank layers.*--config=transfer trains it"):
            settings_of(config_of(tmp_path / name, pictures))


@pytest.fixture(scope="module")
def fewer_units(weights, tmp_path_factory):
    """A network of blocks that are not alike, as the closed form and ViT-Slim leave them."""
    folder = tmp_path_factory.mktemp("fewer_units")
    spec = flora.read_spec(weights).with_classes(3)
    blocks = [
        dataclasses.replace(b, head_dim=b.head_dim - i, mlp_dim=b.mlp_dim - i - 1)
        for i, b in enumerate(spec.blocks)
    ]
    flora.save(flora.create(dataclasses.replace(spec, blocks=tuple(blocks))), folder)
    return folder


@pytest.mark.parametrize("config", [minutes, yours])
def test_a_network_of_fewer_heads_and_units_is_a_start(config, fewer_units, pictures):
    """Which a run reads again from its own folder."""
    values = config.get_config()
    values.pretrained, values.data.name = str(fewer_units), f"folder:{pictures}"
    settings = settings_of(values)
    assert settings.model == flora.read_spec(fewer_units)
    assert not settings.trains_dense
    assert Settings.from_config(json.loads(json.dumps(settings.to_config()))) == settings
    check(settings)


def test_cut_tokens_are_those_of_one_size(fewer_units, pictures, tmp_path):
    spec = flora.read_spec(fewer_units)
    kept = dataclasses.replace(spec.blocks[-1], tokens=(0, 1, 2))
    cut = dataclasses.replace(spec, blocks=(*spec.blocks[:-1], kept))
    flora.save(flora.create(cut), tmp_path)
    assert settings_of(config_of(tmp_path, pictures)).model == cut
    with pytest.raises(ValueError, match=r"image_size 28: .* has cut tokens out of images of 42"):
        settings_of(config_of(tmp_path, pictures, image_size=28))


@pytest.mark.parametrize("config", [minutes, yours])
def test_a_folder_for_pytorch_is_a_start(config, weights, pictures, tmp_path):
    """One that was exported says all that the folder says that it was made of."""
    flora.export_torch(flora.from_pretrained(weights), tmp_path)
    save_preprocessing(tmp_path, flora.read_preprocessing(weights))
    values = config.get_config()
    values.pretrained, values.data.name = str(tmp_path), f"folder:{pictures}"
    exported = settings_of(values)
    values.pretrained = str(weights)
    assert dataclasses.replace(exported, pretrained=str(weights)) == settings_of(values)
    check(exported)


def test_without_a_word_about_pictures_the_usual_is_assumed(weights, pictures, tmp_path, caplog):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(weights / name)
    settings = settings_of(config_of(tmp_path, pictures))
    assert "assumed are mean (0.485, 0.456, 0.406)" in caplog.text
    assert settings.data.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("num_images", [24, 100, 2000, 50_000, 1_281_167])
def test_rules_make_recipes(num_images):
    batch = auto_config._batch_size(num_images, num_devices=3)
    assert batch % 3 == 0
    assert 5 <= auto_config._epochs(8.0, num_images) <= auto_config._epochs(12.0, num_images) <= 40
    assert num_images // batch >= 2
    assert 0.02 <= auto_config._heldout_fraction(num_images, 2) <= 0.25
    assert auto_config._learning_rate(3e-4, 64) == 3e-4
    steps = [auto_config._learning_rate(3e-4, size) * size / 512 for size in (8, 64, 256)]
    assert steps == [3.75e-5, 3.75e-5, 7.5e-5]


def test_the_plan_lists_what_the_run_does(weights, pictures, tmp_path):
    stages = tuple(stage for stage in IMPROVED_STAGES if stage != "filter")
    config = config_of(weights, pictures, stages=stages, export=("timm", "stablehlo"))
    settings = settings_of(config)
    run = Run(settings, tmp_path, check(settings))
    lines = plan(run, start.plan_of(run)[0], {"pretrain"}).splitlines()
    rows = {line.split()[0]: line.split() for line in lines[1:] if line and line[0].islower()}
    order = [*settings.stages[:-1], "export", "report"]
    assert list(rows)[: len(order)] == order
    assert rows["pretrain"][-1] == "done"
    steps = settings.supernet.settings(len(check(settings).train)).steps
    assert rows["supernet"][-2] == f"{steps:,}"
    assert rows["search"][1] == "96"
    assert rows["export"][1:3] == ["timm,", "stablehlo"]
    assert "on disk at most" in lines[-1]


def test_minutes_begin_with_the_same_two_flags(weights, pictures, caplog):
    config = minutes.get_config()
    caplog.set_level("INFO", "flora_jax")
    config.pretrained, config.data.name = str(weights), f"folder:{pictures}"
    settings = settings_of(config)
    assert settings.model == dataclasses.replace(modern.SPECS["hf_dinov2"], num_classes=3)
    assert settings.data.mean == (0.4, 0.5, 0.6)
    assert not settings.train_pretrained
    assert (settings.finetune.epochs, settings.budget.macs) == (1.0, (0.55, 0.6))
    assert "a linear probe of its features, which --config=yours trains on" in caplog.text
    config.data.name = f"images:{pictures}"
    assert settings_of(config).model.num_classes == 0


@pytest.mark.filterwarnings("ignore:the weights have no classifier")
def test_an_interrupted_training_goes_on_with_its_probe(weights, pictures, tmp_path, monkeypatch):
    config = config_of(weights, pictures, stages=("pretrain",))

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(shared, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start.run(config, tmp_path)
    probe = flora.load(tmp_path / "pretrain/probe")
    monkeypatch.setattr(shared, "fit_classifier", lambda *_: pytest.fail("it is there"))
    monkeypatch.setattr(shared, "train", lambda model, *arguments, **options: model)
    start.run(config, tmp_path)
    for ours, theirs in zip(
        *(functional.split(model)[1].values() for model in (probe, flora.load(tmp_path / "dense"))),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_from_pictures_to_a_subnet_in_one_command(weights, pictures, tmp_path):
    done = run_flora(
        tmp_path / "run",
        f"--config.pretrained={weights}",
        f"--config.data.name=folder:{pictures}",
        "--config.budget.macs=(0.6,0.8)",
        "--config.pretrain.epochs=8.0",
        "--config.finetune.epochs=3.0",
        config="yours",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert set(result) == {"dense", "probe", "subnet", "data"}
    assert result["probe"]["macs"] == result["dense"]["macs"]
    assert result["dense"]["top1"] > 0.9
    assert result["subnet"]["macs"] < 0.8 * result["dense"]["macs"]
