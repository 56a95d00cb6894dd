"""What the tables of all libraries are put together from."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from flora_jax.models.spec import Spec
from flora_jax.models.swin_spec import SwinSpec
from flora_jax.models.tiny_vit_spec import TinyViTSpec
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.rows import TRANSPOSED, Change, Row, Table

BIAS_TABLE = "attn.relative_position_bias_table"
# A searchable layer of a published subnet: a pair of factors, or `fc` where it stayed dense.
_OF_A_SUBNET = re.compile(r"\.(VT|(qkv|fc1|fc2)\.fc)\.weight$")
_SEARCHABLE = ("attn.qkv", "mlp.fc1", "mlp.fc2")


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


class WithPosition(Row):
    """A class token whose position is stored with those of the patches, and is added to it.

    The row of the patches' positions is the one that knows their shape, and writes them.
    """

    def _whole(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        token, positions = (array.astype(np.float32) for array in arrays)
        return super()._whole([token]) + positions[0, :1]

    def _parts(self, array: np.ndarray) -> dict[str, np.ndarray]:
        return {self.sources[0]: self.change.write(array)}


# Positions [1, 1 + N, D] -> of the patches alone [N, D].
OF_PATCHES = Change(
    lambda array: array[0, 1:], lambda array: np.concatenate([0 * array[:1], array])[None]
)


def is_subnet(spec: Spec, keys: Collection[str]) -> bool:
    """Whether layers that could have factors say so where they have none."""
    return any(rank is not None for rank in spec.ranks) or any(map(_OF_A_SUBNET.search, keys))


def linear(
    ours: str, *theirs: str, kernel: Change = TRANSPOSED, biases: Sequence[str] = ()
) -> Table:
    """The rows of a layer that is one of theirs, or several side by side.

    `biases` are the names of theirs, where these do not follow from the layers'.
    """
    return [
        Row(f"{ours}.kernel", tuple(f"{name}.weight" for name in theirs), kernel),
        Row(f"{ours}.bias", tuple(biases or (f"{name}.bias" for name in theirs))),
    ]


def norm(ours: str, theirs: str) -> Table:
    return [Row(f"{ours}.scale", (f"{theirs}.weight",)), Row(f"{ours}.bias", (f"{theirs}.bias",))]


def factors(ours: str, theirs: str) -> Table:
    return [
        Row(f"{ours}.down", (f"{theirs}.VT.weight",)),
        Row(f"{ours}.up", (f"{theirs}.U.weight",), TRANSPOSED),
        Row(f"{ours}.bias", (f"{theirs}.U.bias",)),
    ]


def downsampling(spec: SwinSpec, theirs: str) -> Table:
    """`theirs` has a place for the number of the `stage` it leads to, or of the one `before`."""
    rows: Table = []
    for place in places(spec):
        if place["stage"] > 0 and place["i"] == 0:
            ours = f"blocks.{place['block']}.downsample"
            name = theirs.format(**place, before=place["stage"] - 1)
            rows += norm(f"{ours}.norm", f"{name}.norm")
            rows.append(Row(f"{ours}.reduction.kernel", (f"{name}.reduction.weight",), TRANSPOSED))
    return rows


def blocks(
    spec: Spec,
    prefix: str,
    names: Mapping[str, str],
    *,
    is_subnet: bool = False,
    biases: Sequence[str] = (),
    scales: Mapping[str, str] | None = None,
) -> Table:
    """The rows of all blocks.

    Args:
      prefix: of a block, with places for its number, its stage and its number `i` in the stage.
      names: a block's modules: our name -> theirs, several where one of ours is stored apart.
      is_subnet: layers that could have factors say so where they have none.
      biases: of qkv, where their names do not follow from the layers'.
      scales: LayerScale's vectors by the name of our layer whose outputs they multiply.
    """
    rows: Table = []
    for place, block in zip(places(spec), spec.blocks, strict=True):
        ranks = dict(zip(_SEARCHABLE, block.ranks, strict=True))
        at = prefix.format(**place)
        for name, their_names in names.items():
            ours = f"blocks.{place['block']}.{name}"
            theirs = [f"{at}.{part}" for part in their_names.split()]
            if name.startswith("norm"):
                found = norm(ours, *theirs)
            elif name == BIAS_TABLE:
                found = [Row(ours, tuple(theirs))]
            elif ranks.get(name) is not None:
                found = factors(ours, theirs[0])
            elif name in ranks and is_subnet:
                found = linear(ours, f"{theirs[0]}.fc")
            elif name == "attn.qkv":
                found = linear(ours, *theirs, biases=[f"{at}.{part}" for part in biases])
            else:
                found = linear(ours, *theirs)
            if scales and name in scales:
                found = [_scaled(row, f"{at}.{scales[name]}") for row in found]
            rows += found
    return rows


def present_in(spec: Spec, *rows: Row) -> Table:
    """The rows of what this spec has, out of those that any spec of the family may have."""
    options: dict[str, object] = {
        r"blocks\.\d+\.attn\.qkv\.bias": spec.qkv_bias,
        r"head(_dist)?\.": spec.num_classes,
    }
    if isinstance(spec, ViTSpec):
        options |= {
            "cls_token": spec.class_token,
            "dist_token|head_dist": spec.distilled,
            "reg_token": spec.num_registers,
            "pos_embed": spec.num_positions,
            r"patch_embed\.proj\.bias": spec.patch_bias,
            "norm_pre": spec.pre_norm,
            "attn_pool": spec.pool == "attention",
        }
    elif isinstance(spec, SwinSpec):
        options["absolute_pos_embed"] = spec.absolute_pos_embed
        options[r"patch_embed\.norm"] = spec.patch_norm
    absent = [names for names, is_present in options.items() if not is_present]
    return [row for row in rows if not any(re.match(names, row.target) for names in absent)]


def _scaled(row: Row, scales: str) -> Row:
    """Factors share the outputs of the second; the first one is as it was."""
    if row.target.endswith(".down"):
        return row
    return ScaledRow(row.target, (*row.sources, scales), row.change)


def places(spec: Spec) -> list[dict[str, int]]:
    """The number of every block, its stage, and its number `i` within the stage."""
    if isinstance(spec, TinyViTSpec):
        depths = (0, *spec.depths[1:])  # its first stage has none of these blocks
    else:
        depths = spec.depths if isinstance(spec, SwinSpec) else (len(spec.blocks),)
    pairs = [(stage, i) for stage, depth in enumerate(depths) for i in range(depth)]
    return [{"block": block, "stage": stage, "i": i} for block, (stage, i) in enumerate(pairs)]
