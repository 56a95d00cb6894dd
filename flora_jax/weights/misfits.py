"""Weights that do not fit a spec: which fields of it would have to be others."""

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from flora_jax.models.spec import Spec
from flora_jax.models.swin_spec import SwinSpec
from flora_jax.models.tiny_vit_spec import TinyViTSpec
from flora_jax.models.vit_spec import POOLS, POSITIONS, ViTSpec
from flora_jax.weights.detect import Layout, is_buffer
from flora_jax.weights.rows import Table

# Fields of a spec that decide which weights there are, and so can be read off a file's names.
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "class_token": (True, False),
    "pool": POOLS,
    "distilled": (True, False),
    "qkv_bias": (True, False),
    "patch_norm": (True, False),
    "absolute_pos_embed": (True, False),
    "positions": POSITIONS,
    "pre_norm": (True, False),
    "patch_bias": (True, False),
    "k_bias": (True, False),
    "gated_mlp": (True, False),
    "fc_norm": (True, False),
}
_AT_ONCE = 2  # options that are changed together, such as pool and class_token
_BLOCK = re.compile(r"(?:^|\.)(?:(?:res)?blocks|layers?)\.(\d+)\.")


def misfits(table: Table, keys: Collection[str]) -> tuple[set[str], set[str]]:
    """Names that the table wants and the file lacks, and the reverse."""
    wanted = {source for row in table for source in row.sources}
    found = {key for key in keys if not is_buffer(key)}
    return wanted - found, found - wanted


def advice(fields: Mapping[str, Any]) -> str:
    """What an error says of fields that should have these values; nothing where there are none."""
    listed = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    return f"; set {listed} in the spec" if fields else ""


