"""Convolutions of hybrids as operations of ONNX; tokens are [B, N, D] there, maps [B, D, n, n]."""

import jax

from flora_jax.models.convolution import Convolution, DepthwiseConvolution
from flora_jax.models.tiny_vit import ConvolutionalEmbed, MBConv, PointDepthPoint
from flora_jax.weights.export.onnx_graph import Graph, Value
from flora_jax.weights.export.onnx_layers import gelu, linear, swap


def embedding(graph: Graph, embed: ConvolutionalEmbed, images: Value) -> Value:
    """images [B, C, H, W] -> tokens."""
    x = gelu(graph, _convolution(graph.at("conv1"), embed.conv1, images))
    return _tokens(graph, _convolution(graph.at("conv2"), embed.conv2, x))


def mbconv(graph: Graph, mbconv: MBConv, x: Value) -> Value:
    return gelu(graph, graph.node("Add", x, point_depth_point(graph, mbconv, x)))


def point_depth_point(graph: Graph, layers: PointDepthPoint, x: Value) -> Value:
    x = gelu(graph, linear(graph.at("conv1"), layers.conv1, x))
    x = gelu(graph, depthwise(graph.at("conv2"), layers.conv2, x))
    return linear(graph.at("conv3"), layers.conv3, x)


def depthwise(graph: Graph, convolution: DepthwiseConvolution, x: Value) -> Value:
    """tokens -> tokens."""
    side, channels = convolution.grid_size, convolution.kernel.shape[-1]
    grid = graph.node("Reshape", swap(graph, x, 3, 1, 2), [0, channels, side, side])
    kernel = convolution.kernel[...].transpose(2, 0, 1)[:, None]
    return _tokens(graph, _conv(graph, convolution, kernel, grid, channels))


def _convolution(graph: Graph, convolution: Convolution, x: Value) -> Value:
    return _conv(graph, convolution, convolution.kernel[...].transpose(3, 2, 0, 1), x)


def _conv(
    graph: Graph,
    convolution: Convolution | DepthwiseConvolution,
    kernel: jax.Array,
    x: Value,
    groups: int = 1,
) -> Value:
    """Map -> map; the kernel is [D, C / groups, 3, 3]."""
    weights = graph.parameter("kernel", kernel), graph.parameter("bias", convolution.bias)
    strides = [convolution.stride] * 2
    return graph.node("Conv", x, *weights, strides=strides, pads=[1] * 4, group=groups)


def _tokens(graph: Graph, grid: Value) -> Value:
    return swap(graph, graph.node("Reshape", grid, [0, 0, -1]), 3, 1, 2)
