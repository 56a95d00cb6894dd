"""DeiT (Touvron et al. 2021) as NNX modules built from a ViTSpec."""

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.layers import LayerNorm, Linear, make_linear
from flora_jax.models.spec import BlockSpec, ViTSpec


class Attention(nnx.Module):
    """Multi-head self-attention over the N tokens of each image."""

    def __init__(self, embed_dim: int, num_tokens: int, block: BlockSpec, *, rngs: nnx.Rngs):
        self.num_heads, self.head_dim, self.num_tokens = (
            block.num_heads,
            block.head_dim,
            num_tokens,
        )
        attention_dim = block.num_heads * block.head_dim
        self.qkv = make_linear(embed_dim, 3 * attention_dim, block.ranks[0], rngs=rngs)
        self.proj = Linear(attention_dim, embed_dim, rngs=rngs)

    def __call__(self, x: jax.Array, gene: jax.Array | None = None) -> jax.Array:
        qkv = self.qkv(x, gene).reshape(-1, self.num_tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        mixed = jax.nn.dot_product_attention(query, key, value)
        return self.proj(mixed.reshape(x.shape[0], self.num_heads * self.head_dim))


class Mlp(nnx.Module):
    def __init__(self, embed_dim: int, block: BlockSpec, *, rngs: nnx.Rngs):
        self.fc1 = make_linear(embed_dim, block.mlp_dim, block.ranks[1], rngs=rngs)
        self.fc2 = make_linear(block.mlp_dim, embed_dim, block.ranks[2], rngs=rngs)

    def __call__(self, x: jax.Array, genes=(None, None)) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x, genes[0]), approximate=False), genes[1])


class Block(nnx.Module):
    """Pre-norm block, in two halves so that a search can score them apart. x [B*N, D]."""

    def __init__(self, embed_dim: int, num_tokens: int, block: BlockSpec, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(embed_dim)
        self.attn = Attention(embed_dim, num_tokens, block, rngs=rngs)
        self.norm2 = LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, block, rngs=rngs)

    def attention_half(self, x: jax.Array, gene: jax.Array | None = None) -> jax.Array:
        return x + self.attn(self.norm1(x), gene)

    def mlp_half(self, x: jax.Array, genes=(None, None)) -> jax.Array:
        return x + self.mlp(self.norm2(x), genes)

    def __call__(self, x: jax.Array, genes=(None, None, None)) -> jax.Array:
        return self.mlp_half(self.attention_half(x, genes[0]), genes[1:])


class PatchEmbed(nnx.Module):
    """images [B, H, W, C] -> patches projected to [B, N, D]."""

    def __init__(self, patch_size: int, in_channels: int, embed_dim: int, *, rngs: nnx.Rngs):
        self.patch_size = patch_size
        self.proj = Linear(patch_size * patch_size * in_channels, embed_dim, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        batch, height, width, channels = images.shape
        size = self.patch_size
        grid = images.reshape(batch, height // size, size, width // size, size, channels)
        patches = grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, size * size * channels)
        return self.proj(patches).reshape(batch, -1, self.proj.bias.shape[0])


class ViT(nnx.Module):
    """images float32 [B, H, W, C], normalised -> logits [B, num_classes].

    Raises:
      ValueError: the images have another shape than the spec's, or are not floating point.
    """

    def __init__(self, spec: ViTSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        width = spec.embed_dim
        self.patch_embed = PatchEmbed(spec.patch_size, spec.in_channels, width, rngs=rngs)
        init = nnx.initializers.normal(width**-0.5)
        self.cls_token = nnx.Param(init(rngs.params(), (1, width)))
        self.pos_embed = nnx.Param(init(rngs.params(), (spec.num_tokens, width)))
        self.blocks = nnx.List(
            [Block(width, spec.num_tokens, block, rngs=rngs) for block in spec.blocks]
        )
        self.norm = LayerNorm(width)
        self.head = Linear(width, spec.num_classes, rngs=rngs)

    def embed(self, images: jax.Array) -> jax.Array:
        """images [B, H, W, C] -> tokens [B*N, D], positions added."""
        check_images(images, self.spec.image_shape)
        patches = self.patch_embed(images)
        cls = jnp.broadcast_to(self.cls_token, (images.shape[0], *self.cls_token.shape))
        tokens = jnp.concatenate([cls.astype(patches.dtype), patches], axis=1) + self.pos_embed
        return tokens.reshape(-1, tokens.shape[-1])

    def classify(self, x: jax.Array) -> jax.Array:
        """tokens [B*N, D] -> logits [B, num_classes], read off the class token."""
        return self.head(self.norm(x[:: self.spec.num_tokens]))

    def __call__(self, images: jax.Array, genes: jax.Array | None = None) -> jax.Array:
        x = self.embed(images)
        for i, block in enumerate(self.blocks):
            x = block(x, (None,) * 3 if genes is None else genes[3 * i : 3 * i + 3])
        return self.classify(x)


def check_images(images: jax.Array, image_shape: tuple[int, int, int]) -> None:
    if images.ndim != 4 or images.shape[1:] != image_shape:
        raise ValueError(
            f"images have shape {tuple(images.shape)}; expected [B, {image_shape[0]}, "
            f"{image_shape[1]}, {image_shape[2]}] (batch, height, width, channels)"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images have dtype {images.dtype}; expected normalised floating point images, float32"
        )
