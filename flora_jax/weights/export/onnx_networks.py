"""The networks of `flora_jax.models` as graphs of ONNX: a function for each kind of module.

Tokens are [B, N, D] there, maps of convolutions [B, D, n, n]. How tokens move is taken from the
networks' own code, as the order in which they leave it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.errors import InputError
from flora_jax.models.layers import (
    LayerNorm,
    Linear,
    LowRankLinear,
    Mlp,
    PartialLayerNorm,
    whole_bias,
)
from flora_jax.models.network import Block, Network, PatchEmbed
from flora_jax.models.swin import (
    CosineWindowAttention,
    PatchMerging,
    ShiftedWindowAttention,
    Swin,
    shift_mask,
)
from flora_jax.models.tiny_vit import (
    Convolution,
    DepthwiseConvolution,
    MBConv,
    MirroredWindowAttention,
    PointDepthPoint,
    TinyViT,
)
from flora_jax.models.vit import (
    AttentionPool,
    Rotary,
    SelfAttention,
    TokenSelection,
    ViT,
    distance_index,
    tables,
)
from flora_jax.models.windows import WindowAttention, Windows, relative_position_index

# Gelu came with 20, and nothing newer is needed: the lowest that has every operation is what most
# runtimes take (ONNX Runtime from 1.17).
OPSET = 20
_FIRST, _SECOND = np.int64(0), np.int64(1)
Value = str  # the name of what a node gives
Input = Value | np.ndarray | np.generic | list[int]  # all but the first become constants


class Graph:
    """A place in a graph under construction, such as that of a block; `at` gives those inside.

    Floating point constants and parameters take the graph's dtype.
    """

    def __init__(self, dtype: str):
        self.dtype = np.dtype(dtype)
        self._prefix = ""
        self._nodes: list[Any] = []
        self._initializers: dict[str, np.ndarray] = {}
        self._constants: dict[tuple, Value] = {}  # by dtype, shape and content

    def at(self, name: str) -> "Graph":
        """The same graph, where names begin with this one."""
        inside = object.__new__(Graph)
        inside.__dict__ |= self.__dict__
        inside._prefix = f"{self._prefix}{name}."
        return inside

    def parameter(self, name: str, array: Any) -> Value:
        """An initializer under the parameter's own name; `array` may be its transpose."""
        full_name = self._prefix + name
        with np.errstate(over="ignore"):  # what half floats cannot hold, the check refuses
            self._initializers[full_name] = np.asarray(array).astype(self.dtype, order="C")
        return full_name

    def node(self, operation: str, *inputs: Input, **attributes: Any) -> Value:
        """Adds an operation; returns the name of its output."""
        return self.nodes(operation, 1, *inputs, **attributes)[0]

    def nodes(self, operation: str, number: int, *inputs: Input, **attributes: Any) -> list[Value]:
        """All outputs of an operation that gives several."""
        from onnx import helper  # an optional package: not before it is needed

        name = f"{self._prefix}{operation}_{len(self._nodes)}"
        outputs = [name] if number == 1 else [f"{name}_{i}" for i in range(number)]
        values = [x if isinstance(x, str) else self._constant(np.asarray(x)) for x in inputs]
        self._nodes.append(helper.make_node(operation, values, outputs, name, **attributes))
        return outputs

    def cast(self, x: Value, dtype: str) -> Value:
        from onnx import helper

        return self.node("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def swap(self, x: Value, axes: int, one: int, other: int) -> Value:
        order = list(range(axes))
        order[one], order[other] = order[other], order[one]
        return self.node("Transpose", x, perm=order)

    def _constant(self, array: np.ndarray) -> Value:
        """Equal ones are stored once."""
        is_float = np.issubdtype(array.dtype, np.floating)
        array = np.asarray(array, self.dtype if is_float else np.int64, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = name = f"constant_{len(self._constants)}"
            self._initializers[name] = array
        return self._constants[key]

    def model(self, images: list[int], output: Value, name: str, size: int) -> Any:
        """The finished onnx.ModelProto: "images" float32 [B, *images] to `name` float32 [B, size].

        `output` is what the last node gives; it takes the name.
        """
        from onnx import TensorProto, helper, numpy_helper

        assert self._nodes[-1].output[0] == output
        self._nodes[-1].output[0] = name
        shapes = {"images": ["B", *images], name: ["B", size]}
        given, made = (
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s)] for n, s in shapes.items()
        )
        tensors = [numpy_helper.from_array(a, n) for n, a in self._initializers.items()]
        graph = helper.make_graph(self._nodes, "flora_jax", given, made, tensors)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name="flora_jax",
        )


