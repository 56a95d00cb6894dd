"""Name maps: parameters of ours beside the arrays of a file that hold them.

A library's names are one list of (ours, theirs, kind). `name_map` makes rows of it for a spec, one
a parameter, with the change of layout between the two, which can be read and written.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Sequence

import numpy as np

from flora_jax.models.spec import Spec
from flora_jax.models.swin_spec import SwinSpec
from flora_jax.models.tiny_vit_spec import TinyViTSpec
from flora_jax.models.vit_spec import ViTSpec

# A searchable layer of a published subnet: a pair of factors, or `fc` where it stayed dense.
_OF_A_SUBNET = re.compile(r"\.(VT|(qkv|fc1|fc2)\.fc)\.weight$")


@dataclasses.dataclass(frozen=True)
class Change:
    """How an array of a file becomes ours, and back."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def _only(array: np.ndarray) -> np.ndarray:
    (only,) = array
    return only


SAME = Change(lambda array: array, lambda array: array)
TRANSPOSED = Change(np.transpose, np.transpose)
WITHOUT_FIRST_AXIS = Change(_only, lambda array: array[None])  # [1, ...] -> [...]
ADDING_FIRST_AXIS = Change(lambda array: array[None], _only)
# Biases of query, key and value, side by side -> of query and value.
WITHOUT_KEY = Change(
    lambda bias: np.concatenate(np.split(bias, 3)[::2]),
    lambda bias: np.insert(bias, len(bias) // 2, np.zeros(len(bias) // 2, bias.dtype)),
)
# Positions [1, 1 + N, D] -> of the patches alone [N, D].
OF_PATCHES = Change(
    lambda array: array[0, 1:], lambda array: np.concatenate([0 * array[:1], array])[None]
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our parameters; several sources (query, key, value) stand side by side in it."""

    target: str
    sources: tuple[str, ...]
    change: Change = SAME

    def read(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The arrays of the sources, of the shapes that `shapes` lists -> float32, contiguous.

        What is too large for float32 becomes infinite.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return np.ascontiguousarray(self._whole(arrays), np.float32)

    def write(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `read`, by source name."""
        return {name: np.ascontiguousarray(part) for name, part in self._parts(array).items()}

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of the sources of a parameter of this shape."""
        without_memory = np.broadcast_to(np.float32(0), shape)
        return {name: part.shape for name, part in self._parts(without_memory).items()}

    def _whole(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        parts = [self.change.read(array) for array in arrays]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def _parts(self, array: np.ndarray) -> dict[str, np.ndarray]:
        parts = np.split(array, len(self.sources), axis=-1)
        return dict(zip(self.sources, map(self.change.write, parts), strict=True))


Table = list[Row]
# (spec, our name, their names) -> the rows of a module or a parameter
Kind = Callable[..., Table]
# (our name, their name, kind). {block}, {stage}, {before} (the stage before) and {i} (in the stage)
# stand for numbers, "a|b" for two spellings, "x.[a b]" for x.a and x.b side by side; a name that
# begins with a dot is of a block.
Names = Sequence[tuple[str, str, Kind]]


@dataclasses.dataclass(frozen=True)
class ScaledRow(Row):
    """A layer's kernel or bias, whose outputs its last source multiplies (LayerScale).

    Reading folds the scales in, exactly; writing gives scales of one.
    """

    def _whole(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        *own, scales = (array.astype(np.float32) for array in arrays)
        return super()._whole(own) * scales

    def _parts(self, array: np.ndarray) -> dict[str, np.ndarray]:
        own = Row(self.target, self.sources[:-1], self.change)
        return own._parts(array) | {self.sources[-1]: np.ones(array.shape[-1], array.dtype)}


@dataclasses.dataclass(frozen=True)
class InterleavedRow(Row):
    """qkv, where a file has both dimensions of a rotary pair side by side: (2i, 2i+1).

    `pairs` are their numbers there for those of a head here, where they are (i, i + d/2).
    """

    num_heads: int = 1
    pairs: tuple[int, ...] = ()

    def _whole(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return self._ordered(super()._whole(arrays), self._order)

    def _parts(self, array: np.ndarray) -> dict[str, np.ndarray]:
        return super()._parts(self._ordered(array, np.argsort(self._order)))

    @property
    def _order(self) -> np.ndarray:
        return np.concatenate([2 * np.array(self.pairs), 2 * np.array(self.pairs) + 1])

    def _ordered(self, array: np.ndarray, order: np.ndarray) -> np.ndarray:
        by_head = array.reshape(*array.shape[:-1], -1, len(order))
        turned, values = by_head[..., order], slice(-self.num_heads, None)
        turned[..., values, :] = by_head[..., values, :]
        return turned.reshape(array.shape)


class WithPosition(Row):
    """A class token whose position is stored with those of the patches, and is added to it.

    The row of the patches' positions is the one that knows their shape, and writes them.
    """

    def _whole(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        token, positions = (array.astype(np.float32) for array in arrays)
        return super()._whole([token]) + positions[0, :1]

    def _parts(self, array: np.ndarray) -> dict[str, np.ndarray]:
        return {self.sources[0]: self.change.write(array)}


_EPSILON = 1e-5  # of every batch norm


def _batch_scale(weight: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return weight.astype(np.float64) / np.sqrt(variance.astype(np.float64) + _EPSILON)


class _FoldedKernel(Row):
    """A kernel whose output channels a batch norm scales; written with one that does nothing."""

    def _whole(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        kernel, *scale = arrays
        return self.change.read(kernel) * _batch_scale(*scale)

    def _parts(self, array: np.ndarray) -> dict[str, np.ndarray]:
        kernel, weight, variance = self.sources
        ones = np.ones(array.shape[-1], array.dtype)
        return {kernel: self.change.write(array), weight: ones, variance: ones - _EPSILON}


class _FoldedBias(Row):
    """The offset of a batch norm; the kernel's row writes the scale that both share."""

    def _whole(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        bias, mean, *scale = arrays
        return bias - mean * _batch_scale(*scale)

    def _parts(self, array: np.ndarray) -> dict[str, np.ndarray]:
        bias, mean, *_ = self.sources
        return {bias: array, mean: np.zeros_like(array)}


def _array(change: Change, spec: Spec, ours: str, *theirs: str) -> Table:
    return [Row(ours, theirs, change)]


array = functools.partial(_array, SAME)
transposed = functools.partial(_array, TRANSPOSED)
token = functools.partial(_array, WITHOUT_FIRST_AXIS)
per_head = functools.partial(  # [H, 1, 1] -> [H]
    _array, Change(lambda array: array[:, 0, 0], lambda array: array[:, None, None])
)
vector = functools.partial(_array, ADDING_FIRST_AXIS)
layer_scale = functools.partial(_array, SAME)  # folded into the layer that our name begins with


def linear(spec: Spec, ours: str, *theirs: str, kernel: Change = TRANSPOSED) -> Table:
    """A layer that is one of theirs, or several side by side."""
    return [
        Row(f"{ours}.kernel", tuple(f"{name}.weight" for name in theirs), kernel),
        Row(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs)),
    ]


def matrix(spec: Spec, ours: str, theirs: str) -> Table:
    """A layer without a bias."""
    return linear(spec, ours, theirs)[:1]


def patches(spec: Spec, ours: str, theirs: str) -> Table:
    """A patch embedding, whose kernel is [D, C, p, p] there and [p*p*C, D] here."""
    sizes = (spec.patch_size, spec.patch_size, spec.in_channels)
    kernel = Change(
        lambda array: array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0]),
        lambda array: array.reshape(*sizes, -1).transpose(3, 2, 0, 1),
    )
    return linear(spec, ours, theirs, kernel=kernel)


