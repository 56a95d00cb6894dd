"""flora_jax --benchmark: what it says of ideal engines, of a run, and of what it cannot time."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest

import flora_jax as flora
from flora_jax import timing
from flora_jax.commands import benchmark as command
from flora_jax.commands.benchmark import benchmark, table
from flora_jax.data.preprocessing import Preprocessing
from flora_jax.runs.settings import Settings
from flora_jax.weights.export import speed
from flora_jax.weights.export.engines import Engine, installed_engines, is_out_of_memory
from flora_jax.weights.export.speed import Row, measure
from flora_jax.weights.metadata.preprocessing import save_preprocessing
from tests.helpers.compressed import low_rank, slimmed
from tests.helpers.runs import tiny_config
from tests.helpers.slimming import images_of
from tests.helpers.weights import random_model

SPEC = flora.ViTSpec(image_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5)
OPENVINO = ("OpenVINO", "OpenVINO float16", "OpenVINO int8")
ENGINES = ("JAX", "ONNX Runtime", "ONNX Runtime int8", "PyTorch")
if importlib.util.find_spec("openvino"):
    ENGINES = (*ENGINES[:-1], *OPENVINO, ENGINES[-1])


@pytest.fixture(scope="module")
def models():
    return {"dense": random_model(SPEC), "subnet": low_rank(random_model(SPEC))}


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a test says so."""
    clock = types.SimpleNamespace(now=0.0)
    stopped = types.SimpleNamespace(
        perf_counter=lambda: clock.now, sleep=lambda seconds: None, monotonic=lambda: clock.now
    )
    monkeypatch.setattr(timing, "time", stopped)
    monkeypatch.setattr(speed, "time", stopped)
    return clock


def ideal_engine(clock, name="ideal", busy=lambda: 1.0, most=99):
    """A multiply-add takes a nanosecond, times how busy the machine is; few images fit."""

    def open_network(network):
        def prepare(batch):
            def run():
                clock.now += 1e-9 * network.spec.macs() * batch * busy()

            if batch * network.spec.macs() > most * SPEC.macs():
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
            return run

        return prepare

    return Engine(name, "1", open_network)


def test_an_ideal_engine_realises_the_whole_saving(models, clock):
    rows, too_large = measure(models, [ideal_engine(clock)], [1, 6])
    macs = {name: model.spec.macs() for name, model in models.items()}
    share = macs["subnet"] / macs["dense"]
    assert not too_large
    assert [(row.batch, row.model) for row in rows] == [
        (batch, name) for batch in (1, 6) for name in macs
    ]
    for row in rows:
        expected = 1.0 if row.model == "dense" else share
        assert row.ms == pytest.approx(1e-6 * row.batch * macs[row.model])
        assert (row.low, row.ratio, row.high) == pytest.approx((expected,) * 3)
        assert row.macs_share == expected
    lines = table(rows, macs).splitlines()
    assert lines[0].split()[:4] == ["ideal,", "batch", "1", "ms"]
    assert lines[2].endswith("100 %")
    assert lines[1].split()[:3] == ["dense", f"{rows[0].ms:.2f}", f"{1000 / rows[0].ms:.1f}"]
    assert len(lines) == 7


def test_a_busy_machine_slows_all_alike(models, clock, monkeypatch):
    """Every turn is as slow as its round, which the ratios do not show."""
    load = iter(np.repeat(np.arange(1.0, 9999.0), 2))  # both models take a turn in each round
    monkeypatch.setattr(speed, "_turn", lambda run: (1, run))
    rows, _ = measure(models, [ideal_engine(clock, busy=lambda: next(load))], [2])
    assert rows[0].ms > 2e-6 * models["dense"].spec.macs()
    assert (rows[1].low, rows[1].high) == pytest.approx((rows[1].macs_share,) * 2)


