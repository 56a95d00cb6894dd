"""The filtering rule: exact price against brute force, sizes of the published spaces."""

import itertools
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_jax.flora.filter import budget_price, keep_candidates, keep_triples
from flora_jax.flora.space import RankSpace
from flora_jax.models.vit_spec import ViTSpec, deit

DATA = pathlib.Path(__file__).parent / "data"
TWO_BLOCKS = ViTSpec(image_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=1, num_classes=2)


@st.composite
def blocks(draw):
    """Scores and macs of two or three blocks, whole numbers so that comparisons are exact."""
    scores, macs = [], []
    for _ in range(draw(st.integers(2, 3))):
        size = draw(st.integers(1, 5))
        values = st.lists(st.integers(0, 20), min_size=size, max_size=size)
        scores.append(np.array(draw(values), float))
        macs.append(np.array(draw(values)))
    return scores, macs


def every_choice(scores, macs):
    """Total score and total macs of every way to pick one triple a block."""
    picks = itertools.product(*(range(len(score)) for score in scores))
    return np.array(
        [
            [sum(s[i] for s, i in zip(values, pick, strict=True)) for values in (scores, macs)]
            for pick in picks
        ]
    ).T


@given(blocks(), st.integers(0, 40))
def test_price_against_brute_force(case, spare):
    scores, macs = case
    score, cost = every_choice(scores, macs)
    budget = int(cost.min()) + spare
    price = budget_price(scores, macs, budget)
    assert price >= 0

    def dual(price):
        return np.max(score - price * (cost - budget))

    # The multiplier minimises the dual, which is convex with corners at slopes between choices.
    gaps = np.subtract.outer(cost, cost)
    corners = np.subtract.outer(score, score)[gaps > 0] / gaps[gaps > 0]
    assert dual(price) <= min(map(dual, [0, *corners[corners > 0]])) + 1e-9

    # The cheapest choice of the highest value at this price is the best one for its own cost.
    value = score - price * cost
    chosen = min(np.flatnonzero(value > value.max() - 1e-9), key=lambda i: cost[i])
    assert cost[chosen] <= budget
    assert score[chosen] == score[cost <= cost[chosen]].max()


@given(blocks(), st.integers(0, 40), st.integers(0, 40))
def test_price_falls_with_the_budget(case, spare, more):
    scores, macs = case
    least = sum(int(cost.min()) for cost in macs)
    price = budget_price(scores, macs, least + spare)
    assert budget_price(scores, macs, least + spare + more) <= price


def test_price_by_hand():
    scores, macs = [[0.0, 6.0, 8.0], [0.0, 3.0]], [[0, 10, 20], [5, 15]]
    # Steps of 0.6, 0.3 and 0.2 accuracy per MAC, ten MACs each, from 5 on.
    prices = [budget_price(scores, macs, budget) for budget in (5, 14, 15, 24, 25, 34, 35)]
    assert prices == pytest.approx([0.6, 0.6, 0.3, 0.3, 0.2, 0.2, 0])


def test_price_errors():
    with pytest.raises(ValueError, match="budget 4 is below the cheapest total, 5 MACs"):
        budget_price([[0.1, 0.2]], [[5, 6]], 4)
    with pytest.raises(ValueError, match="expected scores of 2 blocks, got 1"):
        budget_price([[0.1]], [[5], [5]], 20)
    with pytest.raises(ValueError, match="block 0 has scores of shape"):
        budget_price([[0.1]], [[5, 6]], 20)
    with pytest.raises(ValueError, match="block 0 has a score that is not finite"):
        budget_price([[np.nan]], [[5]], 20)


