"""The names of timm, of the releases that it reads itself, and of the published subnets."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np

from flora_jax.models.spec import Spec
from flora_jax.models.swin_spec import SwinSpec
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.layouts.tables import (
    BIAS_TABLE,
    OF_PATCHES,
    WithPosition,
    blocks,
    downsampling,
    is_subnet,
    linear,
    norm,
    present_in,
)
from flora_jax.weights.layouts.tiny_vit_names import timm_tiny_vit
from flora_jax.weights.rows import WITHOUT_FIRST_AXIS, Row, Table, patch_kernel

# A block's modules: our name -> theirs.
_VIT = {name: name for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
_SWIN = _VIT | {BIAS_TABLE: BIAS_TABLE}
# LayerScale in its ViTs, and in its EVA, which is what runs DINOv3 there.
_VIT_SCALES = {"attn.proj": "ls1.gamma", "mlp.fc2": "ls2.gamma"}
_EVA_SCALES = {"attn.proj": "gamma_1", "mlp.fc2": "gamma_2"}

# What timm, DINOv2 and DINOv3 call the registers.
_REGISTERS = ("reg_token", "register_tokens", "storage_tokens")

# Each table lists what any spec of the family may have; the rows that this spec lacks drop out.
# The `keys` of a file choose between spellings; without them it is the current one.


def timm_vit(spec: ViTSpec, keys: Collection[str] = ()) -> Table:
    """timm's ViT, DeiT and EVA, and the releases of DeiT, DINOv2 and DINOv3."""
    is_of_a_subnet = is_subnet(spec, keys)
    names = dict(_VIT)
    if spec.gated_mlp and not is_of_a_subnet:
        names |= _gated(spec, keys)
    is_masked = (
        not spec.k_bias and not is_of_a_subnet and "storage_tokens" in keys
    )  # DINOv3's release
    biases = () if spec.k_bias or is_of_a_subnet or is_masked else ("attn.q_bias", "attn.v_bias")
    registers = next((name for name in _REGISTERS if name in keys), "reg_token")
    class_row = Row("cls_token", ("cls_token",), WITHOUT_FIRST_AXIS)
    positions = Row("pos_embed", ("pos_embed",), WITHOUT_FIRST_AXIS)
    if registers == "register_tokens" and spec.positions == "patches":
        # DINOv2 adds positions first: the registers that come after have none.
        class_row = WithPosition("cls_token", ("cls_token", "pos_embed"), WITHOUT_FIRST_AXIS)
        positions = Row("pos_embed", ("pos_embed",), OF_PATCHES)
    table = present_in(
        spec,
        class_row,
        Row("dist_token", ("dist_token",), WITHOUT_FIRST_AXIS),
        Row("reg_token", (registers,), WITHOUT_FIRST_AXIS),
        positions,
        *linear("patch_embed.proj", "patch_embed.proj", kernel=patch_kernel(spec)),
        *norm("norm_pre", "norm_pre"),
        *norm("norm", "fc_norm" if spec.normalises_pooled else "norm"),
        Row("attn_pool.latent", ("attn_pool.latent",), WITHOUT_FIRST_AXIS),
        *linear("attn_pool.q", "attn_pool.q"),
        *linear("attn_pool.kv", "attn_pool.kv"),
        *linear("attn_pool.proj", "attn_pool.proj"),
        *norm("attn_pool.norm", "attn_pool.norm"),
        *linear("attn_pool.mlp.fc1", "attn_pool.mlp.fc1"),
        *linear("attn_pool.mlp.fc2", "attn_pool.mlp.fc2"),
        *linear("head", "head"),
        *linear("head_dist", "head_dist"),
        *blocks(
            spec,
            "blocks.{block}",
            names,
            is_subnet=is_of_a_subnet,
            biases=biases,
            scales=_scales(spec, keys),
        ),
    )
    return [_masked(row) for row in table] if is_masked else table


def timm_swin(spec: SwinSpec, keys: Collection[str] = ()) -> Table:
    """timm's Swin from 0.9 on, and Microsoft's release, where a stage ends with downsampling."""
    ends_with_it = any(key.startswith("layers.0.downsample.") for key in keys)
    return present_in(
        spec,
        Row("absolute_pos_embed", ("absolute_pos_embed",), WITHOUT_FIRST_AXIS),
        *linear("patch_embed.proj", "patch_embed.proj", kernel=patch_kernel(spec)),
        *norm("patch_embed.norm", "patch_embed.norm"),
        *norm("norm", "norm"),
        *linear("head", "head" if "head.weight" in keys else "head.fc"),
        *downsampling(spec, f"layers.{{{'before' if ends_with_it else 'stage'}}}.downsample"),
        *blocks(spec, "layers.{stage}.blocks.{i}", _SWIN, is_subnet=is_subnet(spec, keys)),
    )


def timm(spec: Spec) -> Table:
    """timm's current names; a compressed layer has those of the published subnets."""
    tables: dict[str, Callable[..., Table]] = {
        "vit": timm_vit,
        "swin": timm_swin,
        "tiny_vit": timm_tiny_vit,
    }
    return tables[spec.family](spec)


@dataclasses.dataclass(frozen=True)
class _WithoutKey(Row):
    """The biases of query and value, which DINOv3 stores with a key's that it masks out."""

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {self.sources[0]: (shape[0] // 2 * 3,)}

    def _whole(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        query, _, value = np.split(arrays[0], 3)
        return np.concatenate([query, value])


def _masked(row: Row) -> Row:
    return _WithoutKey(row.target, row.sources) if row.target.endswith("attn.qkv.bias") else row


def _gated(spec: ViTSpec, keys: Collection[str]) -> dict[str, str]:
    """The two layers of a gated MLP: the first as one or two, the second."""
    spellings = (
        {"mlp.fc1": "mlp.fc1_g mlp.fc1_x", "mlp.fc2": "mlp.fc2"},
        {"mlp.fc1": "mlp.w1 mlp.w2", "mlp.fc2": "mlp.w3"},
        {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"},
        {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
    )
    if not keys:
        return spellings[0 if spec.rope_theta is not None else -1]
    found = (s for s in spellings if f"blocks.0.{s['mlp.fc1'].split()[0]}.weight" in keys)
    return next(found, spellings[-1])


def _scales(spec: ViTSpec, keys: Collection[str]) -> dict[str, str] | None:
    """The names of LayerScale where the file has it; to write one, where the spec says so."""
    if not keys:
        return (_EVA_SCALES if spec.rope_theta else _VIT_SCALES) if spec.layer_scale else None
    for scales in (_VIT_SCALES, _EVA_SCALES):
        if f"blocks.0.{scales['attn.proj']}" in keys:
            return scales
    return None