def test_where_rounds_differ_nothing_is_told_and_where_others_work(models, clock, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(speed, "_turn", lambda run: (1, run))
    noisy = ideal_engine(clock, busy=lambda: rng.choice([1.0, 2.0, 3.0]))
    rows, _ = measure(models, [noisy, ideal_engine(clock, "calm")], [1])
    assert [row.is_sure for row in rows] == [True, False, True, True]
    macs = {name: model.spec.macs() for name, model in models.items()}
    noisy_row, calm_row = (table(rows, macs).splitlines()[i] for i in (2, 6))
    assert noisy_row.endswith(" ?")
    assert calm_row.endswith("100 %")
    assert table(rows, macs, is_idle=False).splitlines()[6].endswith(" ?")


def test_more_rounds_make_sure(models, clock, monkeypatch):
    """Ratios that differ by a fifth of the saving, about: 20 rounds are too few, 60 are enough."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(speed, "_turn", lambda run: (1, run))
    some = ideal_engine(clock, busy=lambda: 1 + 0.2 * rng.random())
    many, _ = measure(models, [some], [1])
    few, _ = measure(models, [some], [1], repeats=1)
    assert (few[1].is_sure, many[1].is_sure) == (False, True)


def test_other_programs_are_noticed():
    cores_elsewhere = timing.other_work()
    subprocess.run([sys.executable, "-c", "for _ in range(10_000_000): pass"], check=True)
    assert cores_elsewhere() > 0.3


def test_what_memory_does_not_hold_is_reported_and_others_go_on(models, clock):
    """Of 99 dense images or as much: 120 fit of the subnet alone, which nothing is left beside."""
    engines = [ideal_engine(clock), ideal_engine(clock, "larger", most=1000)]
    small, large = models["subnet"], models["dense"]
    rows, too_large = measure({"subnet": small, "dense": large}, engines, [50, 120])
    assert too_large == [{"engine": "ideal", "batch": 120, "model": "dense"}]
    found = [(row.engine, row.batch, row.model) for row in rows]
    assert ("ideal", 120, "subnet") in found
    assert len(found) == 7
    rows, too_large = measure(models, engines[:1], [120, 5])
    assert too_large == [{"engine": "ideal", "batch": 120, "model": "dense"}]
    assert {row.batch for row in rows} == {5}
    assert is_out_of_memory(MemoryError("Unable to allocate 561. GiB for an array"))
    assert is_out_of_memory(Exception("Failed to allocate memory for requested buffer"))
    assert not is_out_of_memory(RuntimeError("shapes (3, 4) and (5,) do not fit"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Of a run with two budgets that has extracted and not fine-tuned its models."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    config = tiny_config(**{"budget.macs": ((0.3, 0.4), (0.5, 0.6))})
    settings = Settings.from_config(config)
    folder.mkdir()
    config = json.dumps(settings.to_config())
    (folder / "config.json").write_text(config)
    done = settings.stages[: settings.stages.index("extract") + 1]
    (folder / "stages.json").write_text(
        json.dumps({name: {"key": "", "seconds": 1} for name in done})
    )
    begun = folder.parent / "begun"
    begun.mkdir()
    (begun / "config.json").write_text(config)
    (begun / "images.json").write_text("{}")
    dense = random_model(settings.model)
    flora.save(dense, folder / "dense")
    for kind in ("subnet", "allocated", "uniform"):
        for budget in (0.4, 0.6):
            flora.save(low_rank(dense), folder / f"extract/{kind}_{budget}")
    space = flora.RankSpace.regular(settings.model, ratios=(1 / 2, 1))
    flora.save(flora.factorize(dense, space), folder / "supernet")
    return folder


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(speed, "_ROUNDS", 3)
    monkeypatch.setattr(speed, "_TURN", 0.0)
    monkeypatch.setattr(speed, "_PAUSE", 0.0)


def test_all_models_of_a_run(run_folder, quickly, monkeypatch, capsys):
    for name in ("onnx", "openvino", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    benchmark(run_folder, batch_sizes=["2"])
    printed = capsys.readouterr().out
    written = json.loads((run_folder / "benchmark.json").read_text())
    assert [row["model"] for row in written["rows"]] == [
        "dense",
        *(f"{kind} 0.4" for kind in ("subnet", "allocated", "uniform")),
        *(f"{kind} 0.6" for kind in ("subnet", "allocated", "uniform")),
    ]
    fields = {field.name for field in dataclasses.fields(Row)}
    assert all(row.keys() == fields and row["engine"] == "JAX" for row in written["rows"])
    assert written["rows"][1]["macs_share"] == pytest.approx(
        flora.load(run_folder / "extract/subnet_0.4").spec.macs()
        / flora.load(run_folder / "dense").spec.macs()
    )
    assert "pip install 'flora_jax[onnx]'" in printed
    assert "pip install 'flora_jax[openvino]'" in printed
    assert "pip install 'flora_jax[torch]'" in printed
    assert re.search(r"^  uniform 0\.6 +\d+\.\d\d ", printed, re.MULTILINE)


def test_one_model_against_another_in_every_engine(tmp_path, quickly, capsys):
    """The other is prepared at another size than its own, and used at that."""
    for name in ("onnx", "onnxruntime", "torch"):
        pytest.importorskip(name, reason="runs the exported model")
    flora.save(slimmed(SPEC), tmp_path / "small")
    flora.save(random_model(SPEC), tmp_path / "other")
    save_preprocessing(tmp_path / "other", Preprocessing(24))
    benchmark(tmp_path / "small", tmp_path / "other", ["3", "1", "3"], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "small/benchmark.json").read_text())
    rows = [(row["engine"], row["batch"], row["model"]) for row in found["rows"]]
    names = ("other", "small")
    assert rows == [(e, batch, name) for e in ENGINES for batch in (3, 1) for name in names]
    larger = dataclasses.replace(SPEC, image_size=24, blocks=())
    for row in found["rows"]:
        assert row["ms"] > 0
        assert row["low"] <= row["ratio"] <= row["high"]
    shares = {row["model"]: row["macs_share"] for row in found["rows"]}
    assert shares["small"] == pytest.approx(slimmed(SPEC).spec.macs() / larger.macs())


def test_every_engine_computes_the_images_it_is_given(models):
    images = images_of(SPEC, 5)
    expected = np.asarray(models["subnet"](images))
    for engine in installed_engines()[0]:
        outputs = engine.open(models["subnet"])(images)()
        of = 1e-4 if engine.name in ("JAX", "ONNX Runtime", "OpenVINO", "PyTorch") else 0.1
        np.testing.assert_allclose(outputs, expected, rtol=0, atol=of * abs(expected).max())


def test_what_cannot_be_timed_is_said_first(run_folder, monkeypatch):
    monkeypatch.setattr(command, "installed_engines", lambda: pytest.fail("work has begun"))
    for place, sizes, message in (
        ("mine", "0", r"--batch_sizes must be whole numbers from 1, such as 1,8,64; got 0"),
        ("mime", "1", r"mime is not there \(did you mean 'mine'\?\)"),
        ("begun", "1", r"begun: no model of this run is finished yet"),
        (".", "1", r"is no folder of a model.* inside it are begun, mine"),
        ("mine/supernet", "1", r"holds a supernet: .*extract a model first"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            benchmark(run_folder.parent / place, batch_sizes=sizes.split(","))
