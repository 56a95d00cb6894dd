"""The cut model as any other: saved, factorized, gated again; and the specs it may have."""

import dataclasses
import json

import numpy as np
import pytest

import flora_jax as flora
from flora_jax import slim
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.spec import BlockSpec
from flora_jax.models.spec_json import spec_from_json, spec_to_json
from tests.helpers.networks import TINY, TINY_SWIN, images_of, logits
from tests.helpers.slimming import check_costs, random_masks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slim_model(tiny_gated):
    """Tokens leave before the first block and later; blocks have different widths."""
    small = slim.extract(tiny_gated, random_masks(tiny_gated.spec, np.random.default_rng(5)))
    blocks = small.spec.blocks
    assert len({(b.num_heads, b.head_dim, b.mlp_dim) for b in blocks}) == len(blocks)
    assert 17 > len(blocks[0].tokens) > len(blocks[-1].tokens)
    return small


def test_save_and_load(slim_model, tmp_path):
    flora.save(slim_model, tmp_path / "slim")
    again = flora.load(tmp_path / "slim")
    assert again.spec == slim_model.spec
    parameters, loaded = (functional.split(model)[1] for model in (slim_model, again))
    assert parameters.keys() == loaded.keys()
    for name, value in parameters.items():
        np.testing.assert_array_equal(loaded[name], value)
        assert loaded[name].dtype == value.dtype


def test_the_spec_survives_json(slim_model):
    again = spec_from_json(json.loads(json.dumps(spec_to_json(slim_model.spec))))
    assert again == slim_model.spec
    assert hash(again) == hash(slim_model.spec)


@pytest.mark.parametrize("implementation", ["masked", "sliced"])
def test_low_ranks_on_the_slim_model(slim_model, implementation, count_macs):
    spec, images = slim_model.spec, images_of(slim_model.spec)
    space = flora.RankSpace.regular(spec, ratios=(1 / 3, 1))
    assert len({layer.full_rank for layer in spec.layers}) > 1
    supernet = flora.factorize(slim_model, space, implementation=implementation)
    full = supernet(images, space.full_rank_genes)
    np.testing.assert_allclose(full, logits(slim_model, images), atol=1e-4)
    genes = np.arange(space.num_layers) % 2
    subnet = flora.extract(supernet, genes)
    np.testing.assert_allclose(logits(subnet, images), supernet(images, genes), atol=1e-4)
    assert [block.tokens for block in subnet.spec.blocks] == [b.tokens for b in spec.blocks]
    assert space.macs(genes) == flora.macs(subnet.spec) < flora.macs(spec)
    assert space.params(genes) == flora.num_params(subnet.spec) < flora.num_params(spec)
    check_costs(subnet, count_macs)


def test_a_slim_model_can_be_gated_again_where_its_tokens_are_whole(tiny_gated):
    masks = dataclasses.replace(
        random_masks(tiny_gated.spec, np.random.default_rng(1)),
        patch=slim.threshold(tiny_gated).patch,
    )
    small, images = slim.extract(tiny_gated, masks), images_of(tiny_gated.spec)
    again = slim.add_gates(small, tokens=False)
    np.testing.assert_allclose(logits(again, images), logits(small, images), atol=1e-5)


def test_gates_of_a_compressed_model(slim_model):
    factored = flora.ViTSpec(**TINY, depth=1).with_ranks((2, None, None))
    with pytest.raises(ValueError, match="gates need a dense model: slim first, then factorize"):
        slim.add_gates(create_abstract(factored))
    with pytest.raises(ValueError, match="was slimmed before: its tokens have left for good"):
        slim.add_gates(slim_model)


@pytest.mark.parametrize(
    ("fields", "tokens", "message"),
    [
        ({}, [(0, 2, 1), None], "tokens of block 0 must ascend"),
        ({}, [(0, 1, 1), None], "tokens of block 0 must ascend"),
        ({}, [(0, 17), None], "tokens of block 0 must ascend and be among"),
        ({}, [(0, 1, 2), (0, 3)], "tokens of block 1 must .* among those of the block before"),
        ({}, [(0, 1, 2), None], "block 1 cannot work on all tokens: some left before it"),
        ({}, [None, (1, 2)], "block 1 must keep the tokens that are classified"),
        ({}, [None, ()], "block 1 must keep the tokens that are classified"),
        ({"distilled": True}, [None, (0, 2)], "block 1 must keep the tokens that are classified"),
        ({"pool": "mean"}, [None, (0, 1)], "no token can leave: the mean over all patches"),
    ],
)
def test_bad_tokens(fields, tokens, message):
    blocks = tuple(BlockSpec(2, 4, 8, tokens=kept) for kept in tokens)
    with pytest.raises(ValueError, match=message):
        flora.ViTSpec(**TINY, **fields, depth=2, blocks=blocks)


def test_tokens_cannot_leave_a_swin():
    blocks = (BlockSpec(2, 4, 8, tokens=(0, 1)), *TINY_SWIN.blocks[1:])
    with pytest.raises(ValueError, match="no token can leave: the windows of a Swin"):
        dataclasses.replace(TINY_SWIN, blocks=blocks)
