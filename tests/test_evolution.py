"""The evolutionary search: legal, distinct, better than chance, for one window and several."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_jax.flora.evolution import EvolutionSettings, read_history
from tests.helpers.searching import (
    FIRST,
    HIGHER,
    LEAST,
    MOST,
    OTHER_COST,
    SMALL,
    SPACE,
    TARGET,
    WINDOW,
    best_inside,
    closeness,
    metrics,
    search,
    unhurried,
)


def test_finds_better_than_random_draws(tmp_path):
    for seed in range(3):
        [best] = search(tmp_path / f"{seed}.jsonl", settings=EvolutionSettings(), seed=seed)
        draws = SPACE.sample_within(np.random.default_rng(seed), 1000, WINDOW)
        assert best.score > closeness(draws).max() + 0.02


def test_candidates_are_legal_distinct_and_recorded(tmp_path):
    scored, seen_generations = [], []

    def score(genes):
        assert genes.dtype == np.int32
        scored.append(genes)
        return metrics(genes)

    [best] = search(
        tmp_path / "new" / "history.jsonl",
        score,
        on_generation=lambda generation, members: seen_generations.append((generation, members)),
    )
    history = read_history(tmp_path / "new" / "history.jsonl")
    genes = np.array([candidate.genes for candidate in history])
    assert [len(batch) for batch in scored] == [8] * 4
    np.testing.assert_array_equal(genes, np.concatenate(scored))
    assert len(np.unique(genes, axis=0)) == len(genes)
    assert SPACE.contains(genes).all()
    macs = SPACE.macs(genes)
    assert WINDOW[0] <= macs.min() <= macs.max() <= WINDOW[1]
    assert [candidate.cost for candidate in history] == macs.tolist()
    assert [candidate.score for candidate in history] == metrics(genes)[0].tolist()
    assert [candidate.top1 for candidate in history] == metrics(genes)[1].tolist()
    assert [generation for generation, _ in seen_generations] == [0, 1, 2, 3]
    assert [member for _, members in seen_generations for member in members] == history
    assert best == best_inside(history, WINDOW)


@unhurried
@given(seed=st.integers(0, 2**32), touching=st.booleans(), with_first=st.booleans())
def test_serves_every_window(tmp_path_factory, seed, touching, with_first):
    path = tmp_path_factory.mktemp("windows") / "history.jsonl"
    border = int(SPACE.macs(TARGET))
    windows = [(LEAST, border), (border if touching else HIGHER[0], MOST)]
    first = np.concatenate([[TARGET], FIRST]) if with_first else None
    calls = []

    def score(genes):
        calls.append(len(genes))
        return metrics(genes)

    winners = search(path, score, windows=windows, seed=seed, first=first)
    history = read_history(path)
    genes = np.array([candidate.genes for candidate in history])
    assert winners == [best_inside(history, window) for window in windows]
    assert calls == [2 * SMALL.population] * SMALL.generations
    assert len(np.unique(genes, axis=0)) == len(genes)
    assert SPACE.contains(genes).all()
    for start in range(0, len(history), SMALL.population):
        lo, hi = windows[start // SMALL.population % 2]
        population = history[start : start + SMALL.population]
        assert all(lo <= candidate.cost <= hi for candidate in population)


def test_what_is_given_comes_first(tmp_path):
    path = tmp_path / "history.jsonl"
    search(path, windows=[WINDOW, HIGHER], first=FIRST)
    low, high = np.split(np.array([c.genes for c in read_history(path)])[:16], 2)
    np.testing.assert_array_equal(low, FIRST[5:13])
    np.testing.assert_array_equal(high[:3], FIRST[:3])
    assert not {tuple(FIRST[13])} & {c.genes for c in read_history(path)}


def test_children_may_have_a_parent_in_another_window(tmp_path):
    settings = EvolutionSettings(generations=2, population=8, parents=8, mutants=0, crossovers=8)
    path = tmp_path / "history.jsonl"
    search(path, windows=[WINDOW, HIGHER], settings=settings)
    low, high, children = np.split(
        np.array([c.genes for c in read_history(path)]).reshape(-1, SPACE.num_blocks, 3)[:24], 3
    )

    def found_in(parents):
        return (children[:, None] == parents).all(axis=-1).any(axis=1)

    assert (found_in(low) | found_in(high)).all()
    assert not found_in(low).all()


def test_any_cost_can_be_the_budget(tmp_path):
    least, most = OTHER_COST.range_over(SPACE.kept)
    window = (least + 0.3 * (most - least), least + 0.4 * (most - least))
    path = tmp_path / "history.jsonl"
    [best] = search(path, cost=OTHER_COST, windows=[window])
    candidates = read_history(path)
    assert len(candidates) == SMALL.generations * SMALL.population
    costs = OTHER_COST(np.array([candidate.genes for candidate in candidates]))
    assert window[0] <= costs.min() <= costs.max() <= window[1]
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
    change = {"space": space, "windows": [space.macs_range()], "settings": settings}
    winners = search(path, **change)
    history = read_history(path)
    assert len({candidate.genes for candidate in history}) == len(history) == 20
    content = path.read_bytes()
    assert search(path, None, **change) == winners
    assert path.read_bytes() == content


def test_an_exhausted_window_leaves_the_others_be(tmp_path):
    path, windows = tmp_path / "history.jsonl", [(LEAST, LEAST), WINDOW]
    cheapest, _ = search(path, windows=windows)
    assert cheapest.cost == LEAST
    per_generation = [candidate.generation for candidate in read_history(path)]
    assert [per_generation.count(generation) for generation in range(4)] == [9, 8, 8, 8]


@pytest.mark.parametrize(
    "windows, message",
    [
        ([(MOST + 1, MOST + 2)], "no kept genes found"),
        ([WINDOW, (MOST + 1, MOST + 2)], "no kept genes found"),
        ([], "ascend and not overlap"),
        ([HIGHER, WINDOW], "ascend and not overlap"),
        ([(LEAST, MOST), HIGHER], "ascend and not overlap"),
    ],
)
def test_impossible_windows_leave_no_history(tmp_path, windows, message):
    path = tmp_path / "history.jsonl"
    with pytest.raises(ValueError, match=message):
        search(path, windows=windows)
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
