"""DeiT (Touvron et al. 2021) as NNX modules built from a ViTSpec."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flora_jax.models.attention import attend, merge_heads, split_heads
from flora_jax.models.block import Block, PatchEmbed, run_blocks
from flora_jax.models.layers import LayerNorm, Linear, check_images, make_linear
from flora_jax.models.loop import Loop
from flora_jax.models.spec import BlockSpec
from flora_jax.models.vit_spec import ViTSpec


class Attention(nnx.Module):
    """Multi-head self-attention over the N tokens of each image.

    Tokens that left before (`num_left`) would all be the same here: their input is zero, so their
    key and value are qkv's bias. One constant of that key and value stands for them, with
    log(num_left) added to its logit, which is exact.
    """

    def __init__(
        self,
        width: int,
        num_tokens: int,
        num_left: int,
        block: BlockSpec,
        qkv_bias: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.head_dim = block.num_heads, block.head_dim
        self.num_tokens, self.num_left = num_tokens, num_left
        self.qkv = make_linear(
            width, 3 * block.attention_dim, block.ranks[0], use_bias=qkv_bias, rngs=rngs
        )
        self.proj = Linear(block.attention_dim, width, rngs=rngs)

    def __call__(self, x: jax.Array, gene: jax.Array | None = None) -> jax.Array:
        query, key, value = split_heads(self.qkv(x, gene), self.num_tokens, self.num_heads)
        bias = np.zeros(self.num_tokens + bool(self.num_left), np.float32)
        if self.num_left:
            key, value = self._with_constant(key, 1), self._with_constant(value, 2)
            bias[-1] = np.log(self.num_left)
        return self.proj(merge_heads(attend(query, key, value, bias)))

    def _with_constant(self, tokens: jax.Array, part: int) -> jax.Array:
        """[B, H, N, d] -> [B, H, N+1, d]: qkv's bias of this part (1 key, 2 value) at the end."""
        constant = jnp.zeros_like(tokens[:, :, :1])
        if self.qkv.bias is not None:
            constant += self.qkv.bias[...].reshape(3, self.num_heads, 1, self.head_dim)[part]
        return jnp.concatenate([tokens, constant], axis=2)


class TokenSelection(nnx.Module):
    """x [B*N, D] -> the tokens at `positions` of each image, [B*len(positions), D]."""

    def __init__(self, num_tokens: int, positions: tuple[int, ...]):
        self.num_tokens, self.positions = num_tokens, positions

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = x.reshape(-1, self.num_tokens, x.shape[-1])
        return tokens[:, np.array(self.positions)].reshape(-1, x.shape[-1])


class ViT(nnx.Module):
    """images float32 [B, H, W, C], normalised -> logits [B, num_classes].

    Raises:
      ValueError: the images have another shape than the spec's, or are not floating point.
    """

    def __init__(self, spec: ViTSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.loop: Loop | None = None
        width, embedded = spec.embed_dim, spec.block_tokens[0]
        kept = None
        if len(embedded) < spec.num_tokens:
            kept = tuple(t - spec.num_prefix_tokens for t in embedded[spec.num_prefix_tokens :])
        self.patch_embed = PatchEmbed(
            spec.patch_size, spec.in_channels, width, kept=kept, rngs=rngs
        )
        init = nnx.initializers.normal(width**-0.5)
        self.cls_token = nnx.Param(init(rngs.params(), (1, width))) if spec.class_token else None
        self.dist_token = nnx.Param(init(rngs.params(), (1, width))) if spec.distilled else None
        self.pos_embed = nnx.Param(init(rngs.params(), (len(embedded), width)))
        self.blocks = nnx.List(_blocks(spec, rngs))
        self.norm = LayerNorm(width, spec.layer_norm_eps)
        self.head = Linear(width, spec.num_classes, rngs=rngs)
        self.head_dist = Linear(width, spec.num_classes, rngs=rngs) if spec.distilled else None

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
        spec, num_tokens = self.spec, len(self.spec.block_tokens[-1])
        # Not x[::num_tokens]: libtpu crashes on the gradient of a strided slice.
        tokens = x.reshape(-1, num_tokens, spec.embed_dim)
        if spec.pool == "mean":
            patches = tokens[:, spec.num_prefix_tokens :]
            return self.head(self.norm(patches.mean(1)))
        logits = self.head(self.norm(tokens[:, 0]))
        if spec.distilled:
            return (logits + self.head_dist(self.norm(tokens[:, 1]))) / 2
        return logits

    def __call__(self, images: jax.Array, genes: jax.Array | None = None) -> jax.Array:
        run = self.loop or run_blocks
        return self.classify(run(self.blocks, self.embed(images), genes))


def _blocks(spec: ViTSpec, rngs: nnx.Rngs):
    before = spec.block_tokens[0]
    for block, tokens in zip(spec.blocks, spec.block_tokens, strict=True):
        num_left = spec.num_tokens - len(tokens)
        attention = Attention(
            spec.embed_dim, len(tokens), num_left, block, spec.qkv_bias, rngs=rngs
        )
        selection = None
        if tokens != before:
            positions = np.searchsorted(before, tokens).tolist()
            selection = TokenSelection(len(before), tuple(positions))
        yield Block(spec.embed_dim, block, attention, spec.layer_norm_eps, selection, rngs=rngs)
        before = tokens
