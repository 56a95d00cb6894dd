"""Rank spaces: published costs to the last digit, random draws, and MAC windows."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest

from flora_jax.flora.space import RankSpace
from flora_jax.models.swin_spec import swin
from flora_jax.models.vit_spec import ViTSpec, deit

DATA = pathlib.Path(__file__).parent / "data"


SIZES = ("tiny", "small", "base")


MICRO = ViTSpec(image_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10)


ONE_BLOCK = ViTSpec(image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1, num_classes=2)


TWO_BLOCKS = ViTSpec(image_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=1, num_classes=2)


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


def test_micro_macs():
    golden = np.load(DATA / "flora_deit_micro.npz")
    space = RankSpace.regular(MICRO, golden["ratios"].tolist())
    genes = genes_of(golden["ratios"], golden["configs"])
    assert space.macs(genes).tolist() == golden["macs"].tolist()


def test_costs_are_those_of_the_extracted_spec(base_space):
    genes = base_space.sample(np.random.default_rng(0), 6).reshape(2, 3, -1)
    macs, params = base_space.macs(genes), base_space.params(genes)
    assert macs.shape == params.shape == (2, 3)
    assert macs.dtype == params.dtype == np.int64
    for index in np.ndindex(2, 3):
        ranks = base_space.ranks(genes[index])
        extracted = base_space.spec.with_ranks(
            tuple(
                None if layer.is_cheaper_dense(rank) else int(rank)
                for layer, rank in zip(base_space.spec.layers, ranks, strict=True)
            )
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


def test_extracted_spec_keeps_expensive_pairs_dense(base_space):
    genes = base_space.full_rank_genes
    genes[:3] = 5, 5, 0
    spec = base_space.extracted_spec(genes)
    assert spec.ranks == (None, 576, 96, *(None,) * 33)
    assert spec.macs() == base_space.macs(genes)


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


def test_empty_population_costs_nothing():
    space = RankSpace.regular(ONE_BLOCK)
    assert space.macs(np.zeros((0, 3), int)).shape == (0,)


def test_validate_returns_int32():
    assert RankSpace.regular(ONE_BLOCK).validate(np.zeros(3, np.uint8)).dtype == np.int32


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
