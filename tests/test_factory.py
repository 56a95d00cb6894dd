"""One factory for every network, and the slots by which a supernet takes its genes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import flora_jax as flora
from flora_jax.flora.layer import RankedLinear
from flora_jax.models import functional
from flora_jax.models.factory import create, create_abstract
from flora_jax.models.layers import make_linear

VIT = flora.ViTSpec(image_size=8, patch_size=4, embed_dim=8, depth=12, num_heads=2, num_classes=3)
SWIN = flora.SwinSpec(
    image_size=16,
    patch_size=2,
    embed_dim=4,
    depths=(2, 12),
    num_heads=(1, 2),
    window_size=4,
    num_classes=3,
)


@pytest.mark.parametrize("spec", [VIT, SWIN], ids=["vit", "swin"])
def test_slots_are_in_the_order_of_genes(spec):
    """Also from block 10 on, whose name comes before that of block 2."""
    space = flora.RankSpace.regular(spec, ratios=(1 / 4, 1 / 2, 1))
    structure, parameters = functional.split(
        flora.lowrank.supernet.abstract_supernet(space, "masked").network
    )
    names = [".".join(map(str, path)) for path, _ in structure.slots]
    assert names == [f"{layer.name}.gene" for layer in spec.layers]
    assert [last for _, last in structure.slots] == space.full_rank_genes.tolist()
    assert not any("gene" in name for name in parameters)


def test_genes_reach_the_layers_they_belong_to():
    space = flora.RankSpace.regular(VIT, ratios=(1 / 4, 1 / 2, 1))
    structure, parameters = functional.split(flora.factorize(create(VIT), space).network)
    genes = space.sample(np.random.default_rng(0), 1)[0]
    network = functional.merge(structure, parameters, genes)
    for i, block in enumerate(network.blocks):
        layers = (block.attn.qkv, block.mlp.fc1, block.mlp.fc2)
        assert [int(layer.gene[...]) for layer in layers] == genes[3 * i : 3 * i + 3].tolist()


def test_a_layer_of_the_callers_own():
    """The factory is told by (layer, rank) what it makes, once for each searchable layer."""
    made = []

    def linear(layer, rank, *, rngs):
        made.append((layer, rank))
        return make_linear(layer, rank, rngs=rngs)

    spec = VIT.with_ranks((1, None, 2) * 12)
    model = create(spec, linear=linear)
    assert sorted(made, key=str) == sorted(zip(spec.layers, spec.ranks, strict=True), key=str)
    shapes, others = (functional.split(m)[1] for m in (model, create_abstract(spec)))
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, others)


def test_a_ranked_layer_is_made_of_shapes_alone():
    layer = dataclasses.replace(VIT.layers[0], use_bias=False)
    ranked = nnx.eval_shape(lambda: RankedLinear(layer, (1, 8), "masked", rngs=nnx.Rngs(0)))
    structure, parameters = functional.split(ranked)
    assert {name: p.shape for name, p in parameters.items()} == {"down": (8, 8), "up": (8, 24)}
    assert structure.slots == ((("gene",), 1),)
