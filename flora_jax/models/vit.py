"""DeiT (Touvron et al. 2021) as NNX modules built from a ViTSpec."""

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.block import Block, PatchEmbed, run_blocks
from flora_jax.models.layers import LayerNorm, Linear, check_images, make_linear
from flora_jax.models.spec import BlockSpec
from flora_jax.models.vit_spec import ViTSpec


class Attention(nnx.Module):
    """Multi-head self-attention over the N tokens of each image."""

    def __init__(
        self, width: int, num_tokens: int, block: BlockSpec, qkv_bias: bool, *, rngs: nnx.Rngs
    ):
        self.num_heads, self.head_dim = block.num_heads, block.head_dim
        self.num_tokens = num_tokens
        self.qkv = make_linear(
            width, 3 * block.attention_dim, block.ranks[0], use_bias=qkv_bias, rngs=rngs
        )
        self.proj = Linear(block.attention_dim, width, rngs=rngs)

    def __call__(self, x: jax.Array, gene: jax.Array | None = None) -> jax.Array:
        qkv = self.qkv(x, gene).reshape(-1, self.num_tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        mixed = jax.nn.dot_product_attention(query, key, value)
        return self.proj(mixed.reshape(x.shape[0], self.num_heads * self.head_dim))


class ViT(nnx.Module):
    """images float32 [B, H, W, C], normalised -> logits [B, num_classes].

    Raises:
      ValueError: the images have another shape than the spec's, or are not floating point.
    """

    def __init__(self, spec: ViTSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        width, epsilon = spec.embed_dim, spec.layer_norm_eps
        self.patch_embed = PatchEmbed(spec.patch_size, spec.in_channels, width, rngs=rngs)
        init = nnx.initializers.normal(width**-0.5)
        self.cls_token = nnx.Param(init(rngs.params(), (1, width))) if spec.class_token else None
        self.dist_token = nnx.Param(init(rngs.params(), (1, width))) if spec.distilled else None
        self.pos_embed = nnx.Param(init(rngs.params(), (spec.num_tokens, width)))
        self.blocks = nnx.List([self._block(block, rngs) for block in spec.blocks])
        self.norm = LayerNorm(width, epsilon)
        self.head = Linear(width, spec.num_classes, rngs=rngs)
        self.head_dist = Linear(width, spec.num_classes, rngs=rngs) if spec.distilled else None

    def _block(self, block: BlockSpec, rngs: nnx.Rngs) -> Block:
        spec = self.spec
        attention = Attention(spec.embed_dim, spec.num_tokens, block, spec.qkv_bias, rngs=rngs)
        return Block(spec.embed_dim, block, attention, spec.layer_norm_eps, rngs=rngs)

    def embed(self, images: jax.Array) -> jax.Array:
        """images [B, H, W, C] -> tokens [B*N, D], positions added."""
        check_images(images, self.spec.image_shape)
        patches = self.patch_embed(images).reshape(images.shape[0], -1, self.spec.embed_dim)
        prefix = [
            jnp.broadcast_to(token, (images.shape[0], *token.shape)).astype(patches.dtype)
            for token in (self.cls_token, self.dist_token)
            if token is not None
        ]
        tokens = jnp.concatenate([*prefix, patches], axis=1) + self.pos_embed
        return tokens.reshape(-1, tokens.shape[-1])

    def classify(self, x: jax.Array) -> jax.Array:
        """tokens [B*N, D] -> logits [B, num_classes]."""
        spec = self.spec
        if spec.pool == "mean":
            patches = x.reshape(-1, spec.num_tokens, spec.embed_dim)[:, spec.num_prefix_tokens :]
            return self.head(self.norm(patches.mean(1)))
        logits = self.head(self.norm(x[:: spec.num_tokens]))
        if spec.distilled:
            return (logits + self.head_dist(self.norm(x[1 :: spec.num_tokens]))) / 2
        return logits

    def __call__(self, images: jax.Array, genes: jax.Array | None = None) -> jax.Array:
        return self.classify(run_blocks(self.blocks, self.embed(images), genes))
