"""The layers that networks share as operations of ONNX; tokens are [B, N, D] there."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flora_jax.errors import InputError
from flora_jax.models.layers import LayerNorm, Linear, LowRankLinear, Mlp, whole_bias
from flora_jax.models.network import PatchEmbed
from flora_jax.weights.export.onnx_graph import Graph, Value


def unknown_module(module: Any) -> InputError:
    return InputError(
        f"a {type(module).__name__} cannot be written to ONNX: extract a plain network first"
    )


def linear(graph: Graph, layer: Any, x: Value) -> Value:
    """A pair of factors stays two products."""
    if type(layer) is Linear:
        features = layer.kernel.shape[1]
        product = graph.node("MatMul", x, graph.parameter("kernel", layer.kernel))
    elif type(layer) is LowRankLinear:
        features = layer.up.shape[1]
        low = graph.node("MatMul", x, graph.parameter("down", layer.down[...].T))
        product = graph.node("MatMul", low, graph.parameter("up", layer.up))
    else:
        raise unknown_module(layer)
    if layer.bias is None:
        return product
    bias = whole_bias(layer.bias[...], features)
    return graph.node("Add", product, graph.parameter("bias", bias))


def norm(graph: Graph, norm: LayerNorm, x: Value) -> Value:
    scale, bias = graph.parameter("scale", norm.scale), graph.parameter("bias", norm.bias)
    return graph.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=norm.epsilon)


def mlp(graph: Graph, mlp: Mlp, x: Value) -> Value:
    hidden, activate = linear(graph.at("fc1"), mlp.fc1, x), _ACTIVATIONS[mlp.activation]
    if mlp.is_gated:
        gate, value = graph.nodes("Split", 2, hidden, axis=-1, num_outputs=2)
        hidden = graph.node("Mul", activate(graph, gate), value)
    else:
        hidden = activate(graph, hidden)
    return linear(graph.at("fc2"), mlp.fc2, hidden)


def gelu(graph: Graph, x: Value, approximate: str = "none") -> Value:
    return graph.node("Gelu", x, approximate=approximate)


def _swish(graph: Graph, x: Value, slope: float) -> Value:
    steep = x if slope == 1 else graph.node("Mul", x, np.float32(slope))
    return graph.node("Mul", x, graph.node("Sigmoid", steep))


_ACTIVATIONS: dict[str, Callable[[Graph, Value], Value]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(gelu, approximate="tanh"),
    "quick_gelu": functools.partial(_swish, slope=1.702),
    "silu": functools.partial(_swish, slope=1),
}


def patches(graph: Graph, patch_embed: PatchEmbed, image_size: int, images: Value) -> Value:
    size, grid_size = patch_embed.patch_size, image_size // patch_embed.patch_size
    pixels = patch_embed.proj.kernel.shape[0]
    grid = graph.node("Reshape", images, [0, pixels // size**2, grid_size, size, grid_size, size])
    grid = graph.node("Transpose", grid, perm=[0, 2, 4, 3, 5, 1])
    patches = graph.node("Reshape", grid, [0, grid_size**2, pixels])
    if patch_embed.kept is not None:
        patches = graph.node("Gather", patches, list(patch_embed.kept), axis=1)
    x = linear(graph.at("proj"), patch_embed.proj, patches)
    return x if patch_embed.norm is None else norm(graph.at("norm"), patch_embed.norm, x)


def swap(graph: Graph, x: Value, axes: int, one: int, other: int) -> Value:
    order = list(range(axes))
    order[one], order[other] = order[other], order[one]
    return graph.node("Transpose", x, perm=order)


def heads(graph: Graph, x: Value, number: int, shape: list[int]) -> list[Value]:
    """Takes [B, N, number*H*d] to as many [B, ..., H, T, d]; `shape` is [..., T, H, d]."""
    parts = [x] if number == 1 else graph.nodes("Split", number, x, axis=-1, num_outputs=number)
    by_token = [graph.node("Reshape", part, [0, *shape]) for part in parts]
    return [swap(graph, part, len(shape) + 1, -3, -2) for part in by_token]


def merge(graph: Graph, x: Value, shape: list[int]) -> Value:
    """Puts the heads of [B, ..., H, T, d] side by side: [B, N, H*d]; `shape` as in `_heads`."""
    *windows, tokens, num_heads, head_dim = shape
    x = swap(graph, x, len(shape) + 1, -3, -2)
    return graph.node("Reshape", x, [0, math.prod(windows) * tokens, num_heads * head_dim])


def attend(graph: Graph, qkv: list[Value], shape: list[int], biases: Sequence[Any]) -> Value:
    """As `flora_jax.models.layers.attend`; scales the query, whose products fit half floats."""
    query, key, value = qkv
    query = graph.node("Mul", query, np.float32(shape[-1] ** -0.5))
    logits = graph.node("MatMul", query, swap(graph, key, len(shape) + 1, -2, -1))
    for bias in biases:
        logits = graph.node("Add", logits, bias)
    return graph.node("MatMul", graph.node("Softmax", logits, axis=-1), value)
