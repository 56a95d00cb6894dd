"""The latency table: what it measures, and the search that spends it."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest
from flora_jax.stages.budget import load_budgets, load_latency_table
from flora_jax.stages.names import FLORA_STAGES
from flora_jax.stages.run import Run, load_space
from flora_jax.stages.search import search

import flora_jax as flora
from flora_jax import pipeline, timing
from flora_jax.configs import deit_t
from flora_jax.flora.evolution import read_history
from flora_jax.flora.extras import latency
from flora_jax.flora.extras.latency import LatencyTable, measure, measure_networks
from flora_jax.models.swin_spec import SwinSpec
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings

BATCH = 3
SWIN = SwinSpec(
    image_size=16,
    patch_size=2,
    embed_dim=8,
    depths=(2, 2),
    num_heads=(1, 2),
    window_size=4,
    num_classes=3,
)


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
    dense = {"vit": tiny_spec, "swin": SWIN, "slim": tiny_spec}[family]
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


STAGES_OF_TEST = tuple(name for name in FLORA_STAGES if name != "finetune")


def latency_run(finished_run, folder, **changes) -> Run:
    """A copy of the finished run up to its search, which will spend latency."""
    config = deit_t.get_config("runlocal")
    # Full rank is inside any window up to 1, however slow factors are at this size.
    changes = {"budget.latency": (0.01, 1.0), "search.budget": "latency"} | changes
    config.update_from_flattened_dict({"stages": STAGES_OF_TEST, **changes})
    for name in ("dense", "supernet", "filter"):
        shutil.copytree(finished_run / name, folder / name)
    done = {name: {"seconds": 1} for name in ("pretrain", "filter", "supernet")}
    (folder / "stages.json").write_text(json.dumps(done))
    return Run(Settings.from_config(config), folder)


@pytest.mark.slow
def test_search_spends_latency(finished_run, tmp_path, capsys, monkeypatch):
    run = latency_run(finished_run, tmp_path / "run", **{"budget.latency": (0.3, 0.9)})

    def measure_and_make_low_ranks_quick(space, *arguments, **options):
        """At this size a factor pair may be slower than the dense layer."""
        table = measure(space, *arguments, **options)
        step = table.dense_ms / 10 / space.num_layers
        quick = tuple(
            tuple(step * (r - len(ranks) + 1) for r in range(len(ranks))) for ranks in space.choices
        )
        return dataclasses.replace(table, change_ms=quick)

    monkeypatch.setattr("flora_jax.stages.budget.measure", measure_and_make_low_ranks_quick)
    pipeline.run(run.settings.to_config(), run.folder)
    table, space = load_latency_table(run), load_space(run)
    candidates = read_history(run.folder / "search/history.jsonl")
    costs = table.cost(np.array([candidate.genes for candidate in candidates]))
    assert [candidate.cost for candidate in candidates] == costs.tolist()
    [budget] = load_budgets(run)
    low, high = budget.window
    assert low <= costs.min() <= costs.max() <= high

    best = json.loads((run.folder / "search/best.json").read_text())
    assert best["macs"] == space.macs(best["genes"])
    predicted, measured = (best["latency"][f"{how}_share"] for how in ("predicted", "measured"))
    assert predicted == pytest.approx(table.cost(np.array(best["genes"])) / 1e6 / table.dense_ms)
    assert best["latency"]["error"] == pytest.approx(predicted / measured - 1)
    result = json.loads((run.folder / "result.json").read_text())
    assert result["dense"]["ms"] == pytest.approx(table.dense_ms)
    assert result["subnet"]["ms"] > 0
    assert "fewer ms" in capsys.readouterr().out
    uniform = flora.load(run.folder / "extract/uniform").spec
    assert uniform.macs() <= best["macs"]

    # A search that was interrupted goes on with the table that it began with.
    whole = (run.folder / "search/history.jsonl").read_bytes()
    table_file = (run.folder / "search/latency.json").read_bytes()
    first_lines = b"".join(whole.splitlines(keepends=True)[:2])
    (run.folder / "search/history.jsonl").write_bytes(first_lines)
    search(run, Images(run.settings))
    assert (run.folder / "search/latency.json").read_bytes() == table_file
    assert (run.folder / "search/history.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_unreachable_latency(finished_run, tmp_path):
    run = latency_run(finished_run, tmp_path / "run", **{"budget.latency": (0.2, 0.3)})
    changes = tuple((-0.01,) * (len(ranks) - 1) + (0.0,) for ranks in load_space(run).choices)
    table = LatencyTable("an engine", 16, "float32", 1.0, 1.0, changes)
    (run.folder / "search").mkdir()
    (run.folder / "search/latency.json").write_text(json.dumps(table.to_json()))
    with pytest.raises(
        ValueError,
        match=r"\(0\.2, 0\.3\) cannot be reached: the space spans 0\.940\.\.1\.000 of the dense "
        r"model's 1\.00 ms on an engine",
    ):
        search(run, Images(run.settings))
    assert not (run.folder / "search/history.jsonl").exists()
