"""Rank spaces: published costs to the last digit, random draws, and ranges of cost."""

import dataclasses
import itertools
import json
import math
import pathlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.flora import sampling
from flora_jax.flora.extras.sampling import nested, sandwich
from flora_jax.flora.space import RankSpace
from flora_jax.models.swin_spec import swin
from flora_jax.models.vit_spec import deit
from tests.helpers.networks import MICRO, ONE_BLOCK, TWO_BLOCKS

DATA = pathlib.Path(__file__).parent / "data"
SIZES = ("tiny", "small", "base")


def published(name):
    return json.loads((DATA / name).read_text())


def genes_of(ratios, config):
    """Ratios [..., L] as indices into `ratios`."""
    return np.abs(np.asarray(config)[..., None] - np.asarray(ratios)).argmin(axis=-1)


def ranks_merging_full(space, genes):
    """The published subnet builder: a pair of factors unless the ratio is 1."""
    return tuple(
        None if rank == layer.full_rank else int(rank)
        for layer, rank in zip(space.spec.layers, space.ranks(genes), strict=True)
    )


@pytest.fixture(scope="module")
def base_space():
    return RankSpace.regular(deit("base"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("constructor", [deit, swin])
def test_published_costs(constructor, size):
    table = published("macs_params_fullsize.json")[f"{constructor.__name__}_{size}"]
    spec = constructor(size)
    space = RankSpace.regular(spec, table["ratios"])
    assert spec.macs() == table["dense_macs"]
    assert spec.num_params() == table["dense_params"]
    full_pairs = spec.with_ranks(tuple(layer.full_rank for layer in spec.layers))
    assert full_pairs.num_params() == table["supernet_params"]
    genes = genes_of(table["ratios"], [subnet["config"] for subnet in table["subnets"]])
    assert space.macs(genes).tolist() == [subnet["macs"] for subnet in table["subnets"]]
    for row, subnet in zip(genes, table["subnets"], strict=True):
        if "reference_subnet_params" in subnet:  # published for DeiT only
            reference = spec.with_ranks(ranks_merging_full(space, row))
            assert reference.num_params() == subnet["reference_subnet_params"]


@pytest.mark.parametrize("size", ["small", "base"])
def test_published_subnets(size):
    subnet = published("published_subnets.json")[f"deit_{size}"]
    ratios = published("macs_params_fullsize.json")[f"deit_{size}"]["ratios"]
    space = RankSpace.regular(deit(size), ratios)
    genes = genes_of(ratios, subnet["ratios_per_block"]).ravel()
    assert space.macs(genes) == subnet["macs"]
    assert space.spec.with_ranks(ranks_merging_full(space, genes)).num_params() == subnet["params"]


def test_costs_are_those_of_the_extracted_spec(base_space):
    genes = base_space.sample(np.random.default_rng(0), 6).reshape(2, 3, -1)
    macs, params = base_space.macs(genes), base_space.params(genes)
    assert macs.shape == params.shape == (2, 3)
    assert macs.dtype == params.dtype == np.int64
    for index in np.ndindex(2, 3):
        ranks = base_space.ranks(genes[index]).tolist()
        pairs = zip(base_space.spec.layers, ranks, strict=True)
        extracted = base_space.extracted_spec(genes[index])
        assert extracted.ranks == tuple(
            None if layer.is_cheaper_dense(rank) else rank for layer, rank in pairs
        )
        assert macs[index] == extracted.macs()
        assert params[index] == extracted.num_params()


def test_expensive_pairs_count_as_dense(base_space):
    # 6/8 of full rank costs a qkv pair exactly the dense matrix.
    genes = base_space.full_rank_genes
    genes[0] -= 1
    assert base_space.ranks(genes)[0] == 576
    assert base_space.macs(genes) == base_space.spec.macs()
    assert base_space.params(genes) == base_space.spec.num_params()


def test_regular_ranks_and_triples():
    space = RankSpace.regular(ONE_BLOCK, (1, 0.25, 0.01))
    assert space.choices == ((1, 2, 8),) * 3
    assert (space.num_layers, space.num_blocks) == (3, 1)
    assert space.kept[0].tolist() == [list(t) for t in itertools.product(range(3), repeat=3)]
    assert space.full_rank_genes.tolist() == [2, 2, 2]


def test_ranks_in_tiles():
    def ranks(width, tile):
        spec = dataclasses.replace(ONE_BLOCK, embed_dim=width, blocks=())
        return RankSpace.regular(spec, (1 / 100, 1 / 4, 1 / 2, 0.99, 1), tile).choices[0]

    assert ranks(100, 1) == (1, 25, 50, 99, 100)
    assert ranks(100, 8) == (8, 24, 48, 96, 100)
    assert ranks(100, 40) == (40, 80, 100)
    assert ranks(12, 16) == (12,)
    with pytest.raises(ValueError, match="tile must be at least 1, got 0"):
        ranks(100, 0)


@pytest.mark.parametrize(
    "ratios, message",
    [
        ((0.5,), "must contain 1"),
        ((), "must contain 1"),
        ((0.0, 1), r"ratio 0.0 lies outside \(0, 1\]"),
        ((1, 1.5), "ratio 1.5 lies outside"),
        ((0.5, 0.5, 1), "ratio 0.5 is given twice"),
    ],
)
def test_bad_ratios(ratios, message):
    with pytest.raises(ValueError, match=message):
        RankSpace.regular(ONE_BLOCK, ratios)


def test_needs_a_dense_spec():
    with pytest.raises(ValueError, match="needs a dense spec"):
        RankSpace.regular(ONE_BLOCK.with_ranks((1, None, None)))


@pytest.mark.parametrize(
    "genes, message",
    [
        ([0, 0], r"shape \(2,\), expected \(..., 3\)"),
        ([0.0, 0.0, 0.0], "must be integers, got float64"),
        ([0, 7, 0], r"gene 7 of blocks.0.mlp.fc1 lies outside 0..6"),
        ([[0, 0, 0], [0, 0, -1]], r"gene -1 of blocks.0.mlp.fc2 lies outside 0..6"),
    ],
)
def test_bad_genes(genes, message):
    space = RankSpace.regular(ONE_BLOCK)
    for function in (space.validate, space.macs, space.params, space.ranks, space.contains):
        with pytest.raises(ValueError, match=message):
            function(genes)


@pytest.mark.parametrize(
    "kept, message",
    [
        ([[[0, 0, 0]]], "expected kept triples for 2 blocks, got 1"),
        ([[[0, 0, 0]], []], "block 1 have shape"),
        ([[[0, 0, 0]], [[1, 1, 1], [1, 1, 1]]], "block 1 repeats"),
        ([[[0, 0, 0]], [[1, 9, 1]]], r"gene 9 of blocks.1.mlp.fc1 lies outside 0..6"),
    ],
)
def test_bad_kept_triples(kept, message):
    with pytest.raises(ValueError, match=message):
        RankSpace.regular(TWO_BLOCKS).keep(kept)


def test_kept_triples():
    space = RankSpace.regular(TWO_BLOCKS).keep([[[6, 6, 6], [0, 1, 2]], [[3, 3, 3]]])
    assert space.kept[0].tolist() == [[0, 1, 2], [6, 6, 6]]
    inside = space.contains([[0, 1, 2, 3, 3, 3], [0, 1, 6, 3, 3, 3], [6, 6, 6, 3, 3, 2]])
    assert inside.tolist() == [True, False, False]
    macs = space.macs([[0, 1, 2, 3, 3, 3], [6, 6, 6, 3, 3, 3]])
    assert np.diff(space.block_macs(0)) == np.diff(macs)
    assert space.macs_range() == tuple(macs.tolist())
    with pytest.raises(ValueError, match="read-only"):
        space.kept[0][0, 0] = 1


def test_json_round_trip():
    space = RankSpace.regular(TWO_BLOCKS).keep([[[0, 1, 2]], [[3, 3, 3], [4, 4, 4]]])
    text = json.dumps(space.to_json())
    again = RankSpace.from_json(TWO_BLOCKS, json.loads(text))
    assert again.choices == space.choices
    assert json.dumps(again.to_json()) == text
    with pytest.raises(ValueError, match="needs kept"):
        RankSpace.from_json(TWO_BLOCKS, {"choices": []})
    with pytest.raises(ValueError, match="must ascend"):
        RankSpace.from_json(TWO_BLOCKS, {"choices": [[1, 4]] * 6, "kept": [[[0, 0, 0]]] * 2})


@pytest.mark.parametrize("sampling", ["uniform", "low_rank_aware"])
def test_samplings(sampling):
    ratios = (1 / 4, 1 / 2, 1)
    space = RankSpace.regular(TWO_BLOCKS, ratios)
    kept = space.kept[1][[0, 5, 13, 26]]
    space = space.keep([space.kept[0], kept])
    n = 20_000
    genes = space.sample(np.random.default_rng(0), n, sampling=sampling)
    assert genes.shape == (n, 6)
    assert genes.dtype == np.int32
    assert space.contains(genes).all()
    for block, triples in enumerate(space.kept):
        weights = 1 / np.array(ratios)[triples].prod(axis=1)
        if sampling == "uniform":
            weights = np.ones(len(triples))
        expected = weights / weights.sum()
        drawn = (genes[:, None, 3 * block : 3 * block + 3] == triples).all(-1).mean(axis=0)
        assert np.all(np.abs(drawn - expected) < 5 * np.sqrt(expected / n))


def test_unknown_sampling():
    with pytest.raises(
        ValueError, match=r"unknown sampling 'low_rank'.*did you mean 'low_rank_aware'"
    ):
        RankSpace.regular(ONE_BLOCK).sample(np.random.default_rng(0), 1, sampling="low_rank")


def all_genes(space):
    return np.array([np.concatenate(t) for t in itertools.product(*space.kept)])


@st.composite
def spaces(draw):
    """Two blocks with up to five kept triples each, in cells of one MAC or very coarse."""
    space = RankSpace.regular(TWO_BLOCKS, (1 / 8, 3 / 8, 1))
    triples = st.lists(st.integers(0, 26), min_size=1, max_size=5, unique=True)
    return space.keep([space.kept[0][draw(triples)], space.kept[1][draw(triples)]])


@given(spaces(), st.data(), st.sampled_from([2**17, 40]))
@settings(max_examples=150)
def test_ranges(space, data, max_cells):
    lo, hi = space.macs_range()
    bounds = st.integers(lo - 50, hi + 50)
    lo, hi = sorted([data.draw(bounds), data.draw(bounds)])
    macs = space.macs(all_genes(space))
    legal = (lo <= macs) & (macs <= hi)
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_MAX_CELLS", max_cells)
        is_exact = space._range_sampler._rounded_off == 0
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


def test_draws_within_a_range_are_uniform():
    space = RankSpace.regular(TWO_BLOCKS, (3 / 8, 1))
    genes = all_genes(space)
    macs = space.macs(genes)
    lo, hi = np.quantile(macs, [0.3, 0.8])
    assert_uniform_over(genes[(lo <= macs) & (macs <= hi)], space, (lo, hi))


def test_coarse_cells_lose_no_more_than_a_strip(monkeypatch):
    monkeypatch.setattr(sampling, "_MAX_CELLS", 15)
    space = RankSpace.regular(TWO_BLOCKS, (3 / 8, 1))
    strip = space._range_sampler._rounded_off
    assert strip > 0
    genes = all_genes(space)
    macs = space.macs(genes)
    assert_uniform_over(genes, space, space.macs_range())
    lo, hi = np.quantile(macs, [0.2, 0.9])
    drawn = space.sample_within(np.random.default_rng(0), 2000, (lo, hi))
    far_inside = genes[(lo + strip <= macs) & (macs <= hi - strip)]
    assert len(far_inside) > 0
    assert {*map(tuple, far_inside.tolist())} <= {*map(tuple, drawn.tolist())}


def assert_uniform_over(genes, space, bounds):
    n = 20_000
    drawn = space.sample_within(np.random.default_rng(0), n, bounds)
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    assert found.tolist() == genes.tolist()
    expected = n / len(genes)
    assert np.all(np.abs(counts - expected) < 5 * math.sqrt(expected))


def test_impossible_ranges():
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


def test_ranges_at_full_size(base_space):
    bounds = (7.9e9, 8.1e9)
    start = time.process_time()
    genes = base_space.sample_within(np.random.default_rng(0), 1000, bounds)
    assert time.process_time() - start < 2
    macs = base_space.macs(genes)
    assert bounds[0] <= macs.min() <= macs.max() <= bounds[1]


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


def test_draws_depend_on_seed_and_step_alone(tiny_space):
    profiles = np.array([[0] * 6, [1, 0, 1, 0, 1, 0], [2] * 6])
    for make in (
        lambda seed: sandwich(tiny_space, seed),
        lambda seed: nested(tiny_space, profiles, seed),
    ):
        draws = [[make(seed)(step) for step in range(60)] for seed in (0, 0, 1)]
        np.testing.assert_array_equal(draws[0], draws[1])
        assert not np.array_equal(draws[0], draws[2])
        assert all(tiny_space.contains(genes).all() for genes in draws[0])


def test_sandwich_takes_turns_between_largest_smallest_and_a_drawn_one(tiny_space):
    draw = sandwich(tiny_space, seed=0)
    for step in range(0, 30, 3):
        np.testing.assert_array_equal(draw(step), tiny_space.full_rank_genes)
        np.testing.assert_array_equal(draw(step + 1), tiny_space.cheapest_genes)
    assert len({tuple(draw(step)) for step in range(2, 60, 3)}) > 10


def test_nested_draws_stay_near_their_path(tiny_space):
    profiles = np.array([[0] * 6, [1] * 6, [2] * 6])
    draw = nested(tiny_space, profiles, seed=0)
    off = np.array([min(abs(draw(s) - profile).sum() for profile in profiles) for s in range(300)])
    assert 0.3 < off.mean() < 0.7  # six genes, each astray with a chance of 0.1, some clipped
    assert off.max() <= 4
