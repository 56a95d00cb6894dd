"""Attention inside windows as operations of ONNX; tokens are [B, N, D] there.

How tokens move is taken from the networks' own code, as the order in which they leave it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.models.swin import ShiftedWindowAttention, relative_position_index, shift_mask
from flora_jax.models.tiny_vit import MirroredWindowAttention
from flora_jax.models.windows import WindowAttention, Windows
from flora_jax.weights.export.onnx_graph import Graph, Value
from flora_jax.weights.export.onnx_layers import attend, heads, linear, merge


def cut(graph: Graph, windows: Windows, x: Value) -> Value:
    """Window by window; `join` undoes it."""
    first = 0
    if windows.padding:  # where `Windows.cut` fills up, it gives 0: the number of a token of zeros
        x, first = graph.node("Pad", x, [0, 1, 0, 0, 0, 0]), 1
    return reordered(graph, windows.cut, windows.grid_size**2, x, first)


def join(graph: Graph, windows: Windows, x: Value) -> Value:
    num_tokens = windows.grid_size**2 + windows.num_padding_tokens
    return reordered(graph, windows.join, num_tokens, x)


def reordered(
    graph: Graph,
    move: Callable[[jax.Array], jax.Array],
    num_tokens: int,
    x: Value,
    first: int = 0,
) -> Value:
    """Orders the tokens of each image as `move` does those of one, [N, D].

    `first` is the number of the first of them in x, of which what `move` adds has number 0.
    """
    numbers = jnp.arange(first, first + num_tokens)
    order = np.asarray(move(numbers[:, None])).ravel()
    stays = np.array_equal(order, np.arange(num_tokens))
    return x if stays else graph.node("Gather", x, order, axis=1)


def shifted_attention(graph: Graph, attention: ShiftedWindowAttention, x: Value) -> Value:
    windows = attention.windows
    table = graph.parameter("relative_position_bias_table", attention.relative_position_bias_table)
    by_pair = graph.node("Gather", table, relative_position_index(windows.window_size), axis=0)
    biases: list[Any] = [graph.node("Transpose", by_pair, perm=[2, 0, 1])]
    if windows.shift:
        mask = shift_mask(windows.grid_size, windows.window_size, windows.shift)
        biases.append(mask[:, None])
    return _attention(graph, attention, biases, x)


def mirrored_attention(graph: Graph, attention: MirroredWindowAttention, x: Value) -> Value:
    size = attention.windows.window_size
    table = attention.attention_biases[...].T.reshape(-1, size, size)
    # Rows, then columns: an index of all pairs of tokens would be as large as the weights.
    apart = abs(np.arange(size)[:, None] - np.arange(size))
    by_row = graph.node("Gather", graph.parameter("attention_biases", table), apart, axis=1)
    by_pair = graph.node("Gather", by_row, apart, axis=3)
    by_pair = graph.node("Transpose", by_pair, perm=[0, 1, 3, 2, 4])
    bias = graph.node("Reshape", by_pair, [0, size**2, size**2])
    return _attention(graph, attention, [bias], x)


def _attention(graph: Graph, attention: WindowAttention, biases: Sequence[Any], x: Value) -> Value:
    windows = attention.windows
    number, tokens = windows.number_a_side**2, windows.window_size**2
    shape = [number, tokens, attention.num_heads, attention.head_dim]
    qkv = heads(graph, linear(graph.at("qkv"), attention.qkv, x), 3, shape)
    mixed = merge(graph, attend(graph, qkv, shape, biases), shape)
    return linear(graph.at("proj"), attention.proj, mixed)
