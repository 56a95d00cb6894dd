"""Small gated networks, masks for them, and what a cut model is held to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import flora_jax as flora
from flora_jax import slim
from flora_jax.models import functional
from tests.helpers.networks import QUICK as QUICK
from tests.helpers.networks import SHIFTED_SWIN as SHIFTED_SWIN
from tests.helpers.networks import TINY as TINY
from tests.helpers.networks import TINY_HYBRID as TINY_HYBRID
from tests.helpers.networks import TINY_SWIN as TINY_SWIN
from tests.helpers.networks import TINY_SWIN_V2 as TINY_SWIN_V2
from tests.helpers.networks import forward, random_model, size
from tests.helpers.networks import images_of as images_of
from tests.helpers.networks import logits as logits


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


def check_costs(model, count_macs):
    spec, (structure, parameters) = model.spec, functional.split(model)
    assert size(model) == flora.num_params(spec)
    image = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    products = count_macs(jax.make_jaxpr(forward, static_argnums=0)(structure, parameters, image))
    norms = sum(2 * into.tokens * into.width for into in spec.block_inputs)
    if spec.family == "vit":
        norms += (1 + spec.distilled) * spec.embed_dim
    else:
        first, last = spec.stages
        norms += 2 * first.tokens * first.width + last.width * first.tokens // 4
    assert products + norms == flora.macs(spec)
