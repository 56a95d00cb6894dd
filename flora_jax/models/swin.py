"""Swin Transformer (Liu et al. 2021) as NNX modules built from a SwinSpec."""

import functools
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

from flora_jax.models.functional import Undecayed
from flora_jax.models.layers import LayerNorm, Linear, MakeLinear, Mlp, check_images
from flora_jax.models.network import Block, Network, PatchEmbed, make_classifier
from flora_jax.models.swin_spec import Stage, SwinSpec
from flora_jax.models.windows import WindowAttention, Windows, relative_position_index

_HIDDEN = -100.0  # as published: the logit added between tokens that are no neighbours


class ShiftedWindowAttention(WindowAttention):
    """Attention inside windows, with a learned bias per relative position.

    Shifted windows wrap around the edges of the feature map; tokens that only meet by wrapping do
    not see each other (Swin section 3.2).
    """

    def make_table(self, rngs: nnx.Rngs) -> None:
        table = ((2 * self.windows.window_size - 1) ** 2, self.num_heads)
        init = nnx.initializers.truncated_normal(0.02)
        self.relative_position_bias_table = Undecayed(init(rngs.params(), table))

    def bias(self) -> jax.Array:
        windows = self.windows
        index = relative_position_index(windows.window_size)
        bias = self.relative_position_bias_table[index].transpose(2, 0, 1)[None]
        if windows.shift:
            mask = shift_mask(windows.grid_size, windows.window_size, windows.shift)
            bias = bias + mask[:, None].astype(bias.dtype)
        return bias


@functools.lru_cache
def shift_mask(grid_size: int, window_size: int, shift: int) -> np.ndarray:
    """float32 [windows, T, T]: 0 between neighbours, _HIDDEN between tokens met by wrapping."""
    position = np.arange(grid_size)
    region = (position >= grid_size - window_size).astype(int) + (position >= grid_size - shift)
    regions = 3 * region[:, None] + region
    windows = grid_size // window_size
    tiles = regions.reshape(windows, window_size, windows, window_size).swapaxes(1, 2)
    tiles = tiles.reshape(windows**2, window_size**2)
    return np.where(tiles[:, :, None] == tiles[:, None, :], 0, _HIDDEN).astype(np.float32)


class PatchMerging(nnx.Module):
    """Each 2 x 2 patches become one of twice the width. x [B*N, C] -> [B*N/4, 2C]."""

    def __init__(self, stage: Stage, epsilon: float, *, rngs: nnx.Rngs):
        self.grid_size = stage.grid_size
        self.norm = LayerNorm(4 * stage.width, epsilon)
        self.reduction = Linear(4 * stage.width, 2 * stage.width, bias_features=0, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.reduction(self.norm(self.side_by_side(x)))

    def side_by_side(self, x: jax.Array) -> jax.Array:
        """Puts four patches into one row: [B*N, C] -> [B*N/4, 4C]."""
        half, channels = self.grid_size // 2, x.shape[-1]
        grid = x.reshape(-1, half, 2, half, 2, channels)
        # The published order of the four: down the left column, then down the right one.
        return grid.transpose(0, 1, 3, 4, 2, 5).reshape(-1, 4 * channels)


class Swin(Network):
    """A Swin Transformer: attention inside windows, fewer and wider patches from stage to stage."""

    spec: SwinSpec

    def __init__(self, spec: SwinSpec, linear: MakeLinear, block: type[Block], *, rngs: nnx.Rngs):
        self.spec = spec
        epsilon = spec.layer_norm_eps
        norm = LayerNorm(spec.embed_dim, epsilon) if spec.patch_norm else None
        self.patch_embed = PatchEmbed(
            spec.patch_size, spec.in_channels, spec.embed_dim, norm, rngs=rngs
        )
        init = nnx.initializers.normal(spec.embed_dim**-0.5)
        shape = (spec.grid_size**2, spec.embed_dim)
        self.absolute_pos_embed = (
            Undecayed(init(rngs.params(), shape)) if spec.absolute_pos_embed else None
        )
        self.blocks = nnx.List(_blocks(spec, linear, block, rngs))
        self.norm = LayerNorm(spec.pooled_dim, epsilon)
        self.head = make_classifier(spec.pooled_dim, spec.num_classes, rngs=rngs)

    def embed(self, images: jax.Array) -> jax.Array:
        check_images(images, self.spec.image_shape)
        x = self.patch_embed(images)
        if self.absolute_pos_embed is not None:
            position = self.absolute_pos_embed[...]
            x = (x.reshape(-1, *position.shape) + position[None]).reshape(x.shape)
        return x

    def normalised(self, x: jax.Array) -> jax.Array:
        return self.norm(x).reshape(-1, self.spec.stages[-1].tokens, x.shape[-1])

    def classify(self, x: jax.Array) -> jax.Array:
        pooled = self.normalised(x).mean(1)
        return pooled if self.head is None else self.head(pooled)


def _blocks(
    spec: SwinSpec, linear: MakeLinear, make_block: type[Block], rngs: nnx.Rngs
) -> Iterator[Block]:
    """The blocks of all stages; the first of each later stage merges patches."""
    blocks = zip(spec.blocks, spec.block_layers, spec.block_inputs, strict=True)
    before, epsilon = None, spec.layer_norm_eps
    for stage in spec.stages:
        for i in range(stage.depth):
            block, layers, into = next(blocks)
            shift = stage.shift if i % 2 else 0
            windows = Windows(stage.grid_size, stage.window_size, shift)
            attention = ShiftedWindowAttention(windows, layers.qkv, block, linear, rngs=rngs)
            merging = None
            if i == 0 and before is not None:
                merging = PatchMerging(before, epsilon, rngs=rngs)
            mlp = Mlp(
                linear(layers.fc1, block.ranks[1], rngs=rngs),
                linear(layers.fc2, block.ranks[2], rngs=rngs),
            )
            yield make_block(into, attention, mlp, epsilon, merging, windows)
        before = stage
