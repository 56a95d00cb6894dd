"""Small gated networks, masks for them, and what a cut model is held to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import flora_jax as flora
from flora_jax import slim
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract

TINY = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "num_heads": 2, "num_classes": 3}
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


def forward(structure, parameters, images):
    return functional.merge(structure, parameters)(images)


_compiled = jax.jit(forward, static_argnums=0, compiler_options=QUICK)


def logits(model, images):
    """Of a model or a gated one, compiled: networks that differ in values share a program."""
    return _compiled(*functional.split(getattr(model, "network", model)), images)


def random_model(spec, seed=0):
    """No parameter is at a special value such as zero."""
    rng, model = np.random.default_rng(seed), create_abstract(spec)
    shapes = functional.split(model)[1]
    values = {n: np.float32(rng.normal(0.02, 0.4, s.shape)) for n, s in shapes.items()}
    return functional.with_parameters(model, values)


@functools.cache
def gated_model(spec, **options):
    """Gates in 0.2..1.2, tokens' before their tanh."""
    rng = np.random.default_rng(1)
    gated = slim.add_gates(random_model(spec), **options)
    gates = {
        name: rng.uniform(0.2, 1.2, value.shape)
        for name, value in functional.split(gated.network)[1].items()
        if name.endswith("gate")
    }
    return with_gates(gated, gates)


def with_gates(gated, gates):
    structure, parameters = functional.split(gated.network)
    parameters |= {name: jnp.float32(value) for name, value in gates.items()}
    return dataclasses.replace(gated, network=functional.merge(structure, parameters))


def random_masks(spec, rng, tokens=True):
    """Any shares of each kind; heads may go entirely, every block keeps something of each."""

    def kept(shape):
        mask = rng.random(shape) < rng.random()
        mask[(*rng.integers(0, shape),)] = True
        return mask

    def attention(block):
        if spec.rope_theta is None:
            return kept((block.num_heads, block.head_dim))
        return np.tile(kept((block.num_heads, block.head_dim // 2)), 2)

    patch = ()
    if tokens:
        leaves_at = rng.integers(0, len(spec.blocks) + 1, spec.num_tokens)
        leaves_at[: spec.num_prefix_tokens + 1] = len(spec.blocks)
        patch = tuple(leaves_at > b for b in range(len(spec.blocks)))
    return slim.Masks(
        attn=tuple(attention(block) for block in spec.blocks),
        mlp=tuple(kept((block.mlp_dim,)) for block in spec.blocks),
        patch=patch,
        thresholds={},
    )


def images_of(spec, number=2):
    rng = np.random.default_rng(7)
    return rng.normal(size=(number, *spec.image_shape)).astype(np.float32)


def check_costs(model, count_macs):
    spec, (structure, parameters) = model.spec, functional.split(model)
    assert sum(p.size for p in parameters.values()) == flora.num_params(spec)
    image = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    products = count_macs(jax.make_jaxpr(forward, static_argnums=0)(structure, parameters, image))
    norms = sum(2 * into.tokens * into.width for into in spec.block_inputs)
    if spec.family == "vit":
        norms += (1 + spec.distilled) * spec.embed_dim
    else:
        first, last = spec.stages
        norms += 2 * first.tokens * first.width + last.width * first.tokens // 4
    assert products + norms == flora.macs(spec)
