"""Tiny networks that tests share, so that each program is compiled once."""

import dataclasses

import jax
import numpy as np

import flora_jax as flora
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract

TWO_BLOCKS = flora.ViTSpec(
    image_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3
)
ONE_BLOCK = dataclasses.replace(TWO_BLOCKS, depth=1, blocks=())
# That of the published implementations' numbers in tests/data.
MICRO = flora.ViTSpec(
    image_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10
)
# ViTs with 16 patches, of which some can leave.
TINY = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "num_heads": 2, "num_classes": 3}
# Windows that are shifted in the first stage, and the whole feature map in the second.
TINY_SWIN = flora.SwinSpec(
    image_size=8,
    patch_size=1,
    embed_dim=8,
    depths=(2, 1),
    num_heads=(2, 4),
    window_size=4,
    num_classes=3,
)
SHIFTED_SWIN = dataclasses.replace(
    TINY_SWIN, image_size=16, blocks=(), absolute_pos_embed=True, patch_norm=False, num_classes=0
)
# Swin V2, whose windows need padding in the first stage.
TINY_SWIN_V2 = dataclasses.replace(
    TINY_SWIN,
    window_size=3,
    blocks=(),
    post_norm=True,
    cosine_attention=True,
    k_bias=False,
    pretrained_window_sizes=(2, 0),
)
# A TinyViT, whose windows need padding in one stage and tile the next.
TINY_HYBRID = flora.TinyViTSpec(
    image_size=32,
    embed_dims=(8, 16, 24),
    depths=(1, 2, 1),
    num_heads=(1, 2, 3),
    window_sizes=(3, 3, 2),
    num_classes=5,
)
# Compiling is most of the time here: the quickest program will do.
QUICK = {"xla_backend_optimization_level": 0}


def random_model(spec, seed=0):
    """No parameter is at a special value such as zero."""
    rng, model = np.random.default_rng(seed), create_abstract(spec)
    shapes = functional.split(model)[1]
    values = {n: np.float32(rng.normal(0.02, 0.4, s.shape)) for n, s in shapes.items()}
    return functional.with_parameters(model, values)


def forward(structure, parameters, images, genes=None):
    return functional.merge(structure, parameters, genes)(images)


_compiled = jax.jit(forward, static_argnums=0, compiler_options=QUICK)


def logits(model, images, genes=None):
    """Of a model, a gated one or a supernet, compiled: equal shapes share a program."""
    return _compiled(*functional.split(getattr(model, "network", model)), images, genes)


def images_of(spec, number=2):
    rng = np.random.default_rng(7)
    return rng.normal(size=(number, *spec.image_shape)).astype(np.float32)


def size(model) -> int:
    """How many values the parameters have."""
    return sum(np.prod(p.shape, dtype=int) for p in functional.split(model)[1].values())


def every_triple(space, block):
    """Genes of each triple of a block, the other blocks at full rank."""
    triples = space.kept[block]
    genes = np.tile(space.full_rank_genes, (len(triples), 1))
    genes[:, 3 * block : 3 * block + 3] = triples
    return genes