def fields_to_set(layout: Layout, spec: Spec, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fields under which most of a file's names fit, where they are not those of the spec."""
    changes = sizes_in(layout, spec, arrays)
    changes.pop("positions", None)  # another prefix may be the reason
    of_spec = [field.name for field in dataclasses.fields(spec)]
    options = {name: values for name, values in _OPTIONS.items() if name in of_spec}
    fewest = _count_misfits(layout, spec, changes, arrays)
    if fewest is None:  # sizes that make no network by themselves
        changes, fewest = {}, _count_misfits(layout, spec, {}, arrays) or 0
    is_better = True
    while fewest and is_better:
        best = changes
        for more in _combinations(options):
            tried = {name: v for name, v in (changes | more).items() if v != getattr(spec, name)}
            number = _count_misfits(layout, spec, tried, arrays)
            if number is not None and (number, len(tried)) < (fewest, len(best)):
                best, fewest = tried, number
        is_better, changes = best is not changes, best
    ordered = sorted(changes, key=[*_OPTIONS, *of_spec].index)
    return {name: changes[name] for name in ordered}


def sizes_in(layout: Layout, spec: Spec, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Sizes that the shapes and numbers of a file show, where they are not those of the spec.

    How many heads a ViT has, no shape shows; where a width cannot have the spec's, they are those
    of as many dimensions.
    """
    table = layout.table(spec, arrays)
    shapes = {
        row.target: np.shape(arrays[row.sources[0]]) for row in table if row.sources[0] in arrays
    }
    found: dict[str, Any] = {}
    patches = shapes.get("patch_embed.proj.kernel", ())
    if len(patches) == 4:
        found["embed_dim"], found["in_channels"], *_, found["patch_size"] = patches
    if isinstance(spec, ViTSpec):
        blocks = [int(match[1]) for match in map(_BLOCK.search, arrays) if match]
        found["depth"] = max(blocks, default=spec.depth - 1) + 1
        found["num_registers"] = next(
            (a.shape[1] for name, a in arrays.items() if _is_registers(name, a, arrays)),
            0 if "reg_token" not in shapes else spec.num_registers,
        )
        found |= _positions(spec, shapes.get("pos_embed", ()))
        found |= _to_make_a_network(spec, found, shapes.get("pos_embed", ()))
    elif isinstance(spec, SwinSpec):
        firsts = itertools.accumulate((0, *spec.depths[:-1]))
        tables = [f"blocks.{first}.attn.relative_position_bias_table" for first in firsts]
        if all(len(shapes.get(name, ())) == 2 for name in tables):
            found["num_heads"] = tuple(shapes[name][1] for name in tables)
    elif isinstance(spec, TinyViTSpec):
        found |= _of_stages(spec, table, arrays)
    return {name: value for name, value in found.items() if value != getattr(spec, name)}


def _of_stages(
    spec: TinyViTSpec, table: Table, arrays: Mapping[str, np.ndarray]
) -> dict[str, tuple[int, ...]]:
    """Widths and heads of a TinyViT, where the first block of every stage is there."""
    shapes = {
        row.target: row.change.read(arrays[row.sources[0]]).shape
        for row in table
        if row.target.endswith(("conv3.kernel", "attention_biases"))
        and row.sources[0] in arrays
        and arrays[row.sources[0]].ndim in (2, 4)
    }
    firsts = list(itertools.accumulate((0, *spec.depths[1:-1])))
    widths = ["mbconvs.0.conv3.kernel", *(f"blocks.{i}.downsample.conv3.kernel" for i in firsts)]
    heads = [f"blocks.{i}.attn.attention_biases" for i in firsts]
    if not shapes.keys() >= {*widths, *heads}:
        return {}
    return {
        "embed_dims": tuple(shapes[name][1] for name in widths),
        "num_heads": (spec.num_heads[0], *(shapes[name][1] for name in heads)),
    }


def _is_registers(name: str, array: np.ndarray, names: Collection[str]) -> bool:
    endings: tuple[str, ...] = ("reg_token", "register_tokens")
    if "distillation_classifier.weight" not in names:
        endings += (".distillation_token",)  # that nobody classifies
    return name.endswith(endings) and np.ndim(array) == 3


def _positions(spec: ViTSpec, shape: tuple[int, ...]) -> dict[str, str]:
    """Whose positions these are, where their number tells."""
    if len(shape) < 2 or spec.num_prefix_tokens == 0:
        return {}
    with_prefix, patches = _is_square(shape[-2] - spec.num_prefix_tokens), _is_square(shape[-2])
    if with_prefix == patches:
        return {}
    return {"positions": "all" if with_prefix else "patches"}


def _to_make_a_network(
    spec: ViTSpec, found: Mapping[str, Any], positions: tuple[int, ...]
) -> dict[str, int]:
    """The image size and the heads that other patches and another width need."""
    patch_size, embed_dim = found.get("patch_size"), found.get("embed_dim")
    changes: dict[str, int] = {}
    if patch_size and spec.image_size % patch_size:
        prefix = spec.num_prefix_tokens if spec.positions == "all" else 0
        patches = positions[-2] - prefix if len(positions) > 1 else 0
        grid = math.isqrt(patches) if _is_square(patches) else spec.image_size // patch_size
        changes["image_size"] = max(grid, 1) * patch_size
    head_dim = spec.embed_dim // spec.num_heads
    if embed_dim and embed_dim % spec.num_heads and embed_dim % head_dim == 0:
        changes["num_heads"] = embed_dim // head_dim
    return changes


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _combinations(options: Mapping[str, tuple[Any, ...]]):
    for number in range(1, _AT_ONCE + 1):
        for names in itertools.combinations(options, number):
            for values in itertools.product(*(options[name] for name in names)):
                yield dict(zip(names, values, strict=True))


def _count_misfits(
    layout: Layout, spec: Spec, changes: Mapping[str, Any], keys: Collection[str]
) -> int | None:
    """None where these fields contradict each other."""
    if changes.keys() - _OPTIONS.keys():
        changes = {**changes, "blocks": ()}
    try:
        table = layout.table(dataclasses.replace(spec, **changes), keys)
    except ValueError:
        return None
    return sum(map(len, misfits(table, keys)))
