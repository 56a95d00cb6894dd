"""Small compressed networks: of low rank, slimmed, or both."""

import numpy as np

import flora_jax as flora
from flora_jax import slim
from tests.helpers.slimming import gated_model, random_masks


def low_rank(model):
    """Some of its layers stay dense."""
    space = flora.RankSpace.regular(model.spec, ratios=(1 / 4, 1 / 2, 1))
    genes = np.arange(space.num_layers) * 2 % 3
    subnet = flora.extract(flora.factorize(model, space), genes)
    assert {rank is None for rank in subnet.spec.ranks} == {True, False}
    return subnet


def slimmed(spec):
    """Narrower heads and MLPs; tokens leave, some before the first block, where they can."""
    tokens = spec.why_tokens_stay is None
    options = {"tokens": tokens} if spec.family == "vit" else {}
    masks = random_masks(spec, np.random.default_rng(5), tokens)
    cut = slim.extract(gated_model(spec, **options), masks)
    widths = [block.attention_dim for block in cut.spec.blocks]
    assert widths != [block.attention_dim for block in spec.blocks]
    assert not tokens or 1 < cut.spec.num_embedded_tokens < spec.num_tokens
    return cut
