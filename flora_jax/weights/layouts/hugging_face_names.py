"""The names of transformers: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP and Swin."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from flora_jax.errors import InputError
from flora_jax.models.swin_spec import SwinSpec
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.layouts.tables import (
    BIAS_TABLE,
    OF_PATCHES,
    WithPosition,
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
# What wrappers put before the names, and what stands before those of the encoder: "vit.".
_ENCODER = re.compile(
    r"((?:.*?\.)??)((?:\w+\.)?)embeddings\.(patch_embedding|cls_token|class_embedding)"
)
_FIRST_NORM = r"((?:\w+\.)*?)0\.(layernorm_before|norm1|layer_norm1)\.weight$"
_ADDING_FIRST_AXIS = Change(lambda array: array[None], lambda array: array[0])


def hugging_face_vit(spec: ViTSpec, keys: Collection[str] = ()) -> Table:
    """Every plain ViT of transformers, with its classifier or without.

    A DeiT's distillation token that nobody classifies is a register.
    """
    is_5 = _is_transformers_5(keys)
    at, keys = _encoder(keys, "deit." if spec.distilled else "vit.")
    in_blocks = at + _before(
        re.compile(re.escape(at) + _FIRST_NORM), keys, "layers." if is_5 else "encoder.layer."
    )
    names = _names(spec, _VIT_5 if is_5 else _VIT, in_blocks, keys)
    if spec.pool != "token" and names["norm1"] == _VIT["norm1"]:
        raise InputError("Hugging Face ViTs classify the class token: set pool='token' in the spec")
    if spec.distilled and "classifier.weight" in keys:
        raise InputError(
            "this DeiT has a distillation token but one classifier, of the class token alone: set "
            "distilled=False, num_registers=1 in the spec"
        )
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
    """SwinForImageClassification of transformers, and the bare SwinModel."""
    model, keys = _encoder(keys, "swin.")
    at, layer = f"{model}embeddings", f"{model}encoder.layers"
    proj = f"{at}.patch_embeddings.projection"
    names = _SWIN_5 if _is_transformers_5(keys) else _SWIN
    return present_in(
        spec,
        Row("absolute_pos_embed", (f"{at}.position_embeddings",), WITHOUT_FIRST_AXIS),
        *linear("patch_embed.proj", proj, kernel=patch_kernel(spec)),
        *norm("patch_embed.norm", f"{at}.norm"),
        *norm("norm", f"{model}layernorm"),
        *linear("head", "classifier"),
        *downsampling(spec, f"{layer}.{{before}}.downsample"),
        *blocks(spec, f"{layer}.{{stage}}.blocks.{{i}}", names),
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
        class_row = WithPosition("cls_token", (token, positions), token_change)
        positions_change = OF_PATCHES
    elif f"{at}.distillation_token" in keys and not spec.distilled:
        registers = f"{at}.distillation_token"
    return [
        class_row,
        Row("dist_token", (f"{at}.distillation_token",), WITHOUT_FIRST_AXIS),
        Row("reg_token", (registers,), WITHOUT_FIRST_AXIS),
        Row("pos_embed", (positions,), positions_change),
        *linear("patch_embed.proj", proj, kernel=patch_kernel(spec)),
    ]


@dataclasses.dataclass(frozen=True)
class _OfThree(Row):
    """Some of the projections of query, key and value, which are stored as one [3 D, D]."""

    parts: slice = dataclasses.field(kw_only=True)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        width = shape[-1] // len(range(3)[self.parts])
        return {self.sources[0]: (3 * width, *shape[:-1])}

    def _whole(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        (array,) = arrays
        of_each = array.reshape(3, -1, *array.shape[1:])[self.parts]
        return of_each.reshape(-1, *array.shape[1:]).T

    def _parts(self, array: np.ndarray) -> dict[str, np.ndarray]:
        raise NotImplementedError("models are written under timm's names only")


def _attention_pool(at: str) -> Table:
    """SigLIP's, by torch.nn.MultiheadAttention."""
    query, key_and_value = slice(0, 1), slice(1, 3)
    kernels, biases = (f"{at}.attention.in_proj_weight",), (f"{at}.attention.in_proj_bias",)
    return [
        Row("attn_pool.latent", (f"{at}.probe",), WITHOUT_FIRST_AXIS),
        _OfThree("attn_pool.q.kernel", kernels, parts=query),
        _OfThree("attn_pool.q.bias", biases, parts=query),
        _OfThree("attn_pool.kv.kernel", kernels, parts=key_and_value),
        _OfThree("attn_pool.kv.bias", biases, parts=key_and_value),
        *linear("attn_pool.proj", f"{at}.attention.out_proj"),
        *norm("attn_pool.norm", f"{at}.layernorm"),
        *linear("attn_pool.mlp.fc1", f"{at}.mlp.fc1"),
        *linear("attn_pool.mlp.fc2", f"{at}.mlp.fc2"),
    ]


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


def _encoder(keys: Collection[str], otherwise: str) -> tuple[str, Collection[str]]:
    """What stands before the encoder's names, and all names without what wrappers add to them."""
    found = next(filter(None, map(_ENCODER.match, keys)), None)
    if found is None:
        return otherwise, keys
    wrapper, encoder, _ = found.groups()
    return encoder, {key.removeprefix(wrapper) for key in keys} if wrapper else keys


def _before(pattern: re.Pattern, keys: Collection[str], otherwise: str) -> str:
    """What stands before the name that the pattern finds, in its first group."""
    return next((match[1] for match in map(pattern.match, keys) if match), otherwise)


def _is_transformers_5(keys: Collection[str]) -> bool:
    return any(key.endswith(".q_proj.weight") for key in keys)


def _present(keys: Collection[str], at: str, ending: str, *names: str) -> str:
    """The first of these names that the file has, or the first of all."""
    return next((name for name in names if f"{at}{name}{ending}" in keys), names[0])
