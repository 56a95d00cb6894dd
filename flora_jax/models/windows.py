"""Attention inside square windows of a feature map: what Swin and TinyViT have in common."""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flora_jax.models.layers import Attention, Linear, MakeLinear, attend, merge_heads, split_heads
from flora_jax.models.spec import BlockSpec, LinearShape


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows that the tokens of a square feature map are cut into.

    Windows that do not tile the map are filled up with zeros at its right and lower edge.

    Attributes:
      grid_size, window_size: side lengths in tokens.
      shift: tokens by which the windows are moved right and down; they wrap around the edges.
    """

    grid_size: int
    window_size: int
    shift: int = 0

    @property
    def number_a_side(self) -> int:
        return -(-self.grid_size // self.window_size)

    @property
    def padding(self) -> int:
        """Rows, and columns, that are filled up."""
        return self.number_a_side * self.window_size - self.grid_size

    @property
    def num_padding_tokens(self) -> int:
        return (self.grid_size + self.padding) ** 2 - self.grid_size**2

    def cut(self, x: jax.Array) -> jax.Array:
        """Tokens [B*N, D], row by row, to window by window [B*(N + num_padding_tokens), D]."""
        grid = x.reshape(-1, self.grid_size, self.grid_size, x.shape[-1])
        if self.shift:
            grid = jnp.roll(grid, (-self.shift, -self.shift), (1, 2))
        if self.padding:
            edge = (0, self.padding)
            grid = jnp.pad(grid, ((0, 0), edge, edge, (0, 0)))
        number, size = self.number_a_side, self.window_size
        windows = grid.reshape(-1, number, size, number, size, x.shape[-1])
        return windows.swapaxes(2, 3).reshape(-1, x.shape[-1])

    def join(self, x: jax.Array) -> jax.Array:
        """Undoes `cut`; what was filled up leaves."""
        number, size, side = self.number_a_side, self.window_size, self.grid_size
        windows = x.reshape(-1, number, number, size, size, x.shape[-1])
        grid = windows.swapaxes(2, 3).reshape(-1, number * size, number * size, x.shape[-1])
        if self.padding:
            grid = grid[:, :side, :side]
        if self.shift:
            grid = jnp.roll(grid, (self.shift, self.shift), (1, 2))
        return grid.reshape(-1, x.shape[-1])


class WindowAttention(Attention):
    """Self-attention inside windows of T tokens. x [B*N, D], window by window, as it comes out.

    A family says what is added to the logits of each pair of tokens, and what is compared.
    """

    def __init__(
        self,
        windows: Windows,
        qkv: LinearShape,
        block: BlockSpec,
        linear: MakeLinear,
        *,
        rngs: nnx.Rngs,
    ):
        self.windows, self.num_heads, self.head_dim = windows, block.num_heads, block.head_dim
        self.qkv = linear(qkv, block.ranks[0], rngs=rngs)
        self.proj = Linear(block.attention_dim, qkv.in_features, rngs=rngs)
        self.make_table(rngs)

    @abc.abstractmethod
    def make_table(self, rngs: nnx.Rngs) -> None:
        """Makes the parameter that `bias` reads."""

    @abc.abstractmethod
    def bias(self) -> jax.Array:
        """The logits' bias [W, H, T, T] of an image's windows; W is 1 where all have the same."""

    def compared(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What logits are products of, out of query and key [B, W, H, T, d]."""
        return query, key

    def context(self, x: jax.Array) -> jax.Array:
        qkv = split_heads(self.qkv(x), self.windows.window_size**2, self.num_heads)
        bias = self.bias()
        query, key, value = qkv.reshape(3, -1, len(bias), *qkv.shape[2:])
        mixed = attend(*self.compared(query, key), value, bias[None]).reshape(qkv.shape[1:])
        return merge_heads(mixed)


@functools.lru_cache
def relative_position_index(window_size: int) -> np.ndarray:
    """[T, T]: the row of the table that holds the bias between two tokens of a window."""
    row, column = np.divmod(np.arange(window_size**2), window_size)
    rows, columns = row[:, None] - row, column[:, None] - column
    return (rows + window_size - 1) * (2 * window_size - 1) + columns + window_size - 1
