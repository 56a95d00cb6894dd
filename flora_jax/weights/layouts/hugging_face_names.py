"""The names of transformers: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP and Swin."""

import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from flora_jax.errors import InputError
from flora_jax.models.swin_spec import SwinSpec
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.layouts.tables import (
    BIAS_TABLE,
    blocks,
    downsampling,
    linear,
    norm,
    present_in,
)
from flora_jax.weights.rows import SAME, WITHOUT_FIRST_AXIS, Change, Row, Table, patch_kernel

# A block's modules: our name -> theirs, several where one of ours is stored apart.
# transformers writes the names of its version 4 to every file; version 5 has others in memory.
_VIT = {
    "norm1": "layernorm_before",
    "attn.qkv": "attention.attention.query attention.attention.key attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_SWIN = _VIT | {
    "attn.qkv": "attention.self.query attention.self.key attention.self.value",
    BIAS_TABLE: "attention.self.relative_position_bias_table",
}
_VIT_5 = _VIT | {
    "attn.qkv": "attention.q_proj attention.k_proj attention.v_proj",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SWIN_5 = _VIT_5 | {BIAS_TABLE: "attention.relative_position_bias.relative_position_bias_table"}
# What other models call them; a file has those of which the first part is among its names.
_ALSO = {
    "norm1": ("norm1", "layer_norm1"),
    "attn.qkv": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj",),
    "attn.proj": ("self_attn.out_proj",),
    "norm2": ("norm2", "layer_norm2"),
    "mlp.fc1": ("mlp.fc1", "mlp.up_proj"),
    "mlp.fc2": ("mlp.fc2", "mlp.down_proj", "mlp.weights_out"),
}
_GATED_FC1 = ("mlp.weights_in", "mlp.gate_proj mlp.up_proj")
_SCALES = {"attn.proj": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"}
_FIRST_BLOCK = re.compile(r"(?!text_model)(.*?)0\.(layernorm_before|norm1|layer_norm1)\.weight$")
_EMBEDDINGS = re.compile(r"(?!text_model)(.*?)embeddings\.")
_ADDING_FIRST_AXIS = Change(lambda array: array[None], lambda array: array[0])


class _WithPosition(Row):
    """A class token whose position is stored with those of the patches, and is added to it."""

    def read(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        token, positions = arrays
        return super().read([token]) + positions[0, :1].astype(np.float32)

    def write(self, array: np.ndarray) -> dict[str, np.ndarray]:
        return Row(self.target, self.sources[:1], self.change).write(array)


# Positions [1, 1 + N, D] -> of the patches alone [N, D].
_OF_PATCHES = Change(
    lambda array: array[0, 1:], lambda array: np.concatenate([0 * array[:1], array])[None]
)


def hugging_face_vit(spec: ViTSpec, keys: Collection[str] = ()) -> Table:
    """Every plain ViT of transformers, with its classifier or without."""
    is_5 = any(key.endswith(".q_proj.weight") for key in keys)
    at = _prefix(_EMBEDDINGS, keys, "deit." if spec.distilled else "vit.")
    in_blocks = _prefix(_FIRST_BLOCK, keys, f"{at}{'layers.' if is_5 else 'encoder.layer.'}")
    names = _names(spec, _VIT_5 if is_5 else _VIT, in_blocks, keys)
    if spec.pool != "token" and names["norm1"] == _VIT["norm1"]:
        raise InputError("Hugging Face ViTs classify the class token: set pool='token' in the spec")
    has_scales = f"{in_blocks}0.{_SCALES['attn.proj']}" in keys
    query, _, value = [*names["attn.qkv"].split(), "", ""][:3]
    return present_in(
        spec,
        *_embeddings(spec, f"{at}embeddings", keys),
        *norm("norm_pre", f"{at}pre_layrnorm"),
        *norm("norm", at + _present(keys, at, ".weight", "layernorm", "norm", "post_layernorm")),
        *_attention_pool(f"{at}head"),
        *linear("head", "cls_classifier" if spec.distilled else "classifier"),
        *linear("head_dist", "distillation_classifier"),
        *blocks(
            spec,
            f"{in_blocks}{{block}}",
            names,
            biases=() if spec.k_bias else (f"{query}.bias", f"{value}.bias"),
            scales=_SCALES if has_scales else None,
        ),
    )


def hugging_face_swin(spec: SwinSpec, keys: Collection[str] = ()) -> Table:
    """SwinForImageClassification of transformers."""
    model = _prefix(_EMBEDDINGS, keys, "swin.")
    at, layer = f"{model}embeddings", f"{model}encoder.layers"
    proj = f"{at}.patch_embeddings.projection"
    is_5 = any(key.endswith(".q_proj.weight") for key in keys)
    return present_in(
        spec,
        Row("absolute_pos_embed", (f"{at}.position_embeddings",), WITHOUT_FIRST_AXIS),
        *linear("patch_embed.proj", proj, kernel=patch_kernel(spec)),
        *norm("patch_embed.norm", f"{at}.norm"),
        *norm("norm", f"{model}layernorm"),
        *linear("head", "classifier"),
        *downsampling(spec, f"{layer}.{{before}}.downsample"),
        *blocks(spec, f"{layer}.{{stage}}.blocks.{{i}}", _SWIN_5 if is_5 else _SWIN),
    )


def _embeddings(spec: ViTSpec, at: str, keys: Collection[str]) -> Table:
    patches = ("patch_embeddings.projection", "patch_embeddings", "patch_embedding")
    proj = f"{at}.{_present(keys, f'{at}.', '.weight', *patches)}"
    token, positions = f"{at}.cls_token", f"{at}.position_embeddings"
    token_change, positions_change = WITHOUT_FIRST_AXIS, WITHOUT_FIRST_AXIS
    if f"{at}.class_embedding" in keys:  # CLIP
        token, token_change = f"{at}.class_embedding", _ADDING_FIRST_AXIS
    if f"{at}.position_embedding.weight" in keys:  # CLIP and SigLIP
        positions, positions_change = f"{at}.position_embedding.weight", SAME
    class_row = Row("cls_token", (token,), token_change)
    registers = f"{at}.register_tokens"
    if registers in keys and positions in keys and spec.positions == "patches":
        # DINOv2 adds positions first: the registers that come after have none.
        class_row = _WithPosition("cls_token", (token, positions), token_change)
        positions_change = _OF_PATCHES
    elif f"{at}.distillation_token" in keys:  # where nobody classifies it, it is a register
        registers = f"{at}.distillation_token"
    return [
        class_row,
        Row("dist_token", (f"{at}.distillation_token",), WITHOUT_FIRST_AXIS),
        Row("reg_token", (registers,), WITHOUT_FIRST_AXIS),
        Row("pos_embed", (positions,), positions_change),
        *linear("patch_embed.proj", proj, kernel=patch_kernel(spec)),
    ]


def _attention_pool(at: str) -> Table:
    """torch.nn.MultiheadAttention stores the three projections as one, [3 D, D]."""
    sources = (f"{at}.attention.in_proj_weight",), (f"{at}.attention.in_proj_bias",)
    return [
        Row("attn_pool.latent", (f"{at}.probe",), WITHOUT_FIRST_AXIS),
        Row("attn_pool.q.kernel", sources[0], Change(_of_query, _read_only)),
        Row("attn_pool.q.bias", sources[1], Change(_of_query, _read_only)),
        Row("attn_pool.kv.kernel", sources[0], Change(_of_key_and_value, _read_only)),
        Row("attn_pool.kv.bias", sources[1], Change(_of_key_and_value, _read_only)),
        *linear("attn_pool.proj", f"{at}.attention.out_proj"),
        *norm("attn_pool.norm", f"{at}.layernorm"),
        *linear("attn_pool.mlp.fc1", f"{at}.mlp.fc1"),
        *linear("attn_pool.mlp.fc2", f"{at}.mlp.fc2"),
    ]


def _of_query(array: np.ndarray) -> np.ndarray:
    return array[: len(array) // 3].T


def _of_key_and_value(array: np.ndarray) -> np.ndarray:
    return array[len(array) // 3 :].T


def _read_only(array: np.ndarray) -> np.ndarray:
    raise NotImplementedError("models are written under timm's names only")


def _names(
    spec: ViTSpec, names: Mapping[str, str], in_blocks: str, keys: Collection[str]
) -> dict[str, str]:
    """A block's modules under the names of this file."""
    found = {}
    for ours, theirs in names.items():
        others = _GATED_FC1 if ours == "mlp.fc1" and spec.gated_mlp else _ALSO[ours]
        every = (theirs, *others)
        firsts = [f"{in_blocks}0.{name.split()[0]}.weight" for name in every]
        found[ours] = next(
            (name for name, first in zip(every, firsts, strict=True) if first in keys), theirs
        )
    return found


def _prefix(pattern: re.Pattern, keys: Collection[str], otherwise: str) -> str:
    """What stands before the names that the pattern finds, in its first group."""
    return next((match[1] for match in map(pattern.match, keys) if match), otherwise)


def _present(keys: Collection[str], at: str, ending: str, *names: str) -> str:
    """The first of these names that the file has, or the first of all."""
    return next((name for name in names if f"{at}{name}{ending}" in keys), names[0])
