"""The latency table: what it measures, and the search that spends it."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import timing
from flora_jax.configs import deit_t
from flora_jax.flora.evolution import read_history
from flora_jax.flora.extras import latency
from flora_jax.flora.extras.latency import LatencyTable, measure, measure_networks
from flora_jax.methods import shared
from flora_jax.runs.budgets import load_base, load_budgets, load_latency_table
from flora_jax.runs.settings import Spending
from flora_jax.runs.workdir import Run
from tests.helpers.networks import TINY_SWIN

BATCH = 3


@pytest.fixture
def ideal_device(monkeypatch, count_macs):
    """A device on which a multiply-add takes a nanosecond, and nothing else any time."""
    clock = types.SimpleNamespace(now=0.0)

    def compiled(function, dtype, *shapes):
        seconds = 1e-9 * count_macs(jax.make_jaxpr(function)(*shapes))

        def run():
            clock.now += seconds

        return run

    monkeypatch.setattr(latency, "_compiled", compiled)
    stopped = types.SimpleNamespace(perf_counter=lambda: clock.now, sleep=lambda seconds: None)
    monkeypatch.setattr(timing, "time", stopped)


@pytest.mark.parametrize("family", ["vit", "swin", "slim"])
def test_table_of_an_ideal_device_is_macs(ideal_device, tiny_spec, family):
    dense = {"vit": tiny_spec, "swin": TINY_SWIN, "slim": tiny_spec}[family]
    spec = dense
    if family == "slim":
        gated = flora.slim.add_gates(flora.create(dense))
        spec = flora.slim.cut_spec(dense, flora.slim.threshold(gated, attn=0.7, mlp=0.5, patch=0.6))
    space = flora.RankSpace.regular(spec, (1 / 8, 1 / 4, 1 / 2, 1))
    table = measure(space, BATCH, dense=dense, rounds=3)
    genes = space.sample(np.random.default_rng(0), 50)
    full_rank = space.full_rank_genes
    saved = table.cost(full_rank) - table.cost(genes)
    np.testing.assert_allclose(saved, BATCH * (space.macs(full_rank) - space.macs(genes)), atol=9)
    assert len(np.unique(saved)) > 20
    assert table.dense_ms == table.full_rank_ms or family == "slim"
    assert table.dense_ms >= table.full_rank_ms == table.cost(full_rank) / 1e6
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_networks_are_measured_in_turn(tiny_spec, dtype):
    specs = {"dense": tiny_spec, "subnet": tiny_spec.with_ranks((1,) * 6)}
    times = measure_networks(specs, BATCH, dtype, rounds=4)
    assert times.keys() == specs.keys()
    assert all(ms.shape == (4,) and (ms > 0).all() for ms in times.values())


def with_changes(table, space, of_choice):
    """The table with other changes: a function of the choice, counted down from the last."""
    changes = [map(of_choice, range(len(ranks) - 1, -1, -1)) for ranks in space.choices]
    return dataclasses.replace(table, change_ms=tuple(map(tuple, changes)))


@pytest.mark.slow
def test_search_spends_latency(tmp_path, capsys, monkeypatch):
    def measure_and_make_low_ranks_quick(space, *arguments, **options):
        """At this size a factor pair may be slower than the dense layer."""
        table = measure(space, *arguments, **options)
        step = table.dense_ms / 10 / space.num_layers
        return with_changes(table, space, lambda steps_down: -step * steps_down)

    monkeypatch.setattr("flora_jax.methods.shared.measure", measure_and_make_low_ranks_quick)
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
    table = LatencyTable("an engine", 16, "float32", 1.0, 1.0, ())
    slow = with_changes(table, tiny_space, lambda steps_down: -0.01 * (steps_down > 0))
    monkeypatch.setattr(shared, "measure", lambda *_, **__: slow)
    spending = Spending("latency", ((0.2, 0.3),))
    with pytest.raises(
        ValueError,
        match=r"\(0\.2, 0\.3\) cannot be reached: the space spans 0\.940\.\.1\.000 of the dense "
        r"model's 1\.00 ms on an engine",
    ):
        shared.measure_latency(None, tiny_space, tiny_space.spec, spending, 16, "float32")
