"""Swin Transformer (Liu et al. 2021), and its version 2 (2022), as NNX modules of a SwinSpec."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flora_jax.models.functional import Undecayed
from flora_jax.models.layers import LayerNorm, Linear, MakeLinear, Mlp, check_images
from flora_jax.models.network import Block, Network, PatchEmbed, make_classifier
from flora_jax.models.swin_spec import POSITION_DIM, Stage, SwinSpec
from flora_jax.models.windows import WindowAttention, Windows, relative_position_index

_HIDDEN = -100.0  # as published: the logit added between tokens that are no neighbours
LARGEST_LOG_SCALE, _LARGEST_BIAS = np.log(100.0), 16.0  # of cosines and positions, as published


class ShiftedWindowAttention(WindowAttention):
    """Attention inside windows, with a learned bias per relative position.

    Shifted windows wrap around the edges of the feature map; tokens that only meet by wrapping do
    not see each other (Swin section 3.2).
    """

    def make_table(self, rngs: nnx.Rngs) -> None:
        table = ((2 * self.windows.window_size - 1) ** 2, self.num_heads)
        init = nnx.initializers.truncated_normal(0.02)
        self.relative_position_bias_table = Undecayed(init(rngs.params(), table))

    def table(self) -> jax.Array:
        """The bias of each relative position, [(2w-1)^2, H]."""
        return self.relative_position_bias_table[...]

    def bias(self) -> jax.Array:
        index = relative_position_index(self.windows.window_size)
        bias = self.table()[index].transpose(2, 0, 1)[None]
        if self.windows.shift:
            bias = bias + shift_mask(self.windows)[:, None].astype(bias.dtype)
        return bias


class PositionMlp(nnx.Module):
    """Relative positions [M, 2] on a logarithmic scale -> a value of each head [M, H]."""

    def __init__(self, num_heads: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(2, POSITION_DIM, rngs=rngs)
        self.fc2 = Linear(POSITION_DIM, num_heads, bias_features=0, rngs=rngs)
        for layer in (self.fc1, self.fc2):
            layer.kernel = Undecayed(layer.kernel[...])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.relu(self.fc1(x)))


class CosineWindowAttention(ShiftedWindowAttention):
    """Attention by the cosine of query and key, with a bias that is continuous in position.

    The logits are the cosine times a learned scale of each head, of at most 100 (Swin V2 section
    3.2), and 16 sigmoid(MLP(relative position)) (section 3.3), where `pretrained_window` is the
    window whose corners the MLP knows as its farthest positions.
    """

    def __init__(self, *arguments, pretrained_window: int, rngs: nnx.Rngs):
        super().__init__(*arguments, rngs=rngs)
        self.pretrained_window = pretrained_window

    def make_table(self, rngs: nnx.Rngs) -> None:
        self.logit_scale = Undecayed(jnp.full(self.num_heads, np.log(10.0)))
        self.cpb_mlp = PositionMlp(self.num_heads, rngs=rngs)

    def scale(self) -> jax.Array:
        """What multiplies the cosines of each head, [H]."""
        return jnp.exp(jnp.minimum(self.logit_scale[...], LARGEST_LOG_SCALE))

    def table(self) -> jax.Array:
        positions = log_positions(self.windows.window_size, self.pretrained_window)
        bias = self.cpb_mlp(jnp.asarray(positions, self.logit_scale.dtype))
        return _LARGEST_BIAS * jax.nn.sigmoid(bias)

    def compared(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = self.scale() * query.shape[-1] ** 0.5  # by which attention divides
        return _unit(query) * scale[None, None, :, None, None], _unit(key)


def _unit(x: jax.Array) -> jax.Array:
    """Vectors [..., d] at length 1; one of zeros, as of what pads windows, has no direction."""
    wide = x.astype(jnp.float32)
    square = (wide * wide).sum(-1, keepdims=True)
    is_zero = square < 1e-24
    inverse = jnp.where(is_zero, 0, jax.lax.rsqrt(jnp.where(is_zero, 1, square)))
    return (wide * inverse).astype(x.dtype)


@functools.lru_cache
def log_positions(window_size: int, pretrained_window: int) -> np.ndarray:
    """float32 [(2w-1)^2, 2]: relative rows and columns, farthest at 1.06 in the known window."""
    apart = 8 * np.arange(1 - window_size, window_size) / max(pretrained_window - 1, 1)
    stretched = np.sign(apart) * np.log2(abs(apart) + 1) / np.log2(8)
    grid = np.stack(np.meshgrid(stretched, stretched, indexing="ij"), -1)
    return grid.reshape(-1, 2).astype(np.float32)


@functools.lru_cache
def shift_mask(of_map: Windows) -> np.ndarray:
    """float32 [windows, T, T]: 0 between neighbours, _HIDDEN between tokens met by wrapping."""
    window_size, shift = of_map.window_size, of_map.shift
    grid_size = of_map.grid_size + of_map.padding
    position = np.arange(grid_size)
    region = (position >= grid_size - window_size).astype(int) + (position >= grid_size - shift)
    regions = 3 * region[:, None] + region
    windows = grid_size // window_size
    tiles = regions.reshape(windows, window_size, windows, window_size).swapaxes(1, 2)
    tiles = tiles.reshape(windows**2, window_size**2)
    return np.where(tiles[:, :, None] == tiles[:, None, :], 0, _HIDDEN).astype(np.float32)


class PatchMerging(nnx.Module):
    """Each 2 x 2 patches become one of twice the width. x [B*N, C] -> [B*N/4, 2C]."""

    def __init__(self, stage: Stage, epsilon: float, post_norm: bool, *, rngs: nnx.Rngs):
        self.grid_size, self.post_norm = stage.grid_size, post_norm
        self.norm = LayerNorm((2 if post_norm else 4) * stage.width, epsilon)
        self.reduction = Linear(4 * stage.width, 2 * stage.width, bias_features=0, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.side_by_side(x)
        return self.norm(self.reduction(x)) if self.post_norm else self.reduction(self.norm(x))

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
    pretrained = spec.pretrained_window_sizes or (0,) * len(spec.stages)
    for stage, known_window in zip(spec.stages, pretrained, strict=True):
        make_attention: Callable[..., ShiftedWindowAttention] = ShiftedWindowAttention
        if spec.cosine_attention:
            known_window = known_window or stage.window_size
            make_attention = functools.partial(
                CosineWindowAttention, pretrained_window=known_window
            )
        for i in range(stage.depth):
            block, layers, into = next(blocks)
            shift = stage.shift if i % 2 else 0
            windows = Windows(stage.grid_size, stage.window_size, shift)
            attention = make_attention(windows, layers.qkv, block, linear, rngs=rngs)
            merging = None
            if i == 0 and before is not None:
                merging = PatchMerging(before, epsilon, spec.post_norm, rngs=rngs)
            mlp = Mlp(
                linear(layers.fc1, block.ranks[1], rngs=rngs),
                linear(layers.fc2, block.ranks[2], rngs=rngs),
            )
            parts = (attention, mlp, epsilon, merging, windows)
            yield make_block(into, *parts, post_norm=spec.post_norm)
        before = stage
