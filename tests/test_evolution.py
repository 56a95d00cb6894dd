"""The evolutionary search: legal, distinct, better than chance; it goes on bit for bit."""

import contextlib
import hashlib
import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_jax.flora.evolution import EvolutionSettings, cross_blocks, mutate, read_history
from tests.helpers.searching import (
    FIRST,
    HIGHER,
    LEAST,
    MOST,
    OTHER_COST,
    RANGE,
    REGULAR,
    SMALL,
    SPACE,
    TARGET,
    best_inside,
    closeness,
    metrics,
    search,
)


def test_finds_better_than_random_draws(tmp_path):
    for seed in range(3):
        [best] = search(tmp_path / f"{seed}.jsonl", settings=EvolutionSettings(), seed=seed)
        draws = SPACE.sample_within(np.random.default_rng(seed), 1000, RANGE)
        assert best.score > closeness(draws).max() + 0.02


def test_candidates_are_legal_distinct_and_recorded(tmp_path):
    scored, written = [], []

    def score(genes):
        assert genes.dtype == np.int32
        scored.append(genes)
        return metrics(genes)

    def watch(start):
        assert start == 0
        return contextlib.nullcontext(written.extend)

    [best] = search(tmp_path / "new" / "history.jsonl", score, watch=watch)
    history = read_history(tmp_path / "new" / "history.jsonl")
    genes = np.array([candidate.genes for candidate in history])
    assert [len(batch) for batch in scored] == [8] * 4
    np.testing.assert_array_equal(genes, np.concatenate(scored))
    assert len(np.unique(genes, axis=0)) == len(genes)
    assert SPACE.contains(genes).all()
    macs = SPACE.macs(genes)
    assert RANGE[0] <= macs.min() <= macs.max() <= RANGE[1]
    assert [candidate.cost for candidate in history] == macs.tolist()
    assert [candidate.score for candidate in history] == metrics(genes)[0].tolist()
    assert [candidate.top1 for candidate in history] == metrics(genes)[1].tolist()
    best_shown = np.maximum.accumulate([metrics(batch)[1].max() for batch in scored]).tolist()
    assert written == [{"step": i, "best_top1": top1} for i, top1 in enumerate(best_shown)]
    assert best == best_inside(history, RANGE)


