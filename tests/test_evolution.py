"""The evolutionary search: legal, distinct, better than chance, and resumable bit for bit."""

import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_jax.lowrank.cost import Cost
from flora_jax.lowrank.space import RankSpace
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.search.evolution import (
    EvolutionSettings,
    cross_blocks,
    evolve,
    mutate,
)
from flora_jax.search.history import read_history

SPEC = ViTSpec(image_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)
REGULAR = RankSpace.regular(SPEC)
SPACE = REGULAR.keep(
    np.random.default_rng(block).choice(triples, 100, replace=False)
    for block, triples in enumerate(REGULAR.kept)
)
LEAST, MOST = SPACE.macs_range()
WINDOW = (LEAST + 0.4 * (MOST - LEAST), LEAST + 0.5 * (MOST - LEAST))
SMALL = EvolutionSettings(generations=4, population=8, parents=3, mutants=3, crossovers=3)
OTHER_COST = Cost("cells", 10, tuple(layer % 1000 for layer in SPACE.macs_cost.layers))
TARGET = SPACE.sample_within(np.random.default_rng(99), 1, WINDOW)[0]


def closeness(genes):
    """A made-up score: how near the ranks are to hidden ones."""
    return 1 - np.abs(SPACE.ranks(genes) - SPACE.ranks(TARGET)).mean(axis=-1) / 48


def metrics(genes):
    """Score and top1, which disagree about what is best."""
    return closeness(genes), 1 - closeness(genes)


def test_finds_better_than_random_draws(tmp_path):
    for seed in range(3):
        best = evolve(
            SPACE,
            metrics,
            SPACE.macs_cost,
            WINDOW,
            EvolutionSettings(),
            seed,
            tmp_path / f"{seed}.jsonl",
        )
        draws = SPACE.sample_within(np.random.default_rng(seed), 1000, WINDOW)
        assert best.score > closeness(draws).max() + 0.02


def test_candidates_are_legal_distinct_and_recorded(tmp_path):
    scored, seen_generations = [], []

    def score(genes):
        assert genes.dtype == np.int32
        scored.append(genes)
        return metrics(genes)

    best = evolve(
        SPACE,
        score,
        SPACE.macs_cost,
        WINDOW,
        SMALL,
        seed=0,
        history_path=tmp_path / "new" / "history.jsonl",
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
    assert best == max(history, key=lambda candidate: (candidate.score, -candidate.cost))


def test_any_cost_can_be_the_budget(tmp_path):
    least, most = OTHER_COST.range_over(SPACE.kept)
    window = (least + 0.3 * (most - least), least + 0.4 * (most - least))
    path = tmp_path / "history.jsonl"
    best = evolve(SPACE, metrics, OTHER_COST, window, SMALL, 0, path)
    candidates = read_history(path)
    assert len(candidates) == SMALL.generations * SMALL.population
    costs = OTHER_COST(np.array([candidate.genes for candidate in candidates]))
    assert window[0] <= costs.min() <= costs.max() <= window[1]
    assert [candidate.cost for candidate in candidates] == costs.tolist()
    assert best in candidates


def test_among_equals_the_cheaper_wins(tmp_path):
    path = tmp_path / "history.jsonl"
    best = evolve(
        SPACE,
        lambda genes: (np.full(len(genes), 0.5),) * 2,
        SPACE.macs_cost,
        WINDOW,
        SMALL,
        0,
        path,
    )
    assert best.cost == min(candidate.cost for candidate in read_history(path))


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
    best = evolve(SPACE, metrics, SPACE.macs_cost, WINDOW, SMALL, 7, path)
    return path.read_bytes(), best


@pytest.mark.parametrize("generations_left", range(5))
@pytest.mark.parametrize("tail", [b"", b"half", b'{"generation": 9, "genes": []}\n', b"\xff\0\n"])
def test_resumes_at_every_generation(tmp_path, whole_history, generations_left, tail, caplog):
    content, best = whole_history
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
        assert evolve(SPACE, score, SPACE.macs_cost, WINDOW, SMALL, 7, path) == best
    assert path.read_bytes() == content
    assert len(calls) == SMALL.generations - generations_left
    assert bool(caplog.records) == (tail != b"")


@given(st.data())
def test_resumes_after_a_cut_anywhere(tmp_path_factory, whole_history, data):
    content, best = whole_history
    path = tmp_path_factory.mktemp("cut") / "history.jsonl"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    assert evolve(SPACE, metrics, SPACE.macs_cost, WINDOW, SMALL, 7, path) == best
    assert path.read_bytes() == content


def test_reading_leaves_out_an_unfinished_line(tmp_path, whole_history):
    content, _ = whole_history
    path = tmp_path / "history.jsonl"
    path.write_bytes(content[:-1])
    assert [candidate.generation for candidate in read_history(path)] == [0] * 8 + [1] * 8 + [2] * 8
    assert path.read_bytes() == content[:-1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 8}, "seed 7 instead of 8"),
        ({"window": (LEAST, MOST)}, "window .* instead of"),
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
    path.write_bytes(whole_history[0])
    search = {"space": SPACE, "cost": SPACE.macs_cost, "window": WINDOW, "settings": SMALL}
    search |= {"seed": 7, **change}
    with pytest.raises(ValueError, match=f"belongs to another search .*{message}"):
        evolve(score=metrics, history_path=path, **search)
    assert path.read_bytes() == whole_history[0]


@pytest.mark.parametrize("content", [b"notes\n", b'{"a": 1}\n', b"[]\n"])
def test_refuses_other_files(tmp_path, content):
    path = tmp_path / "history.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not the history of a search"):
        evolve(SPACE, metrics, SPACE.macs_cost, WINDOW, SMALL, 7, path)
    assert path.read_bytes() == content


def test_stops_when_the_space_is_exhausted(tmp_path):
    space = SPACE.keep([SPACE.kept[0][:5], SPACE.kept[1][:4], SPACE.kept[2][:1], SPACE.kept[3][:1]])
    settings = EvolutionSettings(generations=9, population=8, parents=3, mutants=3, crossovers=3)
    path = tmp_path / "history.jsonl"
    best = evolve(space, metrics, space.macs_cost, space.macs_range(), settings, 0, path)
    history = read_history(path)
    assert len({candidate.genes for candidate in history}) == len(history) == 20
    content = path.read_bytes()
    assert evolve(space, None, space.macs_cost, space.macs_range(), settings, 0, path) == best
    assert path.read_bytes() == content


def test_impossible_window_leaves_no_history(tmp_path):
    path = tmp_path / "history.jsonl"
    with pytest.raises(ValueError, match="no kept genes found"):
        evolve(SPACE, metrics, SPACE.macs_cost, (MOST + 1, MOST + 2), SMALL, 0, path)
    assert not path.exists()


@pytest.mark.parametrize("scores", [np.zeros(3), np.full(8, np.nan)])
def test_bad_scores(tmp_path, scores):
    with pytest.raises(ValueError, match="score must return 8 finite numbers"):
        evolve(
            SPACE,
            lambda genes: (np.zeros(8), scores),
            SPACE.macs_cost,
            WINDOW,
            SMALL,
            0,
            tmp_path / "history.jsonl",
        )


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


def test_history_is_json_lines(whole_history):
    header, *lines = map(json.loads, whole_history[0].splitlines())
    assert header["search"]["seed"] == 7
    assert [set(line) for line in lines] == [{"generation", "genes", "cost", "score", "top1"}] * 4
