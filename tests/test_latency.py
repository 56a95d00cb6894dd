"""The latency table: what it measures, and the search that spends it."""

import dataclasses
import json
import types

import numpy as np
import pytest
from etils import epath

import flora_jax as flora
from flora_jax import timing
from flora_jax.closed_form import compress
from flora_jax.configs import deit_t, minutes
from flora_jax.errors import InputError
from flora_jax.flora.evolution import read_history
from flora_jax.methods import shared
from flora_jax.methods.closed_form import save_shapes_in_time_once
from flora_jax.runs.budgets import Budget, load_base, load_budgets, load_latency_table
from flora_jax.runs.settings import Settings, Spending
from flora_jax.runs.workdir import Run
from flora_jax.weights.export import engines, speed
from flora_jax.weights.export.engines import ENGINES, Engine, engine_of
from flora_jax.weights.export.latency import LatencyTable, measure, time_specs
from tests.helpers.networks import TINY_SWIN

BATCH = 3


@pytest.fixture
def ideal_engine(monkeypatch):
    """A multiply-add takes a nanosecond there, and nothing else any time."""
    clock = types.SimpleNamespace(now=0.0)

    def open_network(network):
        def prepare(batch_size):
            def run():
                clock.now += 1e-9 * batch_size * network.spec.macs()

            return run

        return prepare

    stopped = types.SimpleNamespace(perf_counter=lambda: clock.now, sleep=lambda seconds: None)
    monkeypatch.setattr(timing, "time", stopped)
    monkeypatch.setattr(speed, "time", stopped)
    monkeypatch.setattr(speed, "_TURN", 1e-9)
    return Engine("JAX", "", open_network)


@pytest.mark.parametrize("family", ["vit", "swin", "slim"])
def test_table_of_an_ideal_engine_is_macs(ideal_engine, tiny_spec, family):
    dense = {"vit": tiny_spec, "swin": TINY_SWIN, "slim": tiny_spec}[family]
    spec = dense
    if family == "slim":
        gated = flora.slim.add_gates(flora.create(dense))
        spec = flora.slim.cut_spec(dense, flora.slim.threshold(gated, attn=0.7, mlp=0.5, patch=0.6))
    space = flora.RankSpace.regular(spec, (1 / 8, 1 / 4, 1 / 2, 1))
    table = measure(space.variants(), ideal_engine, BATCH, dense=dense, rounds=3)
    genes = space.sample(np.random.default_rng(0), 50)
    full_rank = space.full_rank_genes
    saved = table.cost(full_rank) - table.cost(genes)
    np.testing.assert_allclose(saved, BATCH * (space.macs(full_rank) - space.macs(genes)), atol=9)
    assert len(np.unique(saved)) > 20
    assert table.dense_ms == table.full_ms or family == "slim"
    assert table.dense_ms >= table.full_ms == table.cost(full_rank) / 1e6
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_ranks_that_save_nothing_change_nothing(ideal_engine, tiny_spec):
    space = flora.RankSpace.regular(tiny_spec, (7 / 8, 1))
    table = measure(space.variants(), ideal_engine, BATCH, rounds=3)
    assert table.cost.least == table.cost(space.full_rank_genes) == 1e6 * table.full_ms


@pytest.mark.parametrize("spec", [TINY_SWIN, None], ids=["swin", "vit"])
def test_table_of_the_closed_form(ideal_engine, tiny_spec, spec):
    spec = spec or tiny_spec
    choices = compress.variants(spec)
    assert choices.macs(choices.largest) == spec.macs()
    table = measure(choices, ideal_engine, BATCH, rounds=3)
    rng = np.random.default_rng(0)
    for _ in range(5):
        picks = np.array([rng.integers(most + 1) for most in choices.largest])
        macs = choices.spec_of(picks).macs()
        assert choices.macs(picks) == macs
        assert table.cost(picks) == pytest.approx(BATCH * macs, abs=99)


