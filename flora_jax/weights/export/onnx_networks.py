"""The networks of `flora_jax.models` as graphs of ONNX: a function for each kind of module."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from flora_jax.models.layers import Mlp, whole_bias
from flora_jax.models.network import Block, Network
from flora_jax.models.swin import PatchMerging, ShiftedWindowAttention, Swin
from flora_jax.models.tiny_vit import (
    DepthwiseConvolution,
    MirroredWindowAttention,
    PointDepthPoint,
    TinyViT,
)
from flora_jax.models.vit import Attention, AttentionPool, Rotary, TokenSelection, ViT, tables
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.export.onnx_convolutions import (
    downsampling,
    embedding,
    local_convolution,
    mbconv,
    tokens_of,
)
from flora_jax.weights.export.onnx_graph import Graph, Value
from flora_jax.weights.export.onnx_layers import (
    attend,
    heads,
    linear,
    merge,
    mlp,
    norm,
    patches,
    unknown_module,
)
from flora_jax.weights.export.onnx_windows import (
    cut,
    join,
    mirrored_attention,
    reordered,
    shifted_attention,
)


def network(graph: Graph, model: Network, images: Value) -> Value:
    """images [B, C, H, W] in the graph's dtype -> logits [B, num_classes], or features [B, D]."""
    embed, classify = _FAMILIES[type(model)]
    x = embed(graph, model, images)
    for i, block in enumerate(model.blocks):
        x = _block(graph.at(f"blocks.{i}"), block, x)
    return classify(graph, model, x)


def _block(graph: Graph, block: Block, x: Value) -> Value:
    if type(block) is not Block:
        raise unknown_module(block)
    if block.downsample is not None:
        x = _PARTS[type(block.downsample)](graph.at("downsample"), block.downsample, x)
    tokens = x if block.windows is None else cut(graph, block.windows, x)
    normal = norm(graph.at("norm1"), block.norm1, tokens)
    mixed = _PARTS[type(block.attn)](graph.at("attn"), block.attn, normal)
    if block.windows is not None:
        mixed = join(graph, block.windows, mixed)
    x = graph.node("Add", x, mixed)
    if block.local_conv is not None:
        x = _PARTS[type(block.local_conv)](graph.at("local_conv"), block.local_conv, x)
    normal = norm(graph.at("norm2"), block.norm2, x)
    return graph.node("Add", x, mlp(graph.at("mlp"), cast(Mlp, block.mlp), normal))


def _attention(graph: Graph, attention: Attention, x: Value) -> Value:
    shape = [attention.num_tokens, attention.num_heads, attention.head_dim]
    query, key, value = heads(graph, linear(graph.at("qkv"), attention.qkv, x), 3, shape)
    if attention.rotary is not None:
        query, key = (_turned(graph, attention.rotary, part) for part in (query, key))
    biases = []
    if attention.num_left:
        constants = _constants(attention)
        key = graph.node("Concat", key, _for_each_image(graph, x, constants[1]), axis=2)
        value = graph.node("Concat", value, _for_each_image(graph, x, constants[2]), axis=2)
        bias = np.zeros((1, 1, 1, attention.num_tokens + 1), np.float32)
        bias[..., -1] = np.log(attention.num_left)
        biases.append(bias)
    mixed = merge(graph, attend(graph, [query, key, value], shape, biases), shape)
    return linear(graph.at("proj"), attention.proj, mixed)


def _constants(attention: Attention) -> np.ndarray:
    """Query, key and value [3, 1, H, 1, d] of every token that has left: qkv's bias."""
    shape = (3, 1, attention.num_heads, 1, attention.head_dim)
    if attention.qkv.bias is None:
        return np.zeros(shape, np.float32)
    features = 3 * attention.num_heads * attention.head_dim
    return np.asarray(whole_bias(attention.qkv.bias[...], features)).reshape(shape)


def _for_each_image(graph: Graph, like: Value, value: np.ndarray | Value, axes: int = 4) -> Value:
    """Repeats what broadcasts to [1, ...] of so many axes for each image that `like` has."""
    batch = graph.node("Shape", like, start=0, end=1)
    return graph.node("Expand", value, graph.node("Concat", batch, [1] * (axes - 1), axis=0))


def _turned(graph: Graph, rotary: Rotary, x: Value) -> Value:
    cos, sin = tables(rotary)
    half = cos.shape[-1] // 2
    first, second = graph.nodes("Split", 2, x, axis=-1, num_outputs=2)
    swapped = graph.node("Concat", second, first, axis=-1)
    signed = np.concatenate([-sin[..., :half], sin[..., half:]], axis=-1)
    return graph.node("Add", graph.node("Mul", x, cos), graph.node("Mul", swapped, signed))


def _selection(graph: Graph, selection: TokenSelection, x: Value) -> Value:
    return graph.node("Gather", x, list(selection.positions), axis=1)


