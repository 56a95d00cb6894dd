"""Random draws of genes: laws, windows, and the uniform ranks of a budget."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.flora import window
from flora_jax.flora.space import RankSpace
from flora_jax.models.vit_spec import ViTSpec, deit

MICRO = ViTSpec(image_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10)


ONE_BLOCK = ViTSpec(image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1, num_classes=2)


TWO_BLOCKS = ViTSpec(image_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=1, num_classes=2)


@pytest.fixture(scope="module")
def base_space():
    return RankSpace.regular(deit("base"))


@pytest.mark.parametrize("law", ["uniform", "low_rank_aware"])
def test_laws(law):
    ratios = (1 / 4, 1 / 2, 1)
    space = RankSpace.regular(TWO_BLOCKS, ratios)
    kept = space.kept[1][[0, 5, 13, 26]]
    space = space.keep([space.kept[0], kept])
    n = 20_000
    genes = space.sample(np.random.default_rng(0), n, law=law)
    assert genes.shape == (n, 6)
    assert genes.dtype == np.int32
    assert space.contains(genes).all()
    for block, triples in enumerate(space.kept):
        weights = 1 / np.array(ratios)[triples].prod(axis=1)
        if law == "uniform":
            weights = np.ones(len(triples))
        expected = weights / weights.sum()
        drawn = (genes[:, None, 3 * block : 3 * block + 3] == triples).all(-1).mean(axis=0)
        assert np.all(np.abs(drawn - expected) < 5 * np.sqrt(expected / n))


def test_unknown_law():
    with pytest.raises(ValueError, match=r"unknown law 'low_rank'.*did you mean 'low_rank_aware'"):
        RankSpace.regular(ONE_BLOCK).sample(np.random.default_rng(0), 1, law="low_rank")


def all_genes(space):
    return np.array([np.concatenate(t) for t in itertools.product(*space.kept)])


@st.composite
def spaces(draw):
    """Two blocks with up to five kept triples each, in cells of one MAC or very coarse."""
    space = RankSpace.regular(TWO_BLOCKS, (1 / 8, 3 / 8, 1))
    triples = st.lists(st.integers(0, 26), min_size=1, max_size=5, unique=True)
    return space.keep([space.kept[0][draw(triples)], space.kept[1][draw(triples)]])


@given(spaces(), st.data(), st.sampled_from([2**17, 40]))
@settings(deadline=None, max_examples=150)
def test_windows(space, data, max_cells):
    lo, hi = space.macs_range()
    bounds = st.integers(lo - 50, hi + 50)
    lo, hi = sorted([data.draw(bounds), data.draw(bounds)])
    macs = space.macs(all_genes(space))
    legal = (lo <= macs) & (macs <= hi)
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "_MAX_CELLS", max_cells)
        is_exact = space._window_sampler._rounded_off == 0
        try:
            genes = space.sample_within(rng, 20, (lo, hi))
        except ValueError as error:
            assert not (is_exact and legal.any())
            nearest = int(str(error).split("costs ")[1].split(";")[0])
            assert nearest in macs
            if is_exact:
                distance = np.maximum(lo - macs, macs - hi)
                assert max(lo - nearest, nearest - hi) == distance.min()
        else:
            assert space.contains(genes).all()
            drawn = space.macs(genes)
            assert ((lo <= drawn) & (drawn <= hi)).all()


def test_draws_within_a_window_are_uniform():
    space = RankSpace.regular(TWO_BLOCKS, (3 / 8, 1))
    genes = all_genes(space)
    macs = space.macs(genes)
    lo, hi = np.quantile(macs, [0.3, 0.8])
    assert_uniform_over(genes[(lo <= macs) & (macs <= hi)], space, (lo, hi))


def test_coarse_cells_lose_no_more_than_a_strip(monkeypatch):
    monkeypatch.setattr(window, "_MAX_CELLS", 15)
    space = RankSpace.regular(TWO_BLOCKS, (3 / 8, 1))
    strip = space._window_sampler._rounded_off
    assert strip > 0
    genes = all_genes(space)
    macs = space.macs(genes)
    assert_uniform_over(genes, space, space.macs_range())
    lo, hi = np.quantile(macs, [0.2, 0.9])
    drawn = space.sample_within(np.random.default_rng(0), 2000, (lo, hi))
    far_inside = genes[(lo + strip <= macs) & (macs <= hi - strip)]
    assert len(far_inside) > 0
    assert {*map(tuple, far_inside.tolist())} <= {*map(tuple, drawn.tolist())}


def assert_uniform_over(genes, space, window):
    n = 20_000
    drawn = space.sample_within(np.random.default_rng(0), n, window)
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    assert found.tolist() == genes.tolist()
    expected = n / len(genes)
    assert np.all(np.abs(counts - expected) < 5 * math.sqrt(expected))


def test_impossible_windows():
    space = RankSpace.regular(MICRO)
    least, most = space.macs_range()
    rng = np.random.default_rng(0)
    with pytest.raises(
        ValueError, match=f"reaches {least}..{most}, the nearest found costs {most}"
    ):
        space.sample_within(rng, 1, (most + 1, most + 9))
    with pytest.raises(ValueError, match=f"nearest found costs {least}"):
        space.sample_within(rng, 1, (0, least - 1))
    with pytest.raises(ValueError, match=f"nearest found costs {least}"):
        space.sample_within(rng, 1, (least + 1, least + 2))
    with pytest.raises(ValueError, match="is empty"):
        space.sample_within(rng, 1, (most, least))
    with pytest.raises(ValueError, match="is empty"):
        space.sample_within(rng, 1, (math.nan, most))
    assert (space.macs(space.sample_within(rng, 5, (0, least))) == least).all()
    assert space.sample_within(rng, 5, (0, math.inf)).shape == (5, 9)


def test_windows_at_full_size(base_space):
    window = (7.9e9, 8.1e9)
    start = time.process_time()
    genes = base_space.sample_within(np.random.default_rng(0), 1000, window)
    assert time.process_time() - start < 2
    macs = base_space.macs(genes)
    assert window[0] <= macs.min() <= macs.max() <= window[1]


def test_uniform_ranks():
    spec = deit("base")
    space = RankSpace.regular(spec)
    for hi in (8_039_443_200, spec.macs() - 1, 3_000_000_000):
        ranks = space.uniform_ranks_within(hi)
        assert len(set(ranks)) == 1
        cost, above = (
            spec.with_ranks(
                tuple(
                    None if layer.is_cheaper_dense(rank) else rank
                    for layer, rank in zip(spec.layers, (r + more for r in ranks), strict=True)
                )
            ).macs()
            for more in (0, 1)
        )
        assert cost <= hi < above
    assert space.uniform_ranks_within(spec.macs()) == (768,) * 36
    least = spec.with_ranks((1,) * 36).macs()
    assert space.uniform_ranks_within(least) == (1,) * 36
    with pytest.raises(ValueError, match=f"the least is {least}"):
        space.uniform_ranks_within(least - 1)