class TestShapesInTime:
    """A table that is wrong is corrected by what whole networks take."""

    spec = TINY_SWIN
    budget = Budget((0.6, 0.65), (0, 0), is_only=True)

    @pytest.fixture(autouse=True)
    def file(self, tmp_path):
        self.file = epath.Path(tmp_path / "shapes.json")

    def share(self, engine, table):
        losses = [
            compress.Losses(
                np.linspace(1, 0, len(compress.head_dims(self.spec, block))),
                np.linspace(1, 0, len(compress.mlp_dims(block))),
            )
            for block in self.spec.blocks
        ]
        model = types.SimpleNamespace(spec=self.spec)
        plans = compress.Plans(model, [], [], losses, None)
        dense = 1e6 * table.dense_ms
        window = tuple(round(share * dense) for share in self.budget.shares)
        budget = dataclasses.replace(self.budget, window=window)
        save_shapes_in_time_once(self.file, plans, budget, table, engine, self.spec)
        shapes = [compress.Shape(*sizes) for sizes in json.loads(self.file.read_text())]
        return compress.reduced_spec(self.spec, shapes).macs() / self.spec.macs()

    def test_right_table(self, ideal_engine):
        table = measure(compress.variants(self.spec), ideal_engine, BATCH, rounds=3)
        assert 0.6 <= self.share(ideal_engine, table) <= 0.65

    def test_wrong_table(self, ideal_engine, caplog):
        table = measure(compress.variants(self.spec), ideal_engine, BATCH, rounds=3)
        less = tuple(tuple(0.7 * ms for ms in group) for group in table.change_ms)
        wrong = dataclasses.replace(table, change_ms=less)
        assert 0.6 <= self.share(ideal_engine, wrong) <= 0.65
        assert "the nearest that came out" not in caplog.text

    def test_shapes_that_are_there_stay(self, ideal_engine):
        self.file.write_text(json.dumps([[2, 4]] * len(self.spec.blocks)))
        assert self.share(ideal_engine, LatencyTable("jax", "", BATCH, 1.0, 1.0, ())) < 0.6


@pytest.mark.slow
def test_closed_form_spends_latency(ideal_engine, monkeypatch, tmp_path):
    for module in ("runs.checks", "methods.shared", "methods.closed_form", "methods.evaluate"):
        monkeypatch.setattr(f"flora_jax.{module}.engine_of", lambda *_: ideal_engine)
    config = minutes.get_config("runlocal")
    model = flora.create(Settings.from_config(config).model)
    flora.save(model, tmp_path / "dense")
    config.update_from_flattened_dict(
        {
            "pretrained": str(tmp_path / "dense"),
            "stages": ("pretrain", "compress", "evaluate", "report"),
            "search.budget": "latency",
            "budget.latency": (0.6, 0.65),
        }
    )
    flora.run(config, tmp_path / "run")
    result = json.loads((tmp_path / "run/result.json").read_text())
    for cost in ("macs", "ms"):
        assert 0.6 <= result["subnet"][cost] / result["dense"][cost] <= 0.65


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_networks_are_timed_in_turn(tiny_spec, dtype, monkeypatch):
    monkeypatch.setattr(speed, "_TURN", 1e-3)
    specs = {"dense": tiny_spec, "subnet": tiny_spec.with_ranks((1,) * 6)}
    times = time_specs(specs, engine_of("jax", dtype), BATCH, rounds=4)
    assert times.keys() == specs.keys()
    assert all(ms.shape == (4,) and (ms > 0).all() for ms in times.values())


def test_engines_have_names(monkeypatch):
    everything, _ = engines.installed_engines()
    assert {engine.key for engine in everything} <= set(ENGINES)
    hints = [f"{name} is left out: a hint" for name in ("OpenVINO", "PyTorch")]
    monkeypatch.setattr(engines, "installed_engines", lambda dtype: (everything[:1], hints))
    message = r"'openvino_int8' cannot run here, but jax can; OpenVINO is left out: a hint$"
    with pytest.raises(InputError, match=message):
        engine_of("openvino_int8")