@pytest.mark.parametrize("size, ratios, kept", [("base", 7, 103), ("small", 6, 65)])
def test_published_sizes(size, ratios, kept):
    published = json.loads((DATA / f"published_filtered_space_deit_{size}.json").read_text())
    assert {len(triples) for triples in published} == {kept}
    table = json.loads((DATA / "macs_params_fullsize.json").read_text())[f"deit_{size}"]
    assert len(table["ratios"]) == ratios
    space = RankSpace.regular(deit(size), table["ratios"])
    rng = np.random.default_rng(0)
    scores = [rng.random(len(triples)) for triples in space.kept]
    filtered, _ = keep_candidates(space, scores, [space.spec.macs() // 2])
    assert {len(triples) for triples in filtered.kept} == {kept}
    as_published = space.keep(
        np.abs(np.array(triples)[..., None] - table["ratios"]).argmin(-1) for triples in published
    )
    assert {len(triples) for triples in as_published.kept} == {kept}


def test_released_subnet_lies_in_its_published_space():
    ratios = (1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 1)
    triples = json.loads((DATA / "published_filtered_space_deit_base.json").read_text())
    subnet = json.loads((DATA / "published_subnets.json").read_text())["deit_base"]
    space = RankSpace.regular(deit("base"), ratios)
    space = space.keep(np.searchsorted(ratios, block) for block in triples)
    genes = np.searchsorted(ratios, subnet["ratios_per_block"]).ravel()
    assert space.contains(genes)
    lo, hi = space.macs_range()
    assert lo <= subnet["macs"] <= hi


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.sampled_from([0.0, 0.3, 0.7, 0.99]),
)
def test_kept_triples_are_the_best_and_full_rank(rows, price, drop):
    score, macs = np.array(rows).T
    kept = keep_triples(score, macs, price, drop)
    full_rank = len(rows) - 1
    assert len(kept) == len(rows) - int(drop * len(rows))
    assert full_rank in kept
    assert kept.tolist() == sorted(set(kept.tolist()))
    value = score - price * macs
    keys = list(zip(-value, macs, strict=True))
    others = [keys[i] for i in kept if i != full_rank]
    dropped = [keys[i] for i in set(range(len(rows))) - set(kept.tolist())]
    if others and dropped:
        assert max(others) <= min(dropped)


def test_keep_triples_errors():
    with pytest.raises(ValueError, match=r"drop must lie in \[0, 1\), got 1"):
        keep_triples([1.0], [1], 0.0, drop=1)
    with pytest.raises(ValueError, match="block 0 has scores of shape"):
        keep_triples([1.0, 2.0], [1], 0.0)


def test_a_smaller_budget_keeps_cheaper_triples():
    space = RankSpace.regular(TWO_BLOCKS)
    scores = [np.log(1 + space.block_macs(b)) for b in range(2)]
    least, most = space.macs_range()
    tight, [high_price] = keep_candidates(space, scores, [least + (most - least) // 4])
    loose, [no_price] = keep_candidates(space, scores, [most])
    assert no_price == 0 < high_price
    for b in range(2):
        assert tight.block_macs(b).mean() < loose.block_macs(b).mean()
    for filtered in (tight, loose):
        assert filtered.contains(space.full_rank_genes)


def test_the_budget_is_that_of_the_whole_network():
    space = RankSpace.regular(TWO_BLOCKS)
    scores = [np.log(1 + space.block_macs(b)) for b in range(2)]
    budget = sum(space.macs_range()) // 2
    _, [price] = keep_candidates(space, scores, [budget])

    def macs_of_the_best(price):
        best = [np.argmax(scores[b] - price * space.block_macs(b)) for b in range(2)]
        return space.macs(np.concatenate([space.kept[b][i] for b, i in enumerate(best)]))

    assert macs_of_the_best(price * (1 + 1e-6)) <= budget < macs_of_the_best(price * (1 - 1e-6))


def test_keep_candidates_errors():
    space = RankSpace.regular(TWO_BLOCKS)
    scores = [np.zeros(343)] * 2
    least, _ = space.macs_range()
    with pytest.raises(ValueError, match=f"budget {least - 1} is below the least MACs .* {least}"):
        keep_candidates(space, scores, [least - 1])
    with pytest.raises(ValueError, match="expected scores of 2 blocks, got 1"):
        keep_candidates(space, scores[:1], [least])
    without_full_rank = space.keep([space.kept[0][:9], space.kept[1]])
    with pytest.raises(ValueError, match="keeps the full-rank triple of every block"):
        keep_candidates(without_full_rank, scores, [least])