@given(seed=st.integers(0, 2**32), touching=st.booleans(), with_first=st.booleans())
def test_serves_every_range(tmp_path_factory, seed, touching, with_first):
    path = tmp_path_factory.mktemp("ranges") / "history.jsonl"
    border = int(SPACE.macs(TARGET))
    ranges = [(LEAST, border), (border if touching else HIGHER[0], MOST)]
    first = np.concatenate([[TARGET], FIRST]) if with_first else None
    calls = []

    def score(genes):
        calls.append(len(genes))
        return metrics(genes)

    winners = search(path, score, ranges=ranges, seed=seed, first=first)
    history = read_history(path)
    genes = np.array([candidate.genes for candidate in history])
    assert winners == [best_inside(history, bounds) for bounds in ranges]
    assert calls == [2 * SMALL.population] * SMALL.generations
    assert len(np.unique(genes, axis=0)) == len(genes)
    assert SPACE.contains(genes).all()
    for start in range(0, len(history), SMALL.population):
        lo, hi = ranges[start // SMALL.population % 2]
        population = history[start : start + SMALL.population]
        assert all(lo <= candidate.cost <= hi for candidate in population)


def test_what_is_given_comes_first(tmp_path):
    path = tmp_path / "history.jsonl"
    search(path, ranges=[RANGE, HIGHER], first=FIRST)
    low, high = np.split(np.array([c.genes for c in read_history(path)])[:16], 2)
    np.testing.assert_array_equal(low, FIRST[5:13])
    np.testing.assert_array_equal(high[:3], FIRST[:3])
    assert not {tuple(FIRST[13])} & {c.genes for c in read_history(path)}


def test_children_may_have_a_parent_in_another_window(tmp_path):
    settings = EvolutionSettings(generations=2, population=8, parents=8, mutants=0, crossovers=8)
    path = tmp_path / "history.jsonl"
    search(path, ranges=[RANGE, HIGHER], settings=settings)
    low, high, children = np.split(
        np.array([c.genes for c in read_history(path)]).reshape(-1, SPACE.num_blocks, 3)[:24], 3
    )

    def found_in(parents):
        return (children[:, None] == parents).all(axis=-1).any(axis=1)

    assert (found_in(low) | found_in(high)).all()
    assert not found_in(low).all()


def test_any_cost_can_be_the_budget(tmp_path):
    least, most = OTHER_COST.range_over(SPACE.kept)
    bounds = (least + 0.3 * (most - least), least + 0.4 * (most - least))
    path = tmp_path / "history.jsonl"
    [best] = search(path, cost=OTHER_COST, ranges=[bounds])
    candidates = read_history(path)
    assert len(candidates) == SMALL.generations * SMALL.population
    costs = OTHER_COST(np.array([candidate.genes for candidate in candidates]))
    assert bounds[0] <= costs.min() <= costs.max() <= bounds[1]
    assert [candidate.cost for candidate in candidates] == costs.tolist()
    assert best in candidates


def test_among_equals_the_cheaper_wins(tmp_path):
    path = tmp_path / "history.jsonl"
    [best] = search(path, lambda genes: (np.full(len(genes), 0.5),) * 2)
    assert best.cost == min(candidate.cost for candidate in read_history(path))


def test_stops_when_the_space_is_exhausted(tmp_path):
    space = SPACE.keep([SPACE.kept[0][:5], SPACE.kept[1][:4], SPACE.kept[2][:1], SPACE.kept[3][:1]])
    settings = EvolutionSettings(generations=9, population=8, parents=3, mutants=3, crossovers=3)
    path = tmp_path / "history.jsonl"
    change = {"space": space, "ranges": [space.macs_range()], "settings": settings}
    winners = search(path, **change)
    history = read_history(path)
    assert len({candidate.genes for candidate in history}) == len(history) == 20
    content = path.read_bytes()
    assert search(path, None, **change) == winners
    assert path.read_bytes() == content


def test_an_exhausted_range_leaves_the_others_be(tmp_path):
    path, ranges = tmp_path / "history.jsonl", [(LEAST, LEAST), RANGE]
    cheapest, _ = search(path, ranges=ranges)
    assert cheapest.cost == LEAST
    per_generation = [candidate.generation for candidate in read_history(path)]
    assert [per_generation.count(generation) for generation in range(4)] == [9, 8, 8, 8]


@pytest.mark.parametrize(
    "ranges, message",
    [
        ([(MOST + 1, MOST + 2)], "no kept genes found"),
        ([RANGE, (MOST + 1, MOST + 2)], "no kept genes found"),
        ([], "ascend and not overlap"),
        ([HIGHER, RANGE], "ascend and not overlap"),
        ([(LEAST, MOST), HIGHER], "ascend and not overlap"),
    ],
)
def test_impossible_ranges_leave_no_history(tmp_path, ranges, message):
    path = tmp_path / "history.jsonl"
    with pytest.raises(ValueError, match=message):
        search(path, ranges=ranges)
    assert not path.exists()


@pytest.mark.parametrize("scores", [np.zeros(3), np.full(8, np.nan)])
def test_bad_scores(tmp_path, scores):
    with pytest.raises(ValueError, match="score must return 8 finite numbers"):
        search(tmp_path / "history.jsonl", lambda genes: (np.zeros(8), scores))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"generations": 0}, "generations must be at least 1, got 0"),
        ({"mutants": -1}, "mutants must be at least 0"),
        ({"parents": 51}, "51 parents exceed the population of 50"),
        ({"mutants": 26}, "26 mutants and 25 crossovers exceed the population of 50"),
        ({"mutation_probability": 0}, r"mutation_probability must lie in \(0, 1\], got 0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        EvolutionSettings(**change)


@given(st.integers(0, 2**32))
def test_crossover_takes_whole_blocks(seed):
    rng = np.random.default_rng(seed)
    mothers, fathers = SPACE.sample(rng, 16), SPACE.sample(rng, 16)
    children = cross_blocks(rng, mothers, fathers)
    blocks = [genes.reshape(16, SPACE.num_blocks, 3) for genes in (children, mothers, fathers)]
    from_mother, from_father = ((blocks[0] == parent).all(axis=-1) for parent in blocks[1:])
    assert (from_mother | from_father).all()
    assert SPACE.contains(children).all()
    assert 0 < from_mother.mean() < 1


def test_mutants_redraw_blocks_at_the_given_rate():
    rng = np.random.default_rng(0)
    parents = SPACE.sample(rng, 5000)
    mutants = mutate(rng, SPACE, parents, 0.2)
    assert SPACE.contains(mutants).all()
    changed = (mutants != parents).reshape(5000, SPACE.num_blocks, 3).any(axis=-1).mean()
    assert changed == pytest.approx(0.2 * 0.99, abs=0.01)  # one draw in a hundred is the old one
    np.testing.assert_array_equal(mutate(rng, SPACE, parents, 0.0), parents)


@pytest.fixture(scope="module")
def whole_history(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "history.jsonl"
    search(path)
    return path.read_bytes()


@pytest.fixture(scope="module", params=[{}, {"ranges": [RANGE, HIGHER], "first": FIRST}])
def finished(tmp_path_factory, request):
    """A finished search: what is unusual in it, its history, its winners."""
    path = tmp_path_factory.mktemp("finished") / "history.jsonl"
    winners = search(path, **request.param)
    return request.param, path.read_bytes(), winners


@pytest.mark.parametrize("generations_left", range(5))
@pytest.mark.parametrize("tail", [b"", b"half", b'{"generation": 9, "genes": []}\n', b"\xff\0\n"])
def test_resumes_at_every_generation(tmp_path, finished, generations_left, tail, caplog):
    change, content, winners = finished
    lines = content.splitlines(keepends=True)
    path = tmp_path / "history.jsonl"
    if tail == b"half":
        tail = b"".join(lines[1 + generations_left :])[:40]
    path.write_bytes(b"".join(lines[: 1 + generations_left]) + tail)
    calls = []

    def score(genes):
        calls.append(len(genes))
        return metrics(genes)

    with caplog.at_level(logging.WARNING):
        assert search(path, score, **change) == winners
    assert path.read_bytes() == content
    assert len(calls) == SMALL.generations - generations_left
    assert bool(caplog.records) == (tail != b"")


@given(st.data())
def test_resumes_after_a_cut_anywhere(tmp_path_factory, finished, data):
    change, content, winners = finished
    path = tmp_path_factory.mktemp("cut") / "history.jsonl"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    assert search(path, **change) == winners
    assert path.read_bytes() == content


def test_one_range_is_searched_as_ever(whole_history):
    """Histories of versions that knew one range only must go on; this was recorded with one."""
    header, generations = whole_history.split(b"\n", 1)
    assert list(json.loads(header)["search"]) == [
        *("seed", "unit", "window", "settings", "space", "costs")
    ]
    assert json.loads(header)["search"]["window"] == list(RANGE)
    assert hashlib.sha256(generations).hexdigest() == (
        "0ef79e76afe3c7ccbd3cce3af562098fdb9587f1ef3bb4724b1c07cad108d5ff"
    )


def test_reading_leaves_out_an_unfinished_line(tmp_path, whole_history):
    path = tmp_path / "history.jsonl"
    path.write_bytes(whole_history[:-1])
    assert [candidate.generation for candidate in read_history(path)] == [0] * 8 + [1] * 8 + [2] * 8
    assert path.read_bytes() == whole_history[:-1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 8}, "seed 7 instead of 8"),
        ({"ranges": [(LEAST, MOST)]}, "window .* instead of"),
        ({"ranges": [RANGE, HIGHER]}, r"window .* instead of \[\["),
        ({"first": FIRST}, "first None instead of"),
        ({"cost": OTHER_COST}, "costs .* instead of .*, unit MACs instead of cells"),
        (
            {"settings": EvolutionSettings()},
            r"settings\.crossovers 3 instead of 25, settings\.generations",
        ),
        ({"space": REGULAR}, "space .* instead of"),
    ],
)
def test_refuses_the_history_of_another_search(tmp_path, whole_history, change, message):
    path = tmp_path / "history.jsonl"
    path.write_bytes(whole_history)
    with pytest.raises(ValueError, match=f"belongs to another search .*{message}"):
        search(path, **change)
    assert path.read_bytes() == whole_history


@pytest.mark.parametrize("content", [b"notes\n", b'{"a": 1}\n', b"[]\n"])
def test_refuses_other_files(tmp_path, content):
    path = tmp_path / "history.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not the history of a search"):
        search(path)
    assert path.read_bytes() == content


def test_history_is_json_lines(whole_history):
    header, *lines = map(json.loads, whole_history.splitlines())
    assert header["search"]["seed"] == 7
    assert [set(line) for line in lines] == [{"generation", "genes", "cost", "score", "top1"}] * 4
