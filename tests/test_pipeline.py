"""The command line from end to end: results, skipping, being killed."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import flora_jax as flora
from flora_jax import pipeline
from flora_jax.configs import digits_swin, digits_tiny_vit
from flora_jax.flora.evolution import read_history
from flora_jax.io.json_lines import read_records
from flora_jax.models import functional
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings
from flora_jax.stages.flora import train_whole_supernet
from flora_jax.stages.names import FLORA_STAGES, STAGES
from flora_jax.stages.predictions import check_predictions
from flora_jax.stages.run import Run, load_base, load_space
from flora_jax.stages.training import train_stage
from tests.helpers.commands import run_flora
from tests.helpers.runs import tiny_config

pytestmark = pytest.mark.slow


def test_result_compares_dense_uniform_and_subnet(finished_run):
    result = json.loads((finished_run / "result.json").read_text())
    assert set(result) == {"dense", "uniform", "allocated", "subnet", "data"}
    dense = result["dense"]["macs"]
    low, high = tiny_config().budget.macs
    assert low * dense <= result["subnet"]["macs"] <= high * dense
    assert result["uniform"]["macs"] <= high * dense
    digits = list("0123456789")
    assert result.pop("data") == {
        "classes": digits,
        "left_out": {"train": {}, "test": {}},
        "test_images": 450,
        "skipped_test_images": 0,
    }
    assert json.loads((finished_run / "classes.json").read_text()) == digits
    for name in result:
        assert json.loads((finished_run / name / "classes.json").read_text()) == digits
        model = flora.load(finished_run / name)
        assert flora.macs(model.spec) == result[name]["macs"]
        assert flora.num_params(model.spec) == result[name]["params"]
        wanted = Run.open(finished_run).settings.data.preprocessing(model.spec.image_size)
        assert flora.read_preprocessing(finished_run / name) == wanted
        evaluation = json.loads((finished_run / name / "evaluation.json").read_text())
        about = {"dataset": "digits", "test_images": 450, "labels_of": "the dataset"}
        assert about.items() <= evaluation.items()
        for key in ("top1", "log_likelihood", "macs", "params"):
            assert evaluation[key] == result[name][key]
        # 450 test images: top-1 is a whole number of them.
        assert (result[name]["top1"] * 450) == pytest.approx(round(result[name]["top1"] * 450))


def test_result_compares_the_models_image_by_image(finished_run):
    result = json.loads((finished_run / "result.json").read_text())
    result.pop("data")
    images = load_file(finished_run / "test_images.safetensors")
    assert images["label"].shape == (450,)
    for name, entry in result.items():
        is_correct, predicted = (images[f"{name}/{key}"] for key in ("is_correct", "predicted"))
        np.testing.assert_array_equal(is_correct, predicted == images["label"])
        assert is_correct.dtype == np.uint8
        assert entry["top1"] == is_correct.mean()
        mean = images[f"{name}/log_likelihood"].mean(dtype=np.float64)
        assert entry["log_likelihood"] == mean
        if name != "dense":
            assert entry["agreement"] == (predicted == images["dense/predicted"]).mean()
    assert {name: set(entry.get("against", ())) for name, entry in result.items()} == {
        "dense": set(),
        "uniform": {"dense"},
        "allocated": {"uniform", "dense"},
        "subnet": {"uniform", "allocated", "dense"},
    }
    difference, low, high = result["subnet"]["against"]["uniform"]["top1"]
    assert difference == pytest.approx(result["subnet"]["top1"] - result["uniform"]["top1"])
    assert low <= difference <= high


def test_subnet_is_the_best_of_the_search_or_the_allocation(finished_run):
    best = json.loads((finished_run / "search/best.json").read_text())
    candidates = read_history(finished_run / "search/history.jsonl")
    winner = max((c for c in candidates if c.has_seen_all), key=lambda c: c.score)
    assert best.get("searched", best)["score"] == winner.score
    [allocated] = json.loads((finished_run / "allocate/genes.json").read_text())
    lead, low, high = best["ahead"]
    assert low <= lead <= high
    assert best["chosen"] == ("searched" if low > 0 else "allocated")
    assert best["genes"] == (list(winner.genes) if low > 0 else allocated["genes"])
    supernet = flora.load(finished_run / "supernet")
    assert supernet.space.contains(best["genes"])
    inherited = flora.load(finished_run / "extract/subnet")
    expected = functional.split(flora.extract(supernet, best["genes"]))[1]
    for name, value in functional.split(inherited)[1].items():
        np.testing.assert_array_equal(value, expected[name])


def test_filter_keeps_three_tenths_of_the_triples(finished_run):
    space = flora.load(finished_run / "supernet").space
    assert [len(triples) for triples in space.kept] == [64 - int(0.7 * 64)] * 2


def test_running_again_changes_nothing_and_prints_the_table(own_run):
    before = (own_run / "result.json").stat().st_mtime_ns
    done = run_flora(own_run)
    assert done.returncode == 0, done.stderr
    assert "pretrain: done in" in done.stderr
    assert "fewer MACs" in done.stdout
    assert (own_run / "result.json").stat().st_mtime_ns == before


def test_one_stage_needs_those_before_it(tmp_path):
    with pytest.raises(RuntimeError, match="stage 'search' needs 'pretrain'"):
        pipeline.run(tiny_config(), tmp_path, "search")


def test_one_stage_alone(own_run, finished_run):
    (own_run / "stages.json").write_text(
        json.dumps({name: {"seconds": 1} for name in STAGES if name not in ("evaluate", "report")})
    )
    (own_run / "result.json").unlink()
    done = run_flora(own_run, "--stage=evaluate")
    assert done.returncode == 0, done.stderr
    assert (own_run / "result.json").read_bytes() == (finished_run / "result.json").read_bytes()
    assert "report" not in json.loads((own_run / "stages.json").read_text())


def test_the_uniform_baseline_trained_alone(own_run, finished_run):
    for name in ("extract", "finetune", "uniform", "allocated", "subnet"):
        shutil.rmtree(own_run / name)
    (own_run / "config.json").unlink()
    done_before = ("pretrain", "calibrate", "filter", "supernet", "allocate", "search")
    (own_run / "stages.json").write_text(json.dumps({name: {"seconds": 1} for name in done_before}))
    done = run_flora(own_run, "--config.uniform_baseline=alone")
    assert done.returncode == 0, done.stderr
    result = json.loads((own_run / "result.json").read_text())
    expected = json.loads((finished_run / "result.json").read_text())
    against, expected_against = (r["subnet"].pop("against") for r in (result, expected))
    assert against["dense"] == expected_against["dense"]
    assert result["subnet"] == expected["subnet"]
    assert result["uniform"]["macs"] == expected["uniform"]["macs"]
    steps = (own_run / "finetune/uniform_alone/metrics.jsonl").read_text().count("\n")
    assert steps == (own_run / "supernet/metrics.jsonl").read_text().count("\n")


def test_without_filter_the_supernet_has_the_regular_space(tmp_path):
    stages = tuple(name for name in FLORA_STAGES if name != "filter")
    run = Run(Settings.from_config(tiny_config(stages=stages)), tmp_path)
    flora.save(flora.create(run.spec), run.folder / "dense")
    assert load_space(run).contains([0] * 6)


def test_stored_predictions_teach_as_the_teacher_does(finished_run, tmp_path, capsys):
    losses = []
    for stored in (False, True):
        config = tiny_config(**{"finetune.epochs": 1.0, "finetune.stored_predictions": stored})
        run = Run(Settings.from_config(config), tmp_path / str(stored))
        shutil.copytree(finished_run / "dense", run.folder / "dense")
        model = flora.load(finished_run / "subnet")
        trained = train_stage(
            run,
            model,
            run.settings.finetune,
            "finetune/subnet",
            Images(run.settings).train,
            teacher=load_base(run),
        )
        assert trained.spec == model.spec
        lines = (run.folder / "finetune/subnet/metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert (tmp_path / "True/finetune/subnet/predictions/meta.json").exists()
    assert not (tmp_path / "False/finetune/subnet/predictions").exists()
    assert len(losses[0]) > 30
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)
    check_predictions(run)
    assert "finetune/subnet: 34 steps stored" in capsys.readouterr().out
    shutil.rmtree(run.folder / "dense")
    flora.save(flora.create(run.spec, seed=9), run.folder / "dense")
    with pytest.raises(ValueError, match=r"holds other predictions(.|\n)*teacher: "):
        check_predictions(run)
    with pytest.raises(FileNotFoundError, match="has stored no predictions"):
        check_predictions(dataclasses.replace(run, folder=tmp_path / "False"))


# Depths, and ratios, that make fewer and smaller programs to compile.
@pytest.mark.parametrize(
    ("of_family", "depths", "most"), [(digits_swin, (2, 1), 0.6), (digits_tiny_vit, (1, 1, 1), 0.8)]
)
def test_another_family_from_end_to_end(of_family, depths, most, tmp_path):
    config = of_family.get_config()
    for recipe in (config.pretrain, config.filter.train, config.supernet, config.finetune):
        recipe.update({"epochs": 0.5, "warmup_epochs": 0.0})
    config.model.depths = depths
    config.budget.macs = (most - 0.1, most)
    config.refuse_near_chance = False  # so short a training teaches little
    config.space.ratios = (0.25, 1.0)
    config.search.update({"generations": 2, "population": 6, "parents": 3})
    config.search.update({"mutants": 2, "crossovers": 2})
    config.uniform_baseline = "none"
    config.stages = tuple(name for name in FLORA_STAGES if name != "allocate")
    pipeline.run(config, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) == {"dense", "subnet", "data"}  # no baseline
    assert result["subnet"]["macs"] < most * result["dense"]["macs"]
    subnet = flora.load(tmp_path / "subnet")
    assert subnet.spec.family == config.model.family
    assert flora.macs(subnet.spec) == result["subnet"]["macs"]
    assert any(rank is not None for rank in subnet.spec.ranks)


def test_a_run_of_the_version_before_is_opened_as_what_it_was(finished_run, tmp_path):
    """It knew no calibration: its factors are those of the plain SVD."""
    workdir = tmp_path / "old"
    workdir.mkdir()
    config = json.loads((finished_run / "config.json").read_text())
    for added in ("calibration", "allocation", "supernet_law", "train_pretrained"):
        del config[added]
    config["stages"] = [name for name in FLORA_STAGES if name not in ("calibrate", "allocate")]
    (workdir / "config.json").write_text(json.dumps(config))
    done = ("dense", "filter", "supernet")
    for name in done:
        shutil.copytree(finished_run / name, workdir / name)
    stages = ("pretrain", "filter", "supernet")
    (workdir / "stages.json").write_text(json.dumps({name: {"seconds": 1} for name in stages}))
    settings = Run.open(workdir).settings
    assert settings.calibration.images == 0
    with pytest.raises(RuntimeError, match="stage 'search' needs 'calibrate'"):
        pipeline.run(tiny_config(), workdir, "search")
    assert not (workdir / "earlier").exists()
    with pytest.raises(RuntimeError, match="stage 'extract' needs 'search'"):
        pipeline.run(settings.to_config(), workdir, "extract")


@pytest.mark.parametrize("law", ["sandwich", "nested"])
def test_other_laws_train_a_supernet(finished_run, tmp_path, law):
    config = tiny_config(supernet_law=law, **{"supernet.epochs": 1.0, "allocation.images": 16})
    run = Run(Settings.from_config(config), tmp_path)
    for name in ("dense", "inherited", "filter"):
        shutil.copytree(finished_run / name, run.folder / name)
    train_whole_supernet(run, Images(run.settings))
    losses = [record["loss"] for record in read_records(tmp_path / "supernet/metrics.jsonl")]
    assert np.isfinite(losses).all()
    assert (tmp_path / "supernet/drops.json").exists() == (law == "nested")