def norm(spec: Spec, ours: str, theirs: str) -> Table:
    return [Row(f"{ours}.scale", (f"{theirs}.weight",)), Row(f"{ours}.bias", (f"{theirs}.bias",))]


def _convolution(change: Change, spec: Spec, ours: str, theirs: str) -> Table:
    """A convolution without a bias, and the batch norm behind it, which is folded in."""
    scale = (f"{theirs}.bn.weight", f"{theirs}.bn.running_var")
    return [
        _FoldedKernel(f"{ours}.kernel", (f"{theirs}.conv.weight", *scale), change),
        _FoldedBias(f"{ours}.bias", (f"{theirs}.bn.bias", f"{theirs}.bn.running_mean", *scale)),
    ]


# [D, C, 3, 3] -> [3, 3, C, D]; [D, C, 1, 1] -> [C, D]; [C, 1, 3, 3] -> [3, 3, C].
convolution = functools.partial(
    _convolution, Change(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
)
pointwise = functools.partial(
    _convolution, Change(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])
)
depthwise = functools.partial(
    _convolution,
    Change(lambda a: a[:, 0].transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)[:, None]),
)


def packed(spec: Spec, ours: str, theirs: str) -> Table:
    """The projection of torch.nn.MultiheadAttention to query, key and value."""
    return [
        Row(f"{ours}.kernel", (f"{theirs}.in_proj_weight",), TRANSPOSED),
        Row(f"{ours}.bias", (f"{theirs}.in_proj_bias",)),
    ]


def _of_three(stored: slice, spec: Spec, ours: str, theirs: str) -> Table:
    """Some of query, key and value; written, the others are zeros."""

    def read(array: np.ndarray) -> np.ndarray:
        parts = array.reshape(3, -1, *array.shape[1:])[stored]
        return parts.reshape(-1, *array.shape[1:]).T

    def write(array: np.ndarray) -> np.ndarray:
        parts = array.T.reshape(len(range(3)[stored]), -1, *array.shape[:-1])
        whole = np.zeros((3, *parts.shape[1:]), array.dtype)
        whole[stored] = parts
        return whole.reshape(-1, *array.shape[:-1])

    change = Change(read, write)
    return [Row(row.target, row.sources, change) for row in packed(spec, ours, theirs)]


query = functools.partial(_of_three, slice(0, 1))
key_and_value = functools.partial(_of_three, slice(1, 3))


