"""TinyViT (Wu et al. 2022) as NNX modules built from a TinyViTSpec; batch norms are folded."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flora_jax.models.functional import Undecayed
from flora_jax.models.layers import LayerNorm, Linear, MakeLinear, Mlp, check_images, gelu
from flora_jax.models.network import Block, Network, make_classifier
from flora_jax.models.tiny_vit_spec import KERNEL_SIZE, Stage, TinyViTSpec, strided
from flora_jax.models.windows import WindowAttention


class Convolution(nnx.Module):
    """x [B, n, n, C] -> [B, m, m, D], m = ceil(n / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, rngs: nnx.Rngs):
        shape = (KERNEL_SIZE, KERNEL_SIZE, in_channels, out_channels)
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(out_channels))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        product = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            (self.stride, self.stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return product + self.bias[None, None, None]


class DepthwiseConvolution(nnx.Module):
    """Each channel by itself. x [B*n*n, C] -> [B*m*m, C], m = ceil(n / stride).

    It begins as random, or as the `identity`, where no shortcut leads past it.
    """

    def __init__(
        self,
        grid_size: int,
        channels: int,
        stride: int = 1,
        identity: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        shape = (KERNEL_SIZE, KERNEL_SIZE, channels)
        if identity:
            kernel = jnp.zeros(shape).at[1, 1].set(1)
        else:
            kernel = jax.random.normal(rngs.params(), shape) * (2 / KERNEL_SIZE**2) ** 0.5
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros(channels))
        self.grid_size, self.stride = grid_size, stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """Adds up nine shifted maps: 5 to 30 times as fast as XLA's grouped convolution on CPU."""
        channels, stride = x.shape[-1], self.stride
        side, low = strided(self.grid_size, stride), 1
        # Each shift begins inside one of stride x stride phases of the map.
        phases = side + (KERNEL_SIZE - 1) // stride
        high = phases * stride - low - self.grid_size
        grid = x.reshape(-1, self.grid_size, self.grid_size, channels)
        grid = jnp.pad(grid, ((0, 0), (low, high), (low, high), (0, 0)))
        grid = grid.reshape(-1, phases, stride, phases, stride, channels)
        kernel = self.kernel[...]
        total = self.bias[None, None, None]
        for row in range(KERNEL_SIZE):
            for column in range(KERNEL_SIZE):
                (top, phase), (left, other_phase) = divmod(row, stride), divmod(column, stride)
                shifted = grid[:, top : top + side, phase, left : left + side, other_phase]
                total = total + shifted * kernel[row, column][None, None, None]
        return total.reshape(-1, channels)


class ConvolutionalEmbed(nnx.Module):
    """images [B, H, W, C] -> tokens [B*N, D]: two convolutions of stride 2, a GELU between."""

    def __init__(self, in_channels: int, width: int, *, rngs: nnx.Rngs):
        self.conv1 = Convolution(in_channels, width // 2, 2, rngs=rngs)
        self.conv2 = Convolution(width // 2, width, 2, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        grid = self.conv2(gelu(self.conv1(images)))
        return grid.reshape(-1, grid.shape[-1])


class PointDepthPoint(nnx.Module):
    """A 1 x 1, a depthwise 3 x 3 and a 1 x 1 convolution, with a GELU behind the first two."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        grid_size: int,
        stride: int,
        *,
        rngs: nnx.Rngs,
    ):
        before, inside, after = sizes
        self.conv1 = Linear(before, inside, rngs=rngs)
        self.conv2 = DepthwiseConvolution(grid_size, inside, stride, rngs=rngs)
        self.conv3 = Linear(inside, after, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv3(gelu(self.conv2(gelu(self.conv1(x)))))


class MBConv(PointDepthPoint):
    """The same, with a shortcut, and a GELU behind the sum."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return gelu(x + super().__call__(x))


class MirroredWindowAttention(WindowAttention):
    """Attention inside windows, with a learned bias per distance of rows and of columns."""

    def make_table(self, rngs: nnx.Rngs) -> None:
        self.attention_biases = Undecayed(jnp.zeros((self.windows.window_size**2, self.num_heads)))

    def bias(self) -> jax.Array:
        side = self.windows.window_size
        distance = abs(np.arange(side)[:, None] - np.arange(side))
        table = self.attention_biases.reshape(side, side, self.num_heads)
        by_rows_and_columns = table[distance][:, :, distance]
        bias = by_rows_and_columns.transpose(4, 0, 2, 1, 3)
        return bias.reshape(1, self.num_heads, side**2, side**2)


class TinyViT(Network):
    """A TinyViT: convolutions first, then blocks of attention inside windows."""

    spec: TinyViTSpec

    def __init__(
        self, spec: TinyViTSpec, linear: MakeLinear, block: type[Block], *, rngs: nnx.Rngs
    ):
        self.spec = spec
        width, inside = spec.embed_dims[0], spec.mbconv_dim
        self.patch_embed = ConvolutionalEmbed(spec.in_channels, width, rngs=rngs)
        self.mbconvs = nnx.List(
            MBConv((width, inside, width), spec.embedded_grid, 1, rngs=rngs)
            for _ in range(spec.depths[0])
        )
        self.blocks = nnx.List(_blocks(spec, linear, block, rngs))
        self.norm = LayerNorm(spec.pooled_dim, spec.layer_norm_eps)
        self.head = make_classifier(spec.pooled_dim, spec.num_classes, rngs=rngs)

    def embed(self, images: jax.Array) -> jax.Array:
        check_images(images, self.spec.image_shape)
        x = self.patch_embed(images)
        for mbconv in self.mbconvs:
            x = mbconv(x)
        return x

    def normalised(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, self.spec.stages[-1].tokens, x.shape[-1])

    def classify(self, x: jax.Array) -> jax.Array:
        pooled = self.norm(self.normalised(x).mean(1))
        return pooled if self.head is None else self.head(pooled)


def _blocks(
    spec: TinyViTSpec, linear: MakeLinear, make_block: type[Block], rngs: nnx.Rngs
) -> Iterator[Block]:
    """The blocks of all stages of attention; the first of each begins with downsampling."""
    blocks = zip(spec.blocks, spec.block_layers, spec.block_inputs, strict=True)
    for stage in spec.stages:
        for i in range(stage.depth):
            block, layers, into = next(blocks)
            windows = stage.windows
            yield make_block(
                into,
                MirroredWindowAttention(windows, layers.qkv, block, linear, rngs=rngs),
                Mlp(
                    linear(layers.fc1, block.ranks[1], rngs=rngs),
                    linear(layers.fc2, block.ranks[2], rngs=rngs),
                ),
                spec.layer_norm_eps,
                _downsampling(stage, rngs) if i == 0 else None,
                windows,
                DepthwiseConvolution(windows.grid_size, stage.width, identity=True, rngs=rngs),
            )


def _downsampling(stage: Stage, rngs: nnx.Rngs) -> PointDepthPoint:
    sizes = (stage.before, stage.width, stage.width)
    return PointDepthPoint(sizes, stage.grid_before, 2, rngs=rngs)
