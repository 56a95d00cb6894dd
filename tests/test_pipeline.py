"""The command line from end to end: results, skipping, being killed."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

import flora_jax as flora
from flora_jax.commands.check_predictions import check_predictions
from flora_jax.configs import deit_b, digits_swin, digits_tiny_vit
from flora_jax.configs.common import IMPROVED_STAGES
from flora_jax.flora.evolution import read_history
from flora_jax.io.json_lines import read_records
from flora_jax.methods import start
from flora_jax.models import functional
from flora_jax.runs.workdir import After, Run, dependents, planned
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
    tested = result.pop("data")
    assert tested.pop("commonest_class") == pytest.approx(0.1, abs=0.01)
    assert tested == {
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
        start.run(tiny_config(), tmp_path, "search")


def forget(workdir, *names: str) -> None:
    """Takes the records of these steps out of a run's folder."""
    records = json.loads((workdir / "stages.json").read_text())
    kept = {name: record for name, record in records.items() if name not in names}
    (workdir / "stages.json").write_text(json.dumps(kept))


def test_one_stage_alone(own_run, finished_run):
    forget(own_run, "evaluate", "report")
    (own_run / "result.json").unlink()
    (own_run / "test_images.safetensors").unlink()
    done = run_flora(own_run, "--stage=evaluate")
    assert done.returncode == 0, done.stderr
    assert (own_run / "result.json").read_bytes() == (finished_run / "result.json").read_bytes()
    assert "report" not in json.loads((own_run / "stages.json").read_text())


def test_the_uniform_baseline_trained_alone(own_run, finished_run, caplog):
    caplog.set_level("INFO", "flora_jax")
    start.run(tiny_config(uniform_baseline="alone"), own_run)
    assert "extract, finetune, evaluate are done anew" in caplog.text
    result = json.loads((own_run / "result.json").read_text())
    expected = json.loads((finished_run / "result.json").read_text())
    against, expected_against = (r["subnet"].pop("against") for r in (result, expected))
    assert against["dense"] == expected_against["dense"]
    assert result["subnet"] == expected["subnet"]
    assert result["uniform"]["macs"] == expected["uniform"]["macs"]
    steps = (own_run / "finetune/uniform_alone/metrics.jsonl").read_text().count("\n")
    assert steps == (own_run / "supernet/metrics.jsonl").read_text().count("\n")


def test_stored_predictions_teach_as_the_teacher_does(own_run, tmp_path, capsys):
    """Fine-tuning anew with predictions from the disk, beside a teacher in every step."""
    losses = []
    for stored in (False, True):
        changes = {"finetune.epochs": 1.0, "finetune.stored_predictions": stored}
        changes |= {"uniform_baseline": "none", "keep_checkpoints": True}
        start.run(tiny_config(**changes), own_run, "extract")
        start.run(tiny_config(**changes), own_run, "finetune")
        losses.append([r["loss"] for r in read_records(own_run / "finetune/subnet/metrics.jsonl")])
        predictions = own_run / "finetune/subnet/predictions"
        assert (predictions / "meta.json").exists() == stored
    assert len(losses[0]) > 30
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)
    run = Run.open(own_run)
    check_predictions(run)
    assert "finetune/subnet: 34 steps stored" in capsys.readouterr().out
    shutil.rmtree(run.folder / "dense")
    flora.save(flora.create(run.spec, seed=9), run.folder / "dense")
    with pytest.raises(ValueError, match=r"holds other predictions(.|\n)*teacher: "):
        check_predictions(run)
    with pytest.raises(FileNotFoundError, match="has stored no predictions"):
        check_predictions(dataclasses.replace(run, folder=tmp_path / "none"))


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
    left_out = {"allocate"} | ({"filter"} if of_family is digits_tiny_vit else set())
    config.stages = tuple(name for name in IMPROVED_STAGES if name not in left_out)
    start.run(config, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) == {"dense", "subnet", "data"}  # no baseline
    assert result["subnet"]["macs"] < most * result["dense"]["macs"]
    subnet = flora.load(tmp_path / "subnet")
    assert subnet.spec.family == config.model.family
    assert flora.macs(subnet.spec) == result["subnet"]["macs"]
    assert any(rank is not None for rank in subnet.spec.ranks)


@pytest.mark.parametrize("sampling", ["sandwich", "nested"])
def test_other_samplings_train_a_supernet(own_run, sampling):
    changes = {"supernet_sampling": sampling, "supernet.epochs": 1.0, "allocation.images": 16}
    start.run(tiny_config(**changes), own_run, "supernet")
    losses = [record["loss"] for record in read_records(own_run / "supernet/metrics.jsonl")]
    assert np.isfinite(losses).all()
    assert (own_run / "supernet/sensitivity.jsonl").exists() == (sampling == "nested")
    assert not (own_run / "search").exists()


def test_flora_as_published_from_end_to_end(finished_run, tmp_path):
    """The plain SVD, a uniform first population, every candidate on every image, its own winner."""
    config = deit_b.get_config("runlocal")
    config.pretrained, config.uniform_baseline = str(finished_run / "dense"), "none"
    start.run(config, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) == {"dense", "subnet", "data"}
    assert not (tmp_path / "inherited").exists()
    candidates = read_history(tmp_path / "search/history.jsonl")
    assert all(candidate.has_seen_all for candidate in candidates)
    header = json.loads((tmp_path / "search/history.jsonl").read_text().partition("\n")[0])
    assert {"first", "halving"}.isdisjoint(header["search"])
    best = json.loads((tmp_path / "search/best.json").read_text())
    assert best["score"] == max(candidate.score for candidate in candidates)
    space = flora.load(tmp_path / "supernet").space
    assert [len(triples) for triples in space.kept] == [64 - int(0.7 * 64)] * 2


def test_a_step_that_is_put_in_is_planned_run_and_hashed(own_run, monkeypatch):
    """A step more takes a call in the script: order, plan and dependencies follow from it."""
    seen = []

    def script(run: Run) -> None:
        dense = run.step("pretrain", None, leaves=("dense",), otherwise=None)
        extra = run.step("extra", lambda step, before, number: seen.append(number), After(dense), 3)
        run.step("last", lambda step, before: seen.append("last"), After(extra))

    settings = dataclasses.replace(Run.open(own_run).settings, stages=("extra", "last"))
    run = Run(settings, epath.Path(own_run))
    plan = planned(run, script)
    assert list(plan) == ["extra", "last"]
    assert dependents("extra", plan) == ["extra", "last"]
    run.does = True
    script(run)
    script(run)
    assert seen == [3, "last"]