def _factors(ours: str, theirs: str) -> Table:
    return [
        Row(f"{ours}.down", (f"{theirs}.VT.weight",)),
        Row(f"{ours}.up", (f"{theirs}.U.weight",), TRANSPOSED),
        Row(f"{ours}.bias", (f"{theirs}.U.bias",)),
    ]


def name_map(
    spec: Spec, names: Names, keys: Collection[str] = (), *, layer: str, **prefixes: str
) -> Table:
    """The rows of all parameters of this spec.

    Args:
      names: what any spec of the family may have; what this one lacks is left out.
      keys: the names in a file, which choose between spellings; without them it is the first.
      layer: what begins their names in a block.
      prefixes: what else stands for something in their names, such as "{at}".
    """
    keys = frozenset(keys)
    ranks = dict(zip((layer.name for layer in spec.layers), spec.ranks, strict=True))
    # In a published subnet, layers that could have factors say so where they have none.
    is_subnet = any(r is not None for r in spec.ranks) or any(map(_OF_A_SUBNET.search, keys))
    spellings: dict[str, list[tuple[str, Kind]]] = {}
    for ours, theirs, kind in names:
        for name in theirs.split("|"):
            name = f"{layer}{name}" if name[0] == "." else name
            for prefix, stands_for in prefixes.items():
                name = name.replace(f"{{{prefix}}}", stands_for)
            whole = f"blocks.{{block}}{ours}" if ours[0] == "." else ours
            spellings.setdefault(whole, []).append((name, kind))
    rows: Table = []
    scales: dict[str, str] = {}
    for ours, options in spellings.items():
        places = _places(spec, ours)
        found = [
            (name, kind)
            for name, kind in options
            for first in (_sources(name, place)[0] for place in places[:1])
            if first in keys or f"{first}.weight" in keys
        ]
        name, kind = (*found, *options)[0]
        for place in places:
            target, sources = ours.format(**place), _sources(name, place)
            if kind is layer_scale:
                scales |= {target.rpartition(".")[0]: sources[0]} if found else {}
            elif ranks.get(target) is not None:
                rows += _factors(target, sources[0])
            elif target in ranks and is_subnet:
                rows += kind(spec, target, f"{sources[0]}.fc")
            else:
                rows += kind(spec, target, *sources)
    absent = _absent(spec)
    return [_scaled(row, scales) for row in rows if not absent.match(row.target)]


def _sources(name: str, places: dict) -> list[str]:
    """The names that "x.[a b]" stands for."""
    before, _, several = name.format(**places).partition("[")
    return [before + part for part in several.rstrip("]").split()] or [before]


def _places(spec: Spec, ours: str) -> list[dict]:
    """The numbers to fill in one of our names, for each time that the network has it."""
    if "{" not in ours:
        return [{}]
    if "{block}" not in ours:  # the convolutions of a TinyViT's first stage
        return [{"i": i} for i in range(spec.depths[0])] if isinstance(spec, TinyViTSpec) else []
    if isinstance(spec, TinyViTSpec):
        depths = (0, *spec.depths[1:])
    else:
        depths = spec.depths if isinstance(spec, SwinSpec) else (len(spec.blocks),)
    pairs = [(stage, i) for stage, depth in enumerate(depths) for i in range(depth)]
    return [
        {"block": block, "stage": stage, "before": stage - 1, "i": i}
        for block, (stage, i) in enumerate(pairs)
        if ".downsample" not in ours or (stage > 0 and i == 0)
    ]


def _absent(spec: Spec) -> re.Pattern:
    """The beginnings of names of what this spec lacks and others of its family have."""
    options: dict[str, object] = {
        r"blocks\.\d+\.attn\.qkv\.bias": spec.qkv_bias,
        r"blocks\.\d+\.mlp\.norm": spec.mlp_norm,
        r"head(_dist)?\.": spec.num_classes,
        r"head(_dist)?\.bias": spec.head_bias,
    }
    if isinstance(spec, ViTSpec):
        options |= {
            "cls_token": spec.class_token,
            "dist_token|head_dist": spec.distilled,
            "reg_token": spec.num_registers,
            "pos_embed": spec.num_positions,
            r"patch_embed\.proj\.bias": spec.patch_bias,
            "norm_pre": spec.pre_norm,
            r"blocks\.\d+\.attn\.relative_position_bias_table": spec.relative_positions,
            "attn_pool": spec.pool == "attention",
        }
    elif isinstance(spec, SwinSpec):
        options["absolute_pos_embed"] = spec.absolute_pos_embed
        options[r"patch_embed\.norm"] = spec.patch_norm
        options[r"blocks\.\d+\.attn\.relative_position"] = not spec.cosine_attention
        options[r"blocks\.\d+\.attn\.(logit_scale|cpb_mlp)"] = spec.cosine_attention
    return re.compile("|".join(names for names, is_here in options.items() if not is_here) or "$^")


def _scaled(row: Row, scales: dict[str, str]) -> Row:
    """Factors share the outputs of the second; the first one is as it was."""
    layer, _, part = row.target.rpartition(".")
    if layer not in scales or part == "down":
        return row
    return ScaledRow(row.target, (*row.sources, scales[layer]), row.change)