def _merging(graph: Graph, merging: PatchMerging, x: Value) -> Value:
    width, num_tokens = merging.norm.scale.shape[0], merging.grid_size**2
    x = reordered(graph, merging.side_by_side, num_tokens, x)
    x = graph.node("Reshape", x, [0, num_tokens // 4, width])
    return linear(graph.at("reduction"), merging.reduction, norm(graph.at("norm"), merging.norm, x))


def _embed_vit(graph: Graph, model: ViT, images: Value) -> Value:
    x = patches(graph.at("patch_embed"), model.patch_embed, model.spec.image_size, images)
    positions = None
    if model.pos_embed is not None:
        positions = graph.parameter("pos_embed", model.pos_embed)
    if positions and model.spec.positions == "patches":
        x = graph.node("Add", x, positions)
    prefix = [
        _for_each_image(graph, images, graph.parameter(name, getattr(model, name)), axes=3)
        for name in ("cls_token", "dist_token", "reg_token")
        if getattr(model, name) is not None
    ]
    if prefix:
        x = graph.node("Concat", *prefix, x, axis=1)
    if positions and model.spec.positions == "all":
        x = graph.node("Add", x, positions)
    return x if model.norm_pre is None else norm(graph.at("norm_pre"), model.norm_pre, x)


def _classify_vit(graph: Graph, model: ViT, x: Value) -> Value:
    spec, prefix = model.spec, model.spec.num_prefix_tokens
    last_norm = graph.at("norm")
    if spec.pool == "token":
        logits = _classified(graph, model, norm(last_norm, model.norm, _token(graph, x, 0)))
        if not spec.distilled:
            return logits
        distilled = norm(last_norm, model.norm, _token(graph, x, 1))
        distilled = _classified(graph, model, distilled, "head_dist")
        return graph.node("Mul", graph.node("Add", logits, distilled), np.float32(0.5))
    tokens = x if spec.normalises_pooled else norm(last_norm, model.norm, x)
    if model.attn_pool is not None:
        return _classified(
            graph, model, _pooled(graph.at("attn_pool"), model.attn_pool, spec, tokens)
        )
    mean = _mean(graph, graph.node("Slice", tokens, [prefix], [spec.num_tokens], [1]))
    if spec.normalises_pooled:
        mean = norm(last_norm, model.norm, mean)
    if spec.pool == "token_and_mean":
        mean = graph.node("Concat", _token(graph, tokens, 0), mean, axis=-1)
    return _classified(graph, model, mean)


def _pooled(graph: Graph, pool: AttentionPool, spec: ViTSpec, tokens: Value) -> Value:
    width, shape = spec.embed_dim, [pool.num_heads, spec.embed_dim // pool.num_heads]
    latent = graph.parameter("latent", pool.latent[...][None])
    (query,) = heads(graph, linear(graph.at("q"), pool.q, latent), 1, [1, *shape])
    key_value = linear(graph.at("kv"), pool.kv, tokens)
    key, value = heads(graph, key_value, 2, [spec.num_tokens, *shape])
    mixed = merge(graph, attend(graph, [query, key, value], [1, *shape], []), [1, *shape])
    x = linear(graph.at("proj"), pool.proj, graph.node("Reshape", mixed, [0, width]))
    hidden = mlp(graph.at("mlp"), pool.mlp, norm(graph.at("norm"), pool.norm, x))
    return graph.node("Add", x, hidden)


def _token(graph: Graph, x: Value, number: int) -> Value:
    return graph.node("Gather", x, np.int64(number), axis=1)


def _mean(graph: Graph, tokens: Value) -> Value:
    return graph.node("ReduceMean", tokens, [1], keepdims=0)


def _classified(graph: Graph, model: Network, pooled: Value, name: str = "head") -> Value:
    head = getattr(model, name)
    return pooled if head is None else linear(graph.at(name), head, pooled)


def _embed_swin(graph: Graph, model: Swin, images: Value) -> Value:
    x = patches(graph.at("patch_embed"), model.patch_embed, model.spec.image_size, images)
    if model.absolute_pos_embed is None:
        return x
    return graph.node("Add", x, graph.parameter("absolute_pos_embed", model.absolute_pos_embed))


def _classify_swin(graph: Graph, model: Swin, x: Value) -> Value:
    pooled = _mean(graph, norm(graph.at("norm"), model.norm, x))
    return _classified(graph, model, pooled)


def _embed_tiny_vit(graph: Graph, model: TinyViT, images: Value) -> Value:
    x = embedding(graph.at("patch_embed"), model.patch_embed, images)
    for i, layers in enumerate(model.mbconvs):
        x = mbconv(graph.at(f"mbconvs.{i}"), layers, x)
    return tokens_of(graph, x)


def _classify_tiny_vit(graph: Graph, model: TinyViT, x: Value) -> Value:
    return _classified(graph, model, norm(graph.at("norm"), model.norm, _mean(graph, x)))


_PARTS: dict[type, Callable[[Graph, Any, Value], Value]] = {
    Attention: _attention,
    TokenSelection: _selection,
    ShiftedWindowAttention: shifted_attention,
    PatchMerging: _merging,
    MirroredWindowAttention: mirrored_attention,
    PointDepthPoint: downsampling,
    DepthwiseConvolution: local_convolution,
}
_FAMILIES: dict[type, tuple[Callable[[Graph, Any, Value], Value], ...]] = {
    ViT: (_embed_vit, _classify_vit),
    Swin: (_embed_swin, _classify_swin),
    TinyViT: (_embed_tiny_vit, _classify_tiny_vit),
}