def with_changes(table, choices, of_choice):
    """The table with other changes: a function of the choice, counted down from the last."""
    changes = [map(of_choice, range(len(group) - 1, -1, -1)) for group in choices]
    return dataclasses.replace(table, change_ms=tuple(map(tuple, changes)))


@pytest.mark.slow
def test_search_spends_latency(tmp_path, capsys, monkeypatch):
    def measure_and_make_low_ranks_quick(choices, *arguments, **options):
        """At this size a factor pair may be slower than the dense layer."""
        table = measure(choices, *arguments, **options, rounds=3)
        step = table.dense_ms / 10 / len(choices.kinds)
        return with_changes(table, choices.macs.layers, lambda steps_down: -step * steps_down)

    monkeypatch.setattr("flora_jax.methods.shared.measure", measure_and_make_low_ranks_quick)
    monkeypatch.setattr(speed, "_TURN", 1e-3)
    # Its quick look beforehand is spoilt in the same way.
    monkeypatch.setattr("flora_jax.runs.checks._check_latency", lambda *_: None)
    config, folder = deit_t.get_config("runlocal"), tmp_path / "run"
    config.update_from_flattened_dict(
        {
            "stages": ("pretrain", "search", "extract", "evaluate", "report"),
            "budget.latency": (0.3, 0.9),
            "search.budget": "latency",
        }
    )
    flora.run(config, folder)
    run = Run.open(folder)
    table, space = load_latency_table(run), run.settings.space.of(load_base(run))
    candidates = read_history(folder / "search/history.jsonl")
    costs = table.cost(np.array([candidate.genes for candidate in candidates]))
    assert [candidate.cost for candidate in candidates] == costs.tolist()
    [budget] = load_budgets(run)
    low, high = budget.window
    assert low <= costs.min() <= costs.max() <= high

    best = json.loads((folder / "search/best.json").read_text())
    assert best["macs"] == space.macs(best["genes"])
    predicted, measured = (best["latency"][f"{how}_share"] for how in ("predicted", "measured"))
    assert predicted == pytest.approx(table.cost(np.array(best["genes"])) / 1e6 / table.dense_ms)
    assert best["latency"]["error"] == pytest.approx(predicted / measured - 1)
    result = json.loads((folder / "result.json").read_text())
    assert result["dense"]["ms"] == pytest.approx(table.dense_ms)
    assert result["subnet"]["ms"] > 0
    assert "fewer ms" in capsys.readouterr().out
    assert flora.load(folder / "extract/uniform").spec.macs() <= best["macs"]

    # A search that was interrupted goes on with the table that it began with.
    whole = (folder / "search/history.jsonl").read_bytes()
    table_file = (folder / "latency/table.json").read_bytes()
    first_lines = b"".join(whole.splitlines(keepends=True)[:2])
    (folder / "search/history.jsonl").write_bytes(first_lines)
    records = json.loads((folder / "stages.json").read_text())
    del records["search"]["seconds"]
    (folder / "stages.json").write_text(json.dumps(records))
    flora.run(config, folder, "search")
    assert (folder / "latency/table.json").read_bytes() == table_file
    assert (folder / "search/history.jsonl").read_bytes() == whole


def test_unreachable_latency(tiny_space, monkeypatch):
    table = LatencyTable("jax", "a machine", 16, 1.0, 1.0, ())
    slow = with_changes(table, tiny_space.choices, lambda steps_down: -0.01 * (steps_down > 0))
    monkeypatch.setattr(shared, "measure", lambda *_, **__: slow)
    spending = Spending("latency", ((0.2, 0.3),))
    with pytest.raises(
        ValueError,
        match=r"\(0\.2, 0\.3\) cannot be reached: the space spans 0\.940\.\.1\.000 of the dense "
        r"model's 1\.00 ms in JAX on a machine",
    ):
        shared.measure_latency(None, tiny_space, tiny_space.spec, spending, "jax", 16, "float32")
