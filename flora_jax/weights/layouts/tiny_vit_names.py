"""The names of timm's TinyViT, whose batch norms are folded into the convolutions before them."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from flora_jax.models.spec import BlockSpec
from flora_jax.models.tiny_vit_spec import TinyViTSpec
from flora_jax.weights.layouts.tables import (
    blocks,
    is_subnet,
    linear,
    norm,
    places,
    present_in,
)
from flora_jax.weights.rows import TRANSPOSED, Change, Row, Table

_EPSILON = 1e-5  # of every batch norm
_BLOCK = {
    "norm1": "attn.norm",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "norm2": "mlp.norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# [D, C, 3, 3] -> [3, 3, C, D]; [D, C, 1, 1] -> [C, D]; [C, 1, 3, 3] -> [3, 3, C].
_FULL = Change(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
_POINTWISE = Change(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])
_DEPTHWISE = Change(lambda a: a[:, 0].transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)[:, None])


def timm_tiny_vit(spec: TinyViTSpec, keys: Collection[str] = ()) -> Table:
    """timm's TinyViT."""
    table = [
        *_folded("patch_embed.conv1", "patch_embed.conv1", _FULL),
        *_folded("patch_embed.conv2", "patch_embed.conv2", _FULL),
    ]
    for i in range(spec.depths[0]):
        table += _point_depth_point(f"mbconvs.{i}", f"stages.0.blocks.{i}")
    for place in places(spec):
        ours, stage = f"blocks.{place['block']}", f"stages.{place['stage']}"
        theirs = f"{stage}.blocks.{place['i']}"
        if place["i"] == 0:
            table += _point_depth_point(f"{ours}.downsample", f"{stage}.downsample")
        biases = (f"{theirs}.attn.attention_biases",)
        table.append(Row(f"{ours}.attn.attention_biases", biases, TRANSPOSED))
        table += _folded(f"{ours}.local_conv", f"{theirs}.local_conv", _DEPTHWISE)
    of_blocks = blocks(spec, "stages.{stage}.blocks.{i}", _BLOCK, is_subnet=is_subnet(spec, keys))
    table += [_by_part(row, spec.blocks) for row in of_blocks]
    return present_in(spec, *table, *norm("norm", "head.norm"), *linear("head", "head.fc"))


def _point_depth_point(ours: str, theirs: str) -> Table:
    changes = {"conv1": _POINTWISE, "conv2": _DEPTHWISE, "conv3": _POINTWISE}
    return [
        row
        for name, change in changes.items()
        for row in _folded(f"{ours}.{name}", f"{theirs}.{name}", change)
    ]


def _folded(ours: str, theirs: str, kernel: Change) -> Table:
    """The rows of a convolution without bias and the batch norm behind it."""
    scale = (f"{theirs}.bn.weight", f"{theirs}.bn.running_var")
    return [
        _FoldedKernel(f"{ours}.kernel", (f"{theirs}.conv.weight", *scale), kernel),
        _FoldedBias(f"{ours}.bias", (f"{theirs}.bn.bias", f"{theirs}.bn.running_mean", *scale)),
    ]


def _scale(weight: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return weight.astype(np.float64) / np.sqrt(variance.astype(np.float64) + _EPSILON)


class _FoldedKernel(Row):
    """A kernel whose output channels a batch norm scales; written with one that does nothing."""

    def _whole(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        kernel, *scale = arrays
        return self.change.read(kernel) * _scale(*scale)

    def _parts(self, array: np.ndarray) -> dict[str, np.ndarray]:
        kernel, weight, variance = self.sources
        ones = np.ones(array.shape[-1], array.dtype)
        return {kernel: self.change.write(array), weight: ones, variance: ones - _EPSILON}


class _FoldedBias(Row):
    """What a batch norm adds; the kernel's row writes the scale that both share."""

    def _whole(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        bias, mean, *scale = arrays
        return bias - mean * _scale(*scale)

    def _parts(self, array: np.ndarray) -> dict[str, np.ndarray]:
        bias, mean, *_ = self.sources
        return {bias: array, mean: np.zeros_like(array)}


def _by_part(row: Row, blocks: Sequence[BlockSpec]) -> Row:
    """Puts the outputs of qkv, stored head by head as [q | k | v], into query, key and value."""
    _, block, *module, kind = row.target.split(".")
    if module != ["attn", "qkv"] or kind == "down":
        return row
    num_heads = blocks[int(block)].num_heads

    def reordered(array: np.ndarray, outer: int, inner: int) -> np.ndarray:
        parts = array.reshape(*array.shape[:-1], outer, inner, -1)
        return parts.swapaxes(-3, -2).reshape(array.shape)

    change = Change(
        lambda array: reordered(row.change.read(array), num_heads, 3),
        lambda array: row.change.write(reordered(array, 3, num_heads)),
    )
    return dataclasses.replace(row, change=change)