def network(graph: Graph, model: Network, images: Value) -> Value:
    """images [B, C, H, W] in the graph's dtype -> logits [B, num_classes], or features [B, D].

    Raises:
      InputError: a module is none of a plain network.
    """
    embed, classify = _FAMILIES[type(model)]
    x = embed(graph, model, images)
    for i, block in enumerate(model.blocks):
        x = _module(graph.at(f"blocks.{i}"), block, x)
    return classify(graph, model, x)


def _module(graph: Graph, module: Any, x: Value) -> Value:
    """Applies a module to x; a gated one, a subclass of a plain one, is not taken for it."""
    if type(module) not in _MODULES:
        raise InputError(
            f"a {type(module).__name__} cannot be written to ONNX: extract a plain network first"
        )
    return _MODULES[type(module)](graph, module, x)


def _inside(graph: Graph, owner: Any, name: str, x: Value) -> Value:
    """Applies the owner's module of this name to x; returns x where there is none."""
    module = getattr(owner, name)
    return x if module is None else _module(graph.at(name), module, x)


# --- layers ---------------------------------------------------------------------------------------


def _linear(graph: Graph, layer: Linear | LowRankLinear, x: Value) -> Value:
    if isinstance(layer, LowRankLinear):
        x = graph.node("MatMul", x, graph.parameter("down", layer.down[...].T))
        name, weights = "up", layer.up[...]
    else:
        name, weights = "kernel", layer.kernel[...]
    x = graph.node("MatMul", x, graph.parameter(name, weights))
    if layer.bias is None:
        return x
    bias = whole_bias(layer.bias[...], weights.shape[1])
    return graph.node("Add", x, graph.parameter("bias", bias))


def _norm(graph: Graph, norm: LayerNorm, x: Value) -> Value:
    scale, bias = graph.parameter("scale", norm.scale), graph.parameter("bias", norm.bias)
    return graph.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=norm.epsilon)


def _partial_norm(graph: Graph, norm: PartialLayerNorm, x: Value) -> Value:
    if not norm.num_left:
        return _norm(graph, norm, x)
    size, uncut = len(norm.scale), len(norm.scale) + norm.num_left
    whole = graph.node("Pad", x, [0, 0, 0, 0, 0, norm.num_left])
    ones = np.ones(uncut, np.float32)
    normal = graph.node("LayerNormalization", whole, ones, axis=-1, epsilon=norm.epsilon)
    normal = graph.node("Slice", normal, [0], [size], [2])
    scaled = graph.node("Mul", normal, graph.parameter("scale", norm.scale))
    return graph.node("Add", scaled, graph.parameter("bias", norm.bias))


def _mlp(graph: Graph, mlp: Mlp, x: Value) -> Value:
    hidden, activate = _inside(graph, mlp, "fc1", x), _ACTIVATIONS[mlp.activation]
    if not mlp.is_gated:
        return _inside(graph, mlp, "fc2", activate(graph, hidden))
    gate, value = graph.nodes("Split", 2, hidden, axis=-1, num_outputs=2)
    hidden = graph.node("Mul", activate(graph, gate), value)
    return _inside(graph, mlp, "fc2", _inside(graph, mlp, "norm", hidden))


def _gelu(graph: Graph, x: Value, approximate: str = "none") -> Value:
    return graph.node("Gelu", x, approximate=approximate)


def _swish(graph: Graph, x: Value, slope: float) -> Value:
    steep = x if slope == 1 else graph.node("Mul", x, np.float32(slope))
    return graph.node("Mul", x, graph.node("Sigmoid", steep))


_ACTIVATIONS: dict[str, Callable[[Graph, Value], Value]] = {
    "gelu": _gelu,
    "gelu_tanh": functools.partial(_gelu, approximate="tanh"),
    "quick_gelu": functools.partial(_swish, slope=1.702),
    "silu": functools.partial(_swish, slope=1),
}


