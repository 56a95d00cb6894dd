"""Ours in the search: successive halving, and allocated ranks to begin with and to beat."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_jax as flora
from flora_jax.flora.evolution import read_history
from flora_jax.flora.extras.halving import Contest, ImageScores, race, rungs_of
from flora_jax.flora.extras.warm_start import lead, nearest_kept, neighbours
from tests.helpers.searching import (
    HIGHER,
    LEAST,
    MOST,
    RANGE,
    REGULAR,
    SMALL,
    SPACE,
    TARGET,
    best_inside,
    search,
)
from tests.helpers.searching import closeness as mean_score

NUM_IMAGES = 240


def table_scores(table, batch=1, **change):
    """Scores of candidates whose only gene is their row in a table [P, n], in whole batches."""
    num_images = table.shape[1]

    def of(genes, start, stop):
        assert start % batch == 0
        assert len(genes)
        rows = table[genes[:, 0], start : -(-stop // batch) * batch]
        return rows, rows > 0

    return ImageScores(of, num_images, rungs_of(num_images), **change)


def genes_of(table):
    return np.arange(len(table), dtype=np.int32)[:, None]


def contest(entrants, rivals=None):
    return Contest(np.asarray(entrants), np.empty((0, NUM_IMAGES)) if rivals is None else rivals)


@st.composite
def fields(draw, noise):
    """Scores on each image of new candidates and of rivals, and how many places there are."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, num_rivals = draw(st.integers(1, 12)), draw(st.integers(0, 6))
    levels = rng.integers(0, 8, count + num_rivals)[:, None] / 8  # with equals among them
    hard = rng.normal(size=NUM_IMAGES)  # as images are, to all alike
    table = levels + hard + noise * rng.normal(size=(len(levels), NUM_IMAGES))
    return table[:count], table[count:], draw(st.integers(1, 6))


@given(fields(noise=0.0))
def test_without_noise_those_below_the_last_place_are_out_at_once(field):
    table, rivals, places = field
    raced = race(
        table_scores(table), genes_of(table), [contest([True] * len(table), rivals)], places
    )
    means = np.concatenate([table, rivals]).mean(axis=1)
    last = np.sort(means)[::-1][min(places, len(means)) - 1]
    is_behind = table.mean(axis=1) < last - 1e-9
    np.testing.assert_array_equal(raced.num_seen, np.where(is_behind, rungs_of(240)[0], NUM_IMAGES))


@given(fields(noise=1.0), st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([7, 30, 64, 240]))
def test_who_has_seen_all_is_scored_as_ever(field, deviations, batch):
    """So survivors rank as they would, and batches change nothing."""
    table, rivals, places = field
    everyone = [contest([True] * len(table), rivals)]
    raced = race(table_scores(table, deviations=deviations), genes_of(table), everyone, places)
    has_seen_all = raced.num_seen == NUM_IMAGES
    np.testing.assert_allclose(raced.score[has_seen_all], table[has_seen_all].mean(axis=1))
    np.testing.assert_allclose(raced.shown[has_seen_all], (table > 0)[has_seen_all].mean(axis=1))
    for number, row, score in zip(raced.num_seen, table, raced.score, strict=True):
        assert number in rungs_of(NUM_IMAGES)
        assert score == pytest.approx(row[:number].mean())
    assert has_seen_all.sum() + len(rivals) >= min(places, len(table) + len(rivals))
    np.testing.assert_array_equal(np.isfinite(raced.of_images).all(axis=1), has_seen_all)
    in_batches = table_scores(table, batch, deviations=deviations)
    again = race(in_batches, genes_of(table), everyone, places)
    np.testing.assert_array_equal(again.num_seen, raced.num_seen)
    np.testing.assert_array_equal(again.score, raced.score)


@given(fields(noise=1.0))
def test_nobody_is_out_where_everything_can_be_made_up(field):
    table, rivals, places = field
    scores = table_scores(table, deviations=1e9)
    raced = race(scores, genes_of(table), [contest([True] * len(table), rivals)], places)
    behind = (table - np.concatenate([table, rivals])[:, None]).std(axis=2)
    assert (raced.num_seen[behind.max(axis=0) > 0] == NUM_IMAGES).all()


