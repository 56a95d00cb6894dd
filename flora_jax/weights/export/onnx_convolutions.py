"""Convolutions of hybrids as operations of ONNX; tokens are [B, N, D] there, maps [B, D, n, n].

Those of 1 x 1 are no products of tokens: runtimes are quicker where a map stays one.
"""

from typing import Any

import jax

from flora_jax.models.layers import Linear
from flora_jax.models.tiny_vit import (
    Convolution,
    ConvolutionalEmbed,
    DepthwiseConvolution,
    MBConv,
    PointDepthPoint,
)
from flora_jax.weights.export.onnx_graph import Graph, Value
from flora_jax.weights.export.onnx_layers import gelu, swap


def embedding(graph: Graph, embed: ConvolutionalEmbed, images: Value) -> Value:
    """images [B, C, H, W] -> map."""
    x = gelu(graph, _convolution(graph.at("conv1"), embed.conv1, images))
    return _convolution(graph.at("conv2"), embed.conv2, x)


def mbconv(graph: Graph, mbconv: MBConv, x: Value) -> Value:
    """map -> map."""
    return gelu(graph, graph.node("Add", x, _point_depth_point(graph, mbconv, x)))


def downsampling(graph: Graph, layers: PointDepthPoint, x: Value) -> Value:
    """tokens -> tokens."""
    grid = _map_of(graph, x, layers.conv2.grid_size)
    return tokens_of(graph, _point_depth_point(graph, layers, grid))


def local_convolution(graph: Graph, convolution: DepthwiseConvolution, x: Value) -> Value:
    """tokens -> tokens."""
    grid = _map_of(graph, x, convolution.grid_size)
    return tokens_of(graph, _depthwise(graph, convolution, grid))


def tokens_of(graph: Graph, grid: Value) -> Value:
    """The places of a map, row by row."""
    return swap(graph, graph.node("Reshape", grid, [0, 0, -1]), 3, 1, 2)


def _map_of(graph: Graph, tokens: Value, side: int) -> Value:
    return graph.node("Reshape", swap(graph, tokens, 3, 1, 2), [0, 0, side, side])


def _point_depth_point(graph: Graph, layers: PointDepthPoint, x: Value) -> Value:
    x = gelu(graph, _pointwise(graph.at("conv1"), layers.conv1, x))
    x = gelu(graph, _depthwise(graph.at("conv2"), layers.conv2, x))
    return _pointwise(graph.at("conv3"), layers.conv3, x)


def _pointwise(graph: Graph, layer: Linear, x: Value) -> Value:
    return _conv(graph, layer, layer.kernel[...].T[:, :, None, None], x)


def _depthwise(graph: Graph, layer: DepthwiseConvolution, x: Value) -> Value:
    kernel = layer.kernel[...].transpose(2, 0, 1)[:, None]
    return _conv(graph, layer, kernel, x, group=len(kernel), **_padded(layer.stride))


def _convolution(graph: Graph, layer: Convolution, x: Value) -> Value:
    kernel = layer.kernel[...].transpose(3, 2, 0, 1)
    return _conv(graph, layer, kernel, x, **_padded(layer.stride))


def _padded(stride: int) -> dict[str, Any]:
    return {"strides": [stride] * 2, "pads": [1] * 4}


def _conv(graph: Graph, layer: Any, kernel: jax.Array, x: Value, **attributes: Any) -> Value:
    """map -> map; the kernel as ONNX has it, [D, C / group, height, width]."""
    weights = graph.parameter("kernel", kernel), graph.parameter("bias", layer.bias)
    return graph.node("Conv", x, *weights, **attributes)
