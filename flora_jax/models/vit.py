"""DeiT (Touvron et al. 2021) and the plain ViTs like it, as NNX modules built from a ViTSpec."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flora_jax.models.functional import Undecayed
from flora_jax.models.layers import (
    Attention,
    LayerNorm,
    Linear,
    MakeLinear,
    Mlp,
    PartialLayerNorm,
    attend,
    check_images,
    merge_heads,
    split_heads,
    whole_bias,
)
from flora_jax.models.network import Block, Network, PatchEmbed, make_classifier
from flora_jax.models.spec import BlockSpec, LinearShape
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.models.windows import relative_position_index


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Turns each pair (i, i + d/2) of a query's or key's dimensions by its patch's position.

    The first half of an uncut head's pairs turns with y, the second with x; their periods grow
    geometrically towards theta. Tokens before those of the patches are not turned.

    Attributes:
      grid_size: patches a side.
      length, offset: of the ViTSpec's `rope_grid` and `rope_offset`.
      head_dim: of the uncut head, a multiple of 4.
      num_prefix_tokens: before the patches.
      tokens: numbers of the tokens that there are, counted in the uncut image; None for all.
      pairs: of each head, numbers of the pairs that it has, in the uncut head; None for all.
    """

    theta: float
    grid_size: int
    head_dim: int
    num_prefix_tokens: int
    length: float | None = None
    offset: float = 0
    tokens: tuple[int, ...] | None = None
    pairs: tuple[tuple[int, ...], ...] | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, N, d] -> the same, turned; computed in float32."""
        cos, sin = tables(self)
        wide = x.astype(jnp.float32)
        first, second = jnp.split(wide, 2, axis=-1)
        turned = wide * cos[None] + jnp.concatenate([-second, first], axis=-1) * sin[None]
        return turned.astype(x.dtype)


@functools.lru_cache(maxsize=64)
def tables(rotary: Rotary) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine, float32 [H, N, d]; [1, N, d] where all heads are alike."""
    periods = rotary.theta ** (np.arange(rotary.head_dim // 4) / (rotary.head_dim // 4))
    if rotary.length is None:
        places = 2 * np.pi * ((np.arange(rotary.grid_size) + 0.5) / rotary.grid_size * 2 - 1)
    else:
        places = (np.arange(rotary.grid_size) + rotary.offset) / rotary.grid_size * rotary.length
    grid = np.stack(np.meshgrid(places, places, indexing="ij"), -1).reshape(-1, 2)  # y, x
    angles = (grid[:, :, None] / periods).reshape(len(grid), -1)
    angles = np.concatenate([np.zeros((rotary.num_prefix_tokens, angles.shape[1])), angles])
    if rotary.tokens is not None:
        angles = angles[np.array(rotary.tokens)]
    by_head = angles[None] if rotary.pairs is None else angles[:, np.array(rotary.pairs)]
    by_head = by_head if rotary.pairs is None else by_head.transpose(1, 0, 2)
    both = np.concatenate([by_head, by_head], axis=-1)
    return np.cos(both).astype(np.float32), np.sin(both).astype(np.float32)


class SelfAttention(Attention):
    """Multi-head self-attention over the N tokens of each image.

    Tokens that left before (`num_left`) would all be the same here: their input is zero, so their
    key and value are qkv's bias. One constant of that key and value stands for them, with
    log(num_left) added to its logit, which is exact.

    Positions that are `rotary` turn queries and keys. A table of `num_relative` ones holds a bias
    for each distance of two patches, then from the class token, to it, and its own (BEiT).
    """

    def __init__(
        self,
        qkv: LinearShape,
        num_left: int,
        block: BlockSpec,
        rotary: Rotary | None,
        linear: MakeLinear,
        *,
        num_relative: int = 0,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.head_dim = block.num_heads, block.head_dim
        self.num_tokens, self.num_left, self.rotary = qkv.tokens, num_left, rotary
        self.qkv = linear(qkv, block.ranks[0], rngs=rngs)
        self.proj = Linear(block.attention_dim, qkv.in_features, rngs=rngs)
        init, shape = nnx.initializers.truncated_normal(0.02), (num_relative, block.num_heads)
        self.relative_position_bias_table = (
            Undecayed(init(rngs.params(), shape)) if num_relative else None
        )

    def context(self, x: jax.Array) -> jax.Array:
        query, key, value = split_heads(self.qkv(x), self.num_tokens, self.num_heads)
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        bias = np.zeros((1, 1, 1, self.num_tokens + bool(self.num_left)), np.float32)
        if self.num_left:
            key, value = self._with_constant(key, 1), self._with_constant(value, 2)
            bias[..., -1] = np.log(self.num_left)
        elif (table := self.relative_position_bias_table) is not None:
            by_pair = table[distance_index(self.num_tokens - 1)]
            return merge_heads(attend(query, key, value, by_pair.transpose(2, 0, 1)[None]))
        return merge_heads(attend(query, key, value, bias))

    def _with_constant(self, tokens: jax.Array, part: int) -> jax.Array:
        """Appends qkv's bias of a part (1 key, 2 value) to tokens [B, H, N, d]: [B, H, N+1, d]."""
        constant = jnp.zeros_like(tokens[:, :, :1])
        if self.qkv.bias is not None:
            bias = whole_bias(self.qkv.bias[...], 3 * self.num_heads * self.head_dim)
            constant += bias.reshape(3, 1, self.num_heads, 1, self.head_dim)[part]
        return jnp.concatenate([tokens, constant], axis=2)


@functools.lru_cache
def distance_index(num_patches: int) -> np.ndarray:
    """[N, N]: the row of a table of relative positions for two tokens, the class token first."""
    grid_size = math.isqrt(num_patches)
    index = np.pad(relative_position_index(grid_size), ((1, 0), (1, 0)))
    last = (2 * grid_size - 1) ** 2
    index[0, :], index[:, 0], index[0, 0] = last, last + 1, last + 2
    return index


class TokenSelection(nnx.Module):
    """x [B*N, D] -> the tokens at `positions` of each image, [B*len(positions), D]."""

    def __init__(self, num_tokens: int, positions: tuple[int, ...]):
        self.num_tokens, self.positions = num_tokens, positions

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = x.reshape(-1, self.num_tokens, x.shape[-1])
        return tokens[:, np.array(self.positions)].reshape(-1, x.shape[-1])


class AttentionPool(nnx.Module):
    """Tokens [B, N, D] -> [B, D]: a learned query attends to all of them, then an MLP (SigLIP).

    It is no searchable layer: for one query it costs little, and its kernels stay dense.
    """

    def __init__(self, spec: ViTSpec, *, rngs: nnx.Rngs):
        width, self.num_heads = spec.embed_dim, spec.pool_num_heads or spec.num_heads
        init = nnx.initializers.normal(width**-0.5)
        self.latent = Undecayed(init(rngs.params(), (1, width)))
        self.q = Linear(width, width, rngs=rngs)
        self.kv = Linear(width, 2 * width, rngs=rngs)
        self.proj = Linear(width, width, rngs=rngs)
        self.norm = LayerNorm(width, spec.layer_norm_eps)
        hidden = spec.pool_mlp_dim
        fc1, fc2 = Linear(width, hidden, rngs=rngs), Linear(hidden, width, rngs=rngs)
        self.mlp = Mlp(fc1, fc2, spec.activation)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        batch, num_tokens, width = tokens.shape
        query = self.q(self.latent[...]).reshape(1, self.num_heads, 1, -1)
        query = jnp.broadcast_to(query, (batch, *query.shape[1:]))
        key_value = self.kv(tokens.reshape(-1, width))
        key, value = key_value.reshape(batch, num_tokens, 2, self.num_heads, -1).transpose(
            2, 0, 3, 1, 4
        )
        x = self.proj(merge_heads(attend(query, key, value, np.zeros((1, 1, 1, 1), np.float32))))
        return x + self.mlp(self.norm(x))


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
            spec.patch_size, spec.in_channels, width, kept=kept, bias=spec.patch_bias, rngs=rngs
        )
        init = nnx.initializers.normal(width**-0.5)

        def embedding(number: int) -> Undecayed | None:
            return Undecayed(init(rngs.params(), (number, width))) if number else None

        self.cls_token = embedding(int(spec.class_token))
        self.dist_token = embedding(int(spec.distilled))
        self.reg_token = embedding(spec.num_registers)
        self.pos_embed = embedding(spec.num_positions)
        self.norm_pre = LayerNorm(width, spec.layer_norm_eps) if spec.pre_norm else None
        self.blocks = nnx.List(_blocks(spec, linear, block, rngs))
        self.norm = LayerNorm(width, spec.layer_norm_eps)
        self.attn_pool = AttentionPool(spec, rngs=rngs) if spec.pool == "attention" else None
        classifier = (spec.pooled_dim, spec.num_classes, spec.head_bias)
        self.head = make_classifier(*classifier, rngs=rngs)
        self.head_dist = make_classifier(*classifier, rngs=rngs) if spec.distilled else None

    def embed(self, images: jax.Array) -> jax.Array:
        check_images(images, self.spec.image_shape)
        patches = self.patch_embed(images).reshape(images.shape[0], -1, self.spec.embed_dim)
        if self.pos_embed is not None and self.spec.positions == "patches":
            patches = patches + self.pos_embed[None]
        prefix = [
            jnp.broadcast_to(token[...], (images.shape[0], *token.shape)).astype(patches.dtype)
            for token in (self.cls_token, self.dist_token, self.reg_token)
            if token is not None
        ]
        tokens = jnp.concatenate([*prefix, patches], axis=1)
        if self.pos_embed is not None and self.spec.positions == "all":
            tokens = tokens + self.pos_embed[None]
        x = tokens.reshape(-1, tokens.shape[-1])
        return x if self.norm_pre is None else self.norm_pre(x)

    def normalised(self, x: jax.Array) -> jax.Array:
        return self._by_image(x if self.spec.normalises_pooled else self.norm(x))

    def classify(self, x: jax.Array) -> jax.Array:
        spec, prefix = self.spec, self.spec.num_prefix_tokens
        if spec.pool == "token":
            # Not x[::num_tokens]: libtpu crashes on the gradient of a strided slice.
            tokens = self._by_image(x)
            logits = _classified(self.head, self.norm(tokens[:, 0]))
            if not spec.distilled:
                return logits
            return (logits + _classified(self.head_dist, self.norm(tokens[:, 1]))) / 2
        tokens = self.normalised(x)
        if self.attn_pool is not None:
            return _classified(self.head, self.attn_pool(tokens))
        mean = tokens[:, prefix:].mean(1)
        if spec.normalises_pooled:
            mean = self.norm(mean)
        if spec.pool == "token_and_mean":
            mean = jnp.concatenate([tokens[:, 0], mean], axis=-1)
        return _classified(self.head, mean)

    def _by_image(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, len(self.spec.block_tokens[-1]), x.shape[-1])


def _classified(head: Linear | None, pooled: jax.Array) -> jax.Array:
    return pooled if head is None else head(pooled)


def _blocks(
    spec: ViTSpec, linear: MakeLinear, make_block: type[Block], rngs: nnx.Rngs
) -> Iterator[Block]:
    before = spec.block_tokens[0]
    for block, layers, into, tokens in zip(
        spec.blocks, spec.block_layers, spec.block_inputs, spec.block_tokens, strict=True
    ):
        num_left = spec.num_tokens - len(tokens)
        rotary = _rotary(spec, block, tokens)
        attention = SelfAttention(
            *(layers.qkv, num_left, block, rotary, linear),
            num_relative=spec.num_relative_positions,
            rngs=rngs,
        )
        mlp = Mlp(
            linear(layers.fc1, block.ranks[1], rngs=rngs),
            linear(layers.fc2, block.ranks[2], rngs=rngs),
            spec.activation,
            spec.gated_mlp,
            _mlp_norm(spec, block),
        )
        selection = None
        if tokens != before:
            positions = np.searchsorted(before, tokens).tolist()
            selection = TokenSelection(len(before), tuple(positions))
        yield make_block(into, attention, mlp, spec.layer_norm_eps, selection)
        before = tokens


def _mlp_norm(spec: ViTSpec, block: BlockSpec) -> LayerNorm | None:
    if not spec.mlp_norm:
        return None
    return PartialLayerNorm(block.mlp_dim, spec.mlp_dim, spec.layer_norm_eps)


def _rotary(spec: ViTSpec, block: BlockSpec, tokens: tuple[int, ...]) -> Rotary | None:
    if spec.rope_theta is None:
        return None
    return Rotary(
        theta=spec.rope_theta,
        grid_size=spec.image_size // spec.patch_size,
        head_dim=spec.embed_dim // spec.num_heads,
        num_prefix_tokens=spec.num_prefix_tokens,
        length=spec.rope_grid,
        offset=spec.rope_offset,
        tokens=None if len(tokens) == spec.num_tokens else tokens,
        pairs=block.rotary_pairs,
    )