def test_a_place_in_any_contest_is_enough():
    table = np.array([[0.0], [1.0], [2.0]]) + np.zeros(NUM_IMAGES)
    contests = [contest([True, True, False], table[2:]), contest([True, False, False])]
    raced = race(table_scores(table), genes_of(table), contests, 1)
    assert raced.num_seen.tolist() == [NUM_IMAGES, 30, 30]


@pytest.mark.parametrize(
    "num_images, rungs",
    [
        (1, (1,)),
        (59, (30, 59)),
        (100, (50, 100)),
        (269, (34, 68, 135, 269)),
        (719, (45, 90, 180, 360, 719)),
        (12_800, (400, 800, 1600, 3200, 6400, 12_800)),
    ],
)
def test_rungs_are_shares_of_the_images_but_never_a_few(num_images, rungs):
    assert rungs_of(num_images) == rungs


def noisy(genes, start, stop):
    """About the made-up score, image by image, always the same; the first images flatter."""
    images = np.arange(start, stop)
    phase = genes.astype(float) @ np.linspace(1, 7, genes.shape[1])
    noise = np.sin(phase[:, None] * (images + 1) ** 1.5)
    score = mean_score(genes)[:, None] + 0.05 * noise + (images < NUM_IMAGES // 4)
    return score, noise


HALVED = {"scores": ImageScores(noisy, NUM_IMAGES, rungs_of(NUM_IMAGES))}
RANGES = {"ranges": [RANGE, HIGHER]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("halved") / "history.jsonl"
    return search(path, **HALVED, **RANGES), path.read_bytes(), read_history(path)


def test_a_part_of_the_images_wins_nothing(finished):
    winners, _, history = finished
    seen_all = [candidate for candidate in history if candidate.has_seen_all]
    assert winners == [best_inside(seen_all, bounds) for bounds in (RANGE, HIGHER)]
    stopped = [candidate for candidate in history if not candidate.has_seen_all]
    assert 0.2 < len(stopped) / len(history) < 0.9
    assert min(c.score for c in stopped) > max(winner.score for winner in winners)
    for candidate in history:
        genes, seen = np.array([candidate.genes]), round(candidate.share * NUM_IMAGES)
        score, noise = noisy(genes, 0, seen)
        assert seen in rungs_of(NUM_IMAGES)
        assert candidate.score == pytest.approx(score.mean())
        assert candidate.top1 == pytest.approx(noise.mean())


@settings(max_examples=25)
@given(st.data())
def test_goes_on_after_a_cut_anywhere(tmp_path_factory, finished, data):
    winners, content, _ = finished
    path = tmp_path_factory.mktemp("cut") / "history.jsonl"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    assert search(path, **HALVED, **RANGES) == winners
    assert path.read_bytes() == content


def test_a_search_that_goes_on_scores_its_parents_again_and_nothing_else(tmp_path, finished):
    _, content, history = finished
    path, scored = tmp_path / "history.jsonl", []

    def of(genes, start, stop):
        scored.extend(map(tuple, genes.tolist()))
        return noisy(genes, start, stop)

    path.write_bytes(b"".join(content.splitlines(keepends=True)[:3]))
    scores = dataclasses.replace(HALVED["scores"], of=of)
    search(path, scores=scores, **RANGES)
    before = {candidate.genes for candidate in history if candidate.generation < 2}
    again = [genes for genes in scored if genes in before]
    assert 0 < len(again) == len(set(again)) <= 2 * SMALL.parents


@pytest.mark.parametrize(
    "change", [{"rungs": (NUM_IMAGES,)}, {"deviations": 2.0}, {"rungs": rungs_of(NUM_IMAGES)[1:]}]
)
def test_refuses_a_history_that_stops_by_another_rule(tmp_path, finished, change):
    path = tmp_path / "history.jsonl"
    path.write_bytes(finished[1])
    with pytest.raises(ValueError, match=r"belongs to another search \(halving"):
        search(path, scores=dataclasses.replace(HALVED["scores"], **change), **RANGES)


def test_a_history_of_before_says_how_it_goes_on(tmp_path):
    path = tmp_path / "history.jsonl"
    whole = dataclasses.replace(HALVED["scores"], rungs=(NUM_IMAGES,))
    winners, content = search(path, scores=whole, **RANGES), path.read_bytes()
    assert "halving" not in json.loads(content.splitlines()[0])["search"]
    with pytest.raises(ValueError, match=r"halving None .* goes on with halving set to False"):
        search(path, **HALVED, **RANGES)
    path.write_bytes(content[: len(content) // 2])
    assert search(path, scores=whole, **RANGES) == winners


def test_only_generations_with_someone_out_say_how_far_each_came(finished):
    for line in map(json.loads, finished[1].splitlines()[1:]):
        assert ("share" in line) == (min(line.get("share", [1])) < 1)


@pytest.mark.parametrize("bad", [np.zeros((8, 29)), np.full((8, 30), np.inf), np.zeros(8)])
def test_bad_scores_of_images(tmp_path, bad):
    scores = dataclasses.replace(HALVED["scores"], of=lambda *_: (np.zeros((8, 30)), bad))
    with pytest.raises(ValueError, match=r"score must return 8 finite numbers .* images 0\.\.30"):
        search(tmp_path / "history.jsonl", scores=scores)


@pytest.mark.parametrize(
    "mean, spread, is_sure",
    [
        (0.2, 0.1, True),
        (0.04, 0.4, False),  # 1.5 standard errors, which is luck
        (0.0, 0.0, False),
    ],
)
def test_a_search_is_ahead_where_it_is_so_by_two_standard_errors(mean, spread, is_sure):
    searched, allocated = SPACE.sample_within(np.random.default_rng(3), 2, RANGE)
    noise = np.random.default_rng(3).normal(size=NUM_IMAGES)
    difference = mean + spread * (noise - noise.mean()) / noise.std()

    def of(genes, start, stop):
        rows = np.stack([difference * (row == searched).all() - 1 for row in genes])
        return rows[:, start:stop], rows[:, start:stop] > -1

    found = lead(ImageScores(of, NUM_IMAGES, (NUM_IMAGES,)), searched, allocated)
    error = 2 * difference.std() / NUM_IMAGES**0.5
    assert found.ahead == pytest.approx((mean, mean - error, mean + error))
    assert (found.is_sure, found.score, found.shown) == (is_sure, -1, 0)


def test_the_nearest_kept_triples():
    space = REGULAR.keep([[(0, 0, 1), (3, 3, 1)], [(1, 0, 0), (0, 0, 1)], [(2, 2, 2)], [(6, 6, 6)]])
    found = nearest_kept(space, [2, 2, 1, 0, 0, 0, 6, 6, 6, 6, 6, 6])
    # In block 1 both are one step away, and qkv's costs less than fc2's.
    assert found.tolist() == [3, 3, 1, 1, 0, 0, 2, 2, 2, 6, 6, 6]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(nearest_kept(space, found), found)


@given(st.integers(0, 2**32), st.integers(1, 40))
def test_neighbours_are_kept_and_near(seed, count):
    rng = np.random.default_rng(seed)
    genes = REGULAR.sample(rng, 1)[0]
    start = nearest_kept(SPACE, genes)
    found = neighbours(SPACE, genes, count, rng)
    assert found.shape == (count, SPACE.num_layers)
    assert found.dtype == np.int32
    assert len(np.unique(found, axis=0)) == count
    assert SPACE.contains(found).all()
    changed = (found != start).reshape(count, -1, 3).any(axis=-1).sum(axis=1)
    assert np.isin(changed, [1, 2]).all()
    assert np.abs(SPACE.macs(found) - SPACE.macs(start)).mean() < 0.02 * (MOST - LEAST)


def test_a_point_has_no_neighbours():
    point = SPACE.keep(triples[:1] for triples in SPACE.kept)
    assert neighbours(point, TARGET, 5, np.random.default_rng(0)).shape == (0, 12)


def test_the_first_parts_are_fair_samples_of_sorted_images():
    labels = np.repeat(np.arange(4), 50)
    images = np.repeat(labels.astype(np.uint8), 12).reshape(-1, 2, 2, 3)
    parts = flora.ImageSet(images, labels).in_parts(rungs_of(200)[0])
    assert len(parts.is_image_of) == 4  # none is compared on fewer than 30
    assert np.bincount(parts.labels[: rungs_of(200)[0]], minlength=4).min() >= 5
    assert np.bincount(parts.labels).tolist() == [50] * 4
