"""Small compressed networks: of low rank, slimmed, or both; and what those to export compute."""

import dataclasses
import functools

import jax
import numpy as np

import flora_jax as flora
from flora_jax import slim
from flora_jax.models import functional
from tests.helpers import modern
from tests.helpers.slimming import (
    SHIFTED_SWIN,
    TINY,
    TINY_HYBRID,
    TINY_SWIN,
    TINY_SWIN_V2,
    gated_model,
    images_of,
    random_masks,
    random_model,
)


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


TINY_VIT = flora.ViTSpec(depth=2, **TINY)


def _like(spec, **changes):
    return dataclasses.replace(spec, blocks=(), **changes)


# One of each kind that differs in what an export has to write.
NETWORKS = {
    "distilled": lambda: random_model(_like(TINY_VIT, distilled=True)),
    "no bias, grey": lambda: slimmed(_like(TINY_VIT, qkv_bias=False, in_channels=1)),
    "mean": lambda: random_model(_like(TINY_VIT, pool="mean")),
    "low rank, gated": lambda: low_rank(modern.model("timm_dinov3_swiglu")),
    "slim, tokens stay": lambda: slimmed(modern.shallow("timm_siglip_gap", 1)),
    "slim, rotary": lambda: slimmed(modern.shallow("hf_dinov3", 2)),
    "slim, normed MLP": lambda: slimmed(modern.shallow("timm_eva02", 2)),
    "slim, relative positions": lambda: slimmed(modern.shallow("timm_beitv2", 2)),
    "slim, registers": lambda: slimmed(modern.shallow("timm_dinov2_registers", 2)),
    "low rank on slim": lambda: low_rank(slimmed(TINY_VIT)),
    "swin": lambda: random_model(_like(SHIFTED_SWIN, qkv_bias=False)),
    "swin, low rank on slim": lambda: low_rank(slimmed(TINY_SWIN)),
    "swin_v2, low rank on slim": lambda: low_rank(slimmed(TINY_SWIN_V2)),
    "tiny_vit, low rank on slim": lambda: low_rank(
        slimmed(_like(TINY_HYBRID, num_classes=0, in_channels=1))
    ),
}


@functools.cache
def network(name):
    """The network of this name, five images, and what it makes of them: output and tokens."""
    model = NETWORKS[name]()
    images, (structure, parameters) = images_of(model.spec, 5), functional.split(model)

    @jax.jit
    def forward(parameters):
        model = functional.merge(structure, parameters)
        return model(images), model.features(images)

    return model, images, *map(np.asarray, forward(parameters))
