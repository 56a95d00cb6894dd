"""DeiT (Touvron et al. 2021) as NNX modules built from a ViTSpec."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flora_jax.models.attention import attend, merge_heads, split_heads
from flora_jax.models.block import Block, PatchEmbed
from flora_jax.models.functional import Undecayed
from flora_jax.models.layers import LayerNorm, Linear, MakeLinear, check_images
from flora_jax.models.network import Network
from flora_jax.models.spec import BlockSpec, LinearShape
from flora_jax.models.vit_spec import ViTSpec


class Attention(nnx.Module):
    """Multi-head self-attention over the N tokens of each image.

    Tokens that left before (`num_left`) would all be the same here: their input is zero, so their
    key and value are qkv's bias. One constant of that key and value stands for them, with
    log(num_left) added to its logit, which is exact.
    """

    def __init__(
        self,
        qkv: LinearShape,
        num_left: int,
        block: BlockSpec,
        linear: MakeLinear,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.head_dim = block.num_heads, block.head_dim
        self.num_tokens, self.num_left = qkv.tokens, num_left
        self.qkv: Any = linear(qkv, block.ranks[0], rngs=rngs)
        self.proj = Linear(block.attention_dim, qkv.in_features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = split_heads(self.qkv(x), self.num_tokens, self.num_heads)
        bias = np.zeros((1, 1, 1, self.num_tokens + bool(self.num_left)), np.float32)
        if self.num_left:
            key, value = self._with_constant(key, 1), self._with_constant(value, 2)
            bias[..., -1] = np.log(self.num_left)
        return self.proj(merge_heads(attend(query, key, value, bias)))

    def _with_constant(self, tokens: jax.Array, part: int) -> jax.Array:
        """Appends qkv's bias of a part (1 key, 2 value) to tokens [B, H, N, d]: [B, H, N+1, d]."""
        constant = jnp.zeros_like(tokens[:, :, :1])
        if self.qkv.bias is not None:
            constant += self.qkv.bias[...].reshape(3, 1, self.num_heads, 1, self.head_dim)[part]
        return jnp.concatenate([tokens, constant], axis=2)


class TokenSelection(nnx.Module):
    """x [B*N, D] -> the tokens at `positions` of each image, [B*len(positions), D]."""

    def __init__(self, num_tokens: int, positions: tuple[int, ...]):
        self.num_tokens, self.positions = num_tokens, positions

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = x.reshape(-1, self.num_tokens, x.shape[-1])
        return tokens[:, np.array(self.positions)].reshape(-1, x.shape[-1])


class ViT(Network):
    """A DeiT, or a plain ViT like it."""

    spec: ViTSpec

    def __init__(self, spec: ViTSpec, linear: MakeLinear, block: type[Block], *, rngs: nnx.Rngs):
        self.spec = spec
        width, embedded = spec.embed_dim, spec.block_tokens[0]
        kept = None
        if len(embedded) < spec.num_tokens:
            kept = tuple(t - spec.num_prefix_tokens for t in embedded[spec.num_prefix_tokens :])
        self.patch_embed = PatchEmbed(
            spec.patch_size, spec.in_channels, width, kept=kept, rngs=rngs
        )
        init = nnx.initializers.normal(width**-0.5)
        self.cls_token = Undecayed(init(rngs.params(), (1, width))) if spec.class_token else None
        self.dist_token = Undecayed(init(rngs.params(), (1, width))) if spec.distilled else None
        self.pos_embed = Undecayed(init(rngs.params(), (len(embedded), width)))
        self.blocks = nnx.List(_blocks(spec, linear, block, rngs))
        self.norm = LayerNorm(width, spec.layer_norm_eps)
        self.head = Linear(width, spec.num_classes, rngs=rngs)
        self.head_dist = Linear(width, spec.num_classes, rngs=rngs) if spec.distilled else None

    def embed(self, images: jax.Array) -> jax.Array:
        check_images(images, self.spec.image_shape)
        patches = self.patch_embed(images).reshape(images.shape[0], -1, self.spec.embed_dim)
        prefix = [
            jnp.broadcast_to(token[...], (images.shape[0], *token.shape)).astype(patches.dtype)
            for token in (self.cls_token, self.dist_token)
            if token is not None
        ]
        tokens = jnp.concatenate([*prefix, patches], axis=1) + self.pos_embed[None]
        return tokens.reshape(-1, tokens.shape[-1])

    def normalised(self, x: jax.Array) -> jax.Array:
        tokens = x if self.spec.pool == "mean" else self.norm(x)
        return tokens.reshape(-1, len(self.spec.block_tokens[-1]), x.shape[-1])

    def classify(self, x: jax.Array) -> jax.Array:
        spec, num_tokens = self.spec, len(self.spec.block_tokens[-1])
        # Not x[::num_tokens]: libtpu crashes on the gradient of a strided slice.
        tokens = x.reshape(-1, num_tokens, spec.embed_dim)
        if spec.pool == "mean":
            patches = tokens[:, spec.num_prefix_tokens :]
            return self.head(self.norm(patches.mean(1)))
        logits = self.head(self.norm(tokens[:, 0]))
        if self.head_dist is not None:
            return (logits + self.head_dist(self.norm(tokens[:, 1]))) / 2
        return logits


def _blocks(
    spec: ViTSpec, linear: MakeLinear, make_block: type[Block], rngs: nnx.Rngs
) -> Iterator[Block]:
    before = spec.block_tokens[0]
    for block, layers, into, tokens in zip(
        spec.blocks, spec.block_layers, spec.block_inputs, spec.block_tokens, strict=True
    ):
        num_left = spec.num_tokens - len(tokens)
        attention = Attention(layers.qkv, num_left, block, linear, rngs=rngs)
        selection = None
        if tokens != before:
            positions = np.searchsorted(before, tokens).tolist()
            selection = TokenSelection(len(before), tuple(positions))
        epsilon = spec.layer_norm_eps
        yield make_block(
            into, layers, block.ranks, attention, epsilon, selection, linear, rngs=rngs
        )
        before = tokens