def _block(graph: Graph, block: Block, x: Value) -> Value:
    x = _inside(graph, block, "downsample", x)
    tokens = x if block.windows is None else _cut(graph, block.windows, x)
    tokens = tokens if block.post_norm else _inside(graph, block, "norm1", tokens)
    mixed = _inside(graph, block, "attn", tokens)
    if block.windows is not None:
        mixed = _join(graph, block.windows, mixed)
    mixed = _inside(graph, block, "norm1", mixed) if block.post_norm else mixed
    x = _inside(graph, block, "local_conv", graph.node("Add", x, mixed))
    hidden = x if block.post_norm else _inside(graph, block, "norm2", x)
    hidden = _inside(graph, block, "mlp", hidden)
    hidden = _inside(graph, block, "norm2", hidden) if block.post_norm else hidden
    return graph.node("Add", x, hidden)


# --- how tokens move ------------------------------------------------------------------------------


def _cut(graph: Graph, windows: Windows, x: Value) -> Value:
    """Window by window; `_join` undoes it."""
    first = 0
    if windows.padding:  # where `Windows.cut` fills up, it gives 0: the number of a token of zeros
        x, first = graph.node("Pad", x, [0, 1, 0, 0, 0, 0]), 1
    return _reordered(graph, windows.cut, windows.grid_size**2, x, first)


def _join(graph: Graph, windows: Windows, x: Value) -> Value:
    num_tokens = windows.grid_size**2 + windows.num_padding_tokens
    return _reordered(graph, windows.join, num_tokens, x)


def _reordered(graph: Graph, move: Callable, num_tokens: int, x: Value, first: int = 0) -> Value:
    """Orders the tokens of each image as `move` does those of one, [N, D].

    `first` is the number of the first of them in x, of which what `move` adds has number 0.
    """
    numbers = jnp.arange(first, first + num_tokens)
    order = np.asarray(move(numbers[:, None])).ravel()
    stays = np.array_equal(order, np.arange(num_tokens))
    return x if stays else graph.node("Gather", x, order, axis=1)


def _merging(graph: Graph, merging: PatchMerging, x: Value) -> Value:
    width, num_tokens = merging.reduction.kernel.shape[0], merging.grid_size**2
    x = _reordered(graph, merging.side_by_side, num_tokens, x)
    x = graph.node("Reshape", x, [0, num_tokens // 4, width])
    first, second = ("reduction", "norm") if merging.post_norm else ("norm", "reduction")
    return _inside(graph, merging, second, _inside(graph, merging, first, x))


def _for_each_image(graph: Graph, like: Value, value: np.ndarray | Value, axes: int = 4) -> Value:
    """Repeats what broadcasts to [1, ...] of so many axes for each image that `like` has."""
    batch = graph.node("Shape", like, start=0, end=1)
    return graph.node("Expand", value, graph.node("Concat", batch, [1] * (axes - 1), axis=0))


def _tokens(graph: Graph, x: Value, numbers: Any) -> Value:
    """Those of these numbers; of one, without the axis of tokens."""
    return graph.node("Gather", x, numbers, axis=1)


def _mean(graph: Graph, tokens: Value) -> Value:
    return graph.node("ReduceMean", tokens, [1], keepdims=0)


# --- attention ------------------------------------------------------------------------------------


def _heads(graph: Graph, x: Value, number: int, shape: list[int]) -> list[Value]:
    """Takes [B, N, number*H*d] to as many [B, ..., H, T, d]; `shape` is [..., T, H, d]."""
    parts = [x] if number == 1 else graph.nodes("Split", number, x, axis=-1, num_outputs=number)
    by_token = [graph.node("Reshape", part, [0, *shape]) for part in parts]
    return [graph.swap(part, len(shape) + 1, -3, -2) for part in by_token]


def _attend(
    graph: Graph, qkv: list[Value], shape: list[int], biases: Sequence[Any], scale: Any = None
) -> Value:
    """As `flora_jax.models.layers.attend`, then the heads side by side: [B, N, H*d].

    `shape` as in `_heads`. It is the query that is scaled, so that products fit half floats;
    `scale` takes the place of the usual one.
    """
    query, key, value = qkv
    *windows, tokens, num_heads, head_dim = shape
    query = graph.node("Mul", query, np.float32(head_dim**-0.5) if scale is None else scale)
    logits = graph.node("MatMul", query, graph.swap(key, len(shape) + 1, -2, -1))
    for bias in biases:
        logits = graph.node("Add", logits, bias)
    mixed = graph.node("MatMul", graph.node("Softmax", logits, axis=-1), value)
    mixed = graph.swap(mixed, len(shape) + 1, -3, -2)
    return graph.node("Reshape", mixed, [0, math.prod(windows) * tokens, num_heads * head_dim])


def _attention(graph: Graph, attention: SelfAttention, x: Value) -> Value:
    shape = [attention.num_tokens, attention.num_heads, attention.head_dim]
    query, key, value = _heads(graph, _inside(graph, attention, "qkv", x), 3, shape)
    if attention.rotary is not None:
        query, key = (_turned(graph, attention.rotary, part) for part in (query, key))
    biases: list[Any] = []
    if attention.relative_position_bias_table is not None:
        index = distance_index(attention.num_tokens - 1)
        biases.append(_table_bias(graph, attention.relative_position_bias_table, index))
    if attention.num_left:
        _, key_left, value_left = _constants(attention)
        key = graph.node("Concat", key, _for_each_image(graph, x, key_left), axis=2)
        value = graph.node("Concat", value, _for_each_image(graph, x, value_left), axis=2)
        bias = np.zeros((1, 1, 1, attention.num_tokens + 1), np.float32)
        bias[..., -1] = np.log(attention.num_left)
        biases.append(bias)
    mixed = _attend(graph, [query, key, value], shape, biases)
    return _inside(graph, attention, "proj", mixed)


def _constants(attention: SelfAttention) -> np.ndarray:
    """Query, key and value [3, 1, H, 1, d] of every token that has left: qkv's bias."""
    shape = (3, 1, attention.num_heads, 1, attention.head_dim)
    if attention.qkv.bias is None:
        return np.zeros(shape, np.float32)
    return np.asarray(whole_bias(attention.qkv.bias[...], math.prod(shape))).reshape(shape)


def _turned(graph: Graph, rotary: Rotary, x: Value) -> Value:
    cos, sin = tables(rotary)
    half = cos.shape[-1] // 2
    first, second = graph.nodes("Split", 2, x, axis=-1, num_outputs=2)
    swapped = graph.node("Concat", second, first, axis=-1)
    signed = np.concatenate([-sin[..., :half], sin[..., half:]], axis=-1)
    return graph.node("Add", graph.node("Mul", x, cos), graph.node("Mul", swapped, signed))


def _shifted_attention(graph: Graph, attention: ShiftedWindowAttention, x: Value) -> Value:
    windows = attention.windows
    with jax.default_matmul_precision("highest"):  # that of an MLP is computed here, for good
        table = attention.table()
    biases: list[Any] = [_table_bias(graph, table, relative_position_index(windows.window_size))]
    if windows.shift:
        biases.append(shift_mask(windows)[:, None])
    return _window_attention(graph, attention, biases, x)


def _table_bias(graph: Graph, table: Any, index: np.ndarray) -> Value:
    table = graph.parameter("relative_position_bias_table", table)
    return graph.node("Transpose", graph.node("Gather", table, index, axis=0), perm=[2, 0, 1])


def _mirrored_attention(graph: Graph, attention: MirroredWindowAttention, x: Value) -> Value:
    size = attention.windows.window_size
    table = attention.attention_biases[...].T.reshape(-1, size, size)
    # Rows, then columns: an index of all pairs of tokens would be as large as the weights.
    apart = abs(np.arange(size)[:, None] - np.arange(size))
    by_row = graph.node("Gather", graph.parameter("attention_biases", table), apart, axis=1)
    by_pair = graph.node("Gather", by_row, apart, axis=3)
    by_pair = graph.node("Transpose", by_pair, perm=[0, 1, 3, 2, 4])
    bias = graph.node("Reshape", by_pair, [0, size**2, size**2])
    return _window_attention(graph, attention, [bias], x)


def _window_attention(
    graph: Graph, attention: WindowAttention, biases: Sequence[Any], x: Value
) -> Value:
    windows = attention.windows
    number, tokens = windows.number_a_side**2, windows.window_size**2
    shape = [number, tokens, attention.num_heads, attention.head_dim]
    qkv, scale = _heads(graph, _inside(graph, attention, "qkv", x), 3, shape), None
    if isinstance(attention, CosineWindowAttention):
        qkv = [_unit(graph, qkv[0]), _unit(graph, qkv[1]), qkv[2]]
        scale = np.asarray(attention.scale())[:, None, None]
    return _inside(graph, attention, "proj", _attend(graph, qkv, shape, biases, scale))


def _unit(graph: Graph, x: Value) -> Value:
    length = graph.node("ReduceL2", x, [-1])
    return graph.node("Div", x, graph.node("Max", length, np.float32(1e-6)))  # of padding, 0


def _attention_pool(graph: Graph, pool: AttentionPool, tokens: Value) -> Value:
    width = pool.latent.shape[-1]
    shape = [pool.num_heads, width // pool.num_heads]
    latent = graph.parameter("latent", pool.latent[...][None])
    (query,) = _heads(graph, _inside(graph, pool, "q", latent), 1, [1, *shape])
    key, value = _heads(graph, _inside(graph, pool, "kv", tokens), 2, [-1, *shape])
    mixed = _attend(graph, [query, key, value], [1, *shape], [])
    x = _inside(graph, pool, "proj", graph.node("Reshape", mixed, [0, width]))
    hidden = _inside(graph, pool, "mlp", _inside(graph, pool, "norm", x))
    return graph.node("Add", x, hidden)


# --- convolutions; those of 1 x 1 are no products of tokens: runtimes are quicker on maps ---------


def _tokens_of(graph: Graph, grid: Value) -> Value:
    """The places of a map, row by row."""
    return graph.swap(graph.node("Reshape", grid, [0, 0, -1]), 3, 1, 2)


def _map_of(graph: Graph, tokens: Value, side: int) -> Value:
    return graph.node("Reshape", graph.swap(tokens, 3, 1, 2), [0, 0, side, side])


def _convolutions(graph: Graph, owner: Any, x: Value) -> Value:
    """map -> map: conv1, conv2 and so on, with a GELU between two."""
    names = [name for name in ("conv1", "conv2", "conv3") if hasattr(owner, name)]
    for name in names:
        x = x if name == names[0] else _gelu(graph, x)
        x = _convolution(graph.at(name), getattr(owner, name), x)
    return x


def _mbconv(graph: Graph, mbconv: MBConv, x: Value) -> Value:
    """map -> map."""
    return _gelu(graph, graph.node("Add", x, _convolutions(graph, mbconv, x)))


def _downsampling(graph: Graph, layers: PointDepthPoint, x: Value) -> Value:
    """tokens -> tokens."""
    grid = _map_of(graph, x, layers.conv2.grid_size)
    return _tokens_of(graph, _convolutions(graph, layers, grid))


def _local_convolution(graph: Graph, layer: DepthwiseConvolution, x: Value) -> Value:
    """tokens -> tokens."""
    return _tokens_of(graph, _convolution(graph, layer, _map_of(graph, x, layer.grid_size)))


def _convolution(
    graph: Graph, layer: Linear | Convolution | DepthwiseConvolution, x: Value
) -> Value:
    """map -> map; the kernel as ONNX has it, [D, C / group, height, width]."""
    kernel, attributes = layer.kernel[...], dict[str, Any]()
    if isinstance(layer, Linear):
        kernel = kernel.T[:, :, None, None]
    elif isinstance(layer, DepthwiseConvolution):
        kernel = kernel.transpose(2, 0, 1)[:, None]
        attributes["group"] = len(kernel)
    else:
        kernel = kernel.transpose(3, 2, 0, 1)
    if not isinstance(layer, Linear):
        attributes |= {"strides": [layer.stride] * 2, "pads": [1] * 4}
    weights = graph.parameter("kernel", kernel), graph.parameter("bias", layer.bias)
    return graph.node("Conv", x, *weights, **attributes)


# --- families: images to tokens, and tokens to logits or features ---------------------------------


def _patches(graph: Graph, patch_embed: PatchEmbed, image_size: int, images: Value) -> Value:
    size, grid_size = patch_embed.patch_size, image_size // patch_embed.patch_size
    pixels = patch_embed.proj.kernel.shape[0]
    grid = graph.node("Reshape", images, [0, pixels // size**2, grid_size, size, grid_size, size])
    grid = graph.node("Transpose", grid, perm=[0, 2, 4, 3, 5, 1])
    patches = graph.node("Reshape", grid, [0, grid_size**2, pixels])
    if patch_embed.kept is not None:
        patches = _tokens(graph, patches, list(patch_embed.kept))
    return _inside(graph, patch_embed, "norm", _inside(graph, patch_embed, "proj", patches))


def _embed_vit(graph: Graph, model: ViT, images: Value) -> Value:
    positions = model.spec.positions
    x = _patches(graph.at("patch_embed"), model.patch_embed, model.spec.image_size, images)
    if positions == "patches":
        x = graph.node("Add", x, graph.parameter("pos_embed", model.pos_embed))
    prefix = [
        _for_each_image(graph, images, graph.parameter(name, getattr(model, name)), axes=3)
        for name in ("cls_token", "dist_token", "reg_token")
        if getattr(model, name) is not None
    ]
    if prefix:
        x = graph.node("Concat", *prefix, x, axis=1)
    if positions == "all":
        x = graph.node("Add", x, graph.parameter("pos_embed", model.pos_embed))
    return _inside(graph, model, "norm_pre", x)


def _classify_vit(graph: Graph, model: ViT, x: Value) -> Value:
    spec, prefix = model.spec, model.spec.num_prefix_tokens
    if spec.distilled:
        logits = [
            _inside(graph, model, head, _inside(graph, model, "norm", _tokens(graph, x, number)))
            for head, number in (("head", _FIRST), ("head_dist", _SECOND))
        ]
        return graph.node("Mul", graph.node("Add", *logits), np.float32(0.5))
    if spec.pool == "token":
        x = _inside(graph, model, "norm", _tokens(graph, x, _FIRST))
        return _inside(graph, model, "head", x)
    tokens = x if spec.normalises_pooled else _inside(graph, model, "norm", x)
    if model.attn_pool is not None:
        return _inside(graph, model, "head", _inside(graph, model, "attn_pool", tokens))
    pooled = _mean(graph, graph.node("Slice", tokens, [prefix], [spec.num_tokens], [1]))
    if spec.normalises_pooled:
        pooled = _inside(graph, model, "norm", pooled)
    if spec.pool == "token_and_mean":
        pooled = graph.node("Concat", _tokens(graph, tokens, _FIRST), pooled, axis=-1)
    return _inside(graph, model, "head", pooled)


def _embed_swin(graph: Graph, model: Swin, images: Value) -> Value:
    x = _patches(graph.at("patch_embed"), model.patch_embed, model.spec.image_size, images)
    if model.absolute_pos_embed is None:
        return x
    return graph.node("Add", x, graph.parameter("absolute_pos_embed", model.absolute_pos_embed))


def _classify_swin(graph: Graph, model: Swin, x: Value) -> Value:
    return _inside(graph, model, "head", _mean(graph, _inside(graph, model, "norm", x)))


def _embed_tiny_vit(graph: Graph, model: TinyViT, images: Value) -> Value:
    x = _convolutions(graph.at("patch_embed"), model.patch_embed, images)
    for i, layers in enumerate(model.mbconvs):
        x = _mbconv(graph.at(f"mbconvs.{i}"), layers, x)
    return _tokens_of(graph, x)


def _classify_tiny_vit(graph: Graph, model: TinyViT, x: Value) -> Value:
    return _inside(graph, model, "head", _inside(graph, model, "norm", _mean(graph, x)))


_MODULES: dict[type, Callable[[Graph, Any, Value], Value]] = {
    Linear: _linear,
    LowRankLinear: _linear,
    LayerNorm: _norm,
    PartialLayerNorm: _partial_norm,
    Mlp: _mlp,
    Block: _block,
    SelfAttention: _attention,
    AttentionPool: _attention_pool,
    TokenSelection: lambda graph, selection, x: _tokens(graph, x, list(selection.positions)),
    ShiftedWindowAttention: _shifted_attention,
    CosineWindowAttention: _shifted_attention,
    PatchMerging: _merging,
    MirroredWindowAttention: _mirrored_attention,
    PointDepthPoint: _downsampling,
    DepthwiseConvolution: _local_convolution,
}
_FAMILIES: dict[type, tuple[Callable[[Graph, Any, Value], Value], ...]] = {
    ViT: (_embed_vit, _classify_vit),
    Swin: (_embed_swin, _classify_swin),
    TinyViT: (_embed_tiny_vit, _classify_tiny_vit),
}
