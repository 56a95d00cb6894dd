"""Layouts of weights: the names of timm, transformers, OpenCLIP, the releases, and our own.

A layout is a function of a spec, and of the names in a file where these choose between spellings,
to the rows of a name map. Without a file it gives the names that are written.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Sequence

import numpy as np

from flora_jax.errors import InputError
from flora_jax.models.spec import BlockSpec, Spec
from flora_jax.models.swin_spec import SwinSpec
from flora_jax.models.tiny_vit_spec import TinyViTSpec
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.name_map import (
    OF_PATCHES,
    SAME,
    TRANSPOSED,
    WITHOUT_KEY,
    Change,
    InterleavedRow,
    Kind,
    Names,
    Row,
    Table,
    WithPosition,
    array,
    convolution,
    depthwise,
    key_and_value,
    layer_scale,
    linear,
    matrix,
    name_map,
    norm,
    packed,
    patches,
    per_head,
    pointwise,
    query,
    token,
    transposed,
    vector,
)

_BLOCK_NORMS, _BLOCK_LINEARS = (".norm1", ".norm2"), (".attn.qkv", ".attn.proj", ".mlp.fc1")
_BIAS_TABLE = "relative_position_bias_table"


def _alike(kind: Kind, *names: str) -> Names:
    """What has our name there, too."""
    return [(name, name, kind) for name in names]


# timm's ViT, DeiT, EVA and BEiT, and the releases of DeiT, DINOv2, DINOv3 and EVA-02.
_TIMM_VIT: Names = [
    *_alike(token, "cls_token", "dist_token", "pos_embed", "attn_pool.latent"),
    ("reg_token", "reg_token|register_tokens|storage_tokens", token),
    *_alike(patches, "patch_embed.proj"),
    *_alike(norm, "norm_pre", "attn_pool.norm", *_BLOCK_NORMS),
    ("norm", "{norm}", norm),
    *_alike(linear, "attn_pool.q", "attn_pool.kv", "attn_pool.proj", "head", "head_dist"),
    *_alike(linear, "attn_pool.mlp.fc1", "attn_pool.mlp.fc2", *_BLOCK_LINEARS),
    (".attn.qkv", ".attn.[q_proj k_proj v_proj]", linear),
    (f".attn.{_BIAS_TABLE}", f".attn.{_BIAS_TABLE}|rel_pos_bias.{_BIAS_TABLE}", array),
    (".mlp.fc1", ".mlp.[fc1_g fc1_x]|.mlp.[w1 w2]|.mlp.w12", linear),  # gated
    (".mlp.norm", ".mlp.norm|.mlp.ffn_ln", norm),
    (".mlp.fc2", ".mlp.fc2|.mlp.w3", linear),
    (".attn.proj.gamma", ".ls1.gamma|.gamma_1", layer_scale),
    (".mlp.fc2.gamma", ".ls2.gamma|.gamma_2", layer_scale),
]

# timm's Swin and Swin V2 from 0.9 on, and Microsoft's releases.
_TIMM_SWIN: Names = [
    *_alike(token, "absolute_pos_embed"),
    *_alike(patches, "patch_embed.proj"),
    *_alike(norm, "patch_embed.norm", "norm", *_BLOCK_NORMS),
    ("head", "head.fc|head", linear),
    (".downsample.norm", "{down}.downsample.norm", norm),
    (".downsample.reduction", "{down}.downsample.reduction", matrix),
    *_alike(linear, *_BLOCK_LINEARS, ".mlp.fc2"),
    *_alike(array, f".attn.{_BIAS_TABLE}"),
    *_alike(per_head, ".attn.logit_scale"),
    (".attn.cpb_mlp.fc1", ".attn.cpb_mlp.0", linear),
    (".attn.cpb_mlp.fc2", ".attn.cpb_mlp.2", matrix),
]

# timm's TinyViT.
_TIMM_TINY_VIT: Names = [
    *_alike(convolution, "patch_embed.conv1", "patch_embed.conv2"),
    ("mbconvs.{i}.conv1", "stages.0.blocks.{i}.conv1", pointwise),
    ("mbconvs.{i}.conv2", "stages.0.blocks.{i}.conv2", depthwise),
    ("mbconvs.{i}.conv3", "stages.0.blocks.{i}.conv3", pointwise),
    (".downsample.conv1", "stages.{stage}.downsample.conv1", pointwise),
    (".downsample.conv2", "stages.{stage}.downsample.conv2", depthwise),
    (".downsample.conv3", "stages.{stage}.downsample.conv3", pointwise),
    *_alike(transposed, ".attn.attention_biases"),
    *_alike(depthwise, ".local_conv"),
    *_alike(linear, *_BLOCK_LINEARS, ".mlp.fc2"),
    (".norm1", ".attn.norm", norm),
    (".norm2", ".mlp.norm", norm),
    ("norm", "head.norm", norm),
    ("head", "head.fc", linear),
]

# transformers' ViT, DeiT, BEiT, DINOv2, DINOv3, CLIP and SigLIP: {at} stands before the encoder's
# names. It writes the names of its version 4, which are the first, to every file; version 5 has
# others in memory.
_HUGGING_FACE_VIT: Names = [
    ("cls_token", "{at}embeddings.cls_token", token),
    ("cls_token", "{at}embeddings.class_embedding", vector),
    ("dist_token", "{at}embeddings.distillation_token", token),
    ("reg_token", "{at}embeddings.register_tokens|{at}embeddings.{register}", token),
    ("pos_embed", "{at}embeddings.position_embeddings", token),
    ("pos_embed", "{at}embeddings.position_embedding.weight", array),
    ("patch_embed.proj", "{at}embeddings.patch_embeddings.projection", patches),
    ("patch_embed.proj", "{at}embeddings.patch_embeddings|{at}embeddings.patch_embedding", patches),
    ("norm_pre", "{at}pre_layrnorm", norm),
    ("norm", "{at}layernorm|{at}norm|{at}post_layernorm|{at}pooler.layernorm", norm),
    ("attn_pool.latent", "{at}head.probe", token),
    ("attn_pool.q", "{at}head.attention", query),
    ("attn_pool.kv", "{at}head.attention", key_and_value),
    ("attn_pool.proj", "{at}head.attention.out_proj", linear),
    ("attn_pool.norm", "{at}head.layernorm", norm),
    ("attn_pool.mlp.fc1", "{at}head.mlp.fc1", linear),
    ("attn_pool.mlp.fc2", "{at}head.mlp.fc2", linear),
    ("head", "{classifier}", linear),
    ("head_dist", "distillation_classifier", linear),
    (".norm1", ".layernorm_before|.norm1|.layer_norm1", norm),
    (".attn.qkv", ".attention.attention.[query key value]", linear),
    (".attn.qkv", ".attention.[q_proj k_proj v_proj]|.self_attn.[q_proj k_proj v_proj]", linear),
    (".attn.proj", ".attention.output.dense|.attention.o_proj|.self_attn.out_proj", linear),
    (f".attn.{_BIAS_TABLE}", f".attention.attention.relative_position_bias.{_BIAS_TABLE}", array),
    (f".attn.{_BIAS_TABLE}", f".relative_position_bias.{_BIAS_TABLE}", array),
    (f".attn.{_BIAS_TABLE}", f"{{at}}encoder.relative_position_bias.{_BIAS_TABLE}", array),
    (f".attn.{_BIAS_TABLE}", f"{{at}}shared_position_bias.{_BIAS_TABLE}", array),
    (".attn.proj.gamma", ".layer_scale1.lambda1|.lambda_1", layer_scale),
    (".norm2", ".layernorm_after|.norm2|.layer_norm2", norm),
    (".mlp.fc1", ".intermediate.dense|.mlp.fc1|.mlp.weights_in", linear),
    (".mlp.fc1", ".mlp.[gate_proj up_proj]|.mlp.up_proj", linear),
    (".mlp.fc2", ".output.dense|.mlp.fc2|.mlp.down_proj|.mlp.weights_out", linear),
    (".mlp.fc2.gamma", ".layer_scale2.lambda1|.lambda_2", layer_scale),
]

# transformers' Swin and Swin V2.
_HUGGING_FACE_SWIN: Names = [
    ("absolute_pos_embed", "{at}embeddings.position_embeddings", token),
    ("patch_embed.proj", "{at}embeddings.patch_embeddings.projection", patches),
    ("patch_embed.norm", "{at}embeddings.norm", norm),
    ("norm", "{at}layernorm", norm),
    ("head", "classifier", linear),
    (".downsample.norm", "{at}encoder.layers.{before}.downsample.norm", norm),
    (".downsample.reduction", "{at}encoder.layers.{before}.downsample.reduction", matrix),
    (".norm1", ".layernorm_before", norm),
    (".attn.qkv", ".attention.self.[query key value]|.attention.[q_proj k_proj v_proj]", linear),
    (".attn.proj", ".attention.output.dense|.attention.o_proj", linear),
    (f".attn.{_BIAS_TABLE}", f".attention.self.{_BIAS_TABLE}", array),
    (f".attn.{_BIAS_TABLE}", f".attention.relative_position_bias.{_BIAS_TABLE}", array),
    (".attn.logit_scale", ".attention.self.logit_scale", per_head),
    (".attn.cpb_mlp.fc1", ".attention.self.continuous_position_bias_mlp.0", linear),
    (".attn.cpb_mlp.fc2", ".attention.self.continuous_position_bias_mlp.2", matrix),
    (".norm2", ".layernorm_after", norm),
    (".mlp.fc1", ".intermediate.dense|.mlp.fc1", linear),
    (".mlp.fc2", ".output.dense|.mlp.fc2", linear),
]

# OpenAI's CLIP and OpenCLIP, where these build their own ViT.
_OPEN_CLIP_VIT: Names = [
    ("cls_token", "class_embedding", vector),
    ("reg_token", "reg_token", array),
    ("pos_embed", "positional_embedding", array),
    ("patch_embed.proj", "conv1", patches),
    ("norm_pre", "ln_pre", norm),
    ("norm", "ln_post", norm),
    (".norm1", ".ln_1", norm),
    (".attn.qkv", ".attn", packed),
    (".attn.proj", ".attn.out_proj", linear),
    (".norm2", ".ln_2", norm),
    (".mlp.fc1", ".mlp.c_fc", linear),
    (".mlp.fc2", ".mlp.c_proj", linear),
]

# Wrappers' prefix and the encoder's ("vit.") in names of transformers.
_ENCODER = re.compile(
    r"((?:.*?\.)??)((?:\w+\.)?)embeddings\.(patch_embedding|cls_token|class_embedding)"
)
_FIRST_NORM = r"((?:\w+\.)*?)0\.(layernorm_before|norm1|layer_norm1)\.weight$"


def timm(spec: Spec) -> Table:
    """timm's current names; a compressed layer has those of the published subnets."""
    tables: dict[str, Callable[..., Table]]
    tables = {"vit": timm_vit, "swin": timm_swin, "tiny_vit": timm_tiny_vit}
    return tables[spec.family](spec)


def own(spec: Spec, keys: Collection[str] = ()) -> Table:
    """This library's names, as `flora_jax.save` writes them."""
    return [Row(row.target, (row.target,)) for row in timm(spec)]


def timm_vit(spec: ViTSpec, keys: Collection[str] = ()) -> Table:
    if not keys:  # a file to write, with names of their own in BEiT, and in EVA, also of DINOv3
        is_eva, is_dense = spec.rope_theta is not None, not any(spec.ranks)
        has_gammas = is_eva or spec.relative_positions
        scales = ("gamma_1", "gamma_2") if has_gammas else ("ls1.gamma", "ls2.gamma")
        parted = is_eva and spec.gated_mlp and (spec.mlp_norm or spec.rope_grid is None)
        written = (
            *scales * spec.layer_scale,
            *["mlp.fc1_g.weight"] * (parted and is_dense),
            *["attn.q_proj.weight"] * (spec.mlp_norm and is_dense),
        )
        keys = [f"blocks.0.{name}" for name in written]
    last_norm = "fc_norm" if spec.normalises_pooled else "norm"
    rows = name_map(spec, _TIMM_VIT, keys, layer="blocks.{block}", norm=last_norm)
    if not spec.k_bias:
        rows = [_without_key(row, keys) for row in rows]
    if spec.rope_grid is not None:
        rows = [_interleaved(row, spec) for row in rows]
    return _positions_first(spec, rows)


def _without_key(row: Row, keys: Collection[str]) -> Row:
    """The bias of qkv where the key has none; DINOv3's release has one, and masks it out."""
    layer, _, parameter = row.sources[0].rpartition("attn.")
    if parameter == "q_proj.bias" and f"{layer}attn.q_bias" not in keys:
        return dataclasses.replace(row, sources=row.sources[::2])
    if parameter not in ("qkv.bias", "q_proj.bias"):
        return row
    if "storage_tokens" in keys:
        return Row(row.target, row.sources, WITHOUT_KEY)
    return Row(row.target, (f"{layer}attn.q_bias", f"{layer}attn.v_bias"))


def _interleaved(row: Row, spec: ViTSpec) -> Row:
    """qkv's rows of EVA; Perception Encoder, with a norm before the blocks, turns x before y."""
    match = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(?!down)\w+", row.target)
    if match is None:
        return row
    block = spec.blocks[int(match[1])]
    pairs = np.arange(block.head_dim // 2)
    if spec.pre_norm and block.rotary_pairs is None:
        pairs = np.roll(pairs, len(pairs) // 2)
    order = tuple(pairs.tolist())
    return InterleavedRow(row.target, row.sources, row.change, block.num_heads, order)


def _positions_first(spec: ViTSpec, rows: Table) -> Table:
    """DINOv2 adds positions before its registers come: the first is that of the class token."""
    sources = {row.target: row.sources[0] for row in rows}
    has_own = spec.positions == "patches" and "cls_token" in sources
    if not has_own or not sources.get("reg_token", "").endswith("register_tokens"):
        return rows
    changed = []
    for row in rows:
        if row.target == "cls_token":
            row = WithPosition(row.target, (*row.sources, sources["pos_embed"]), row.change)
        elif row.target == "pos_embed":
            row = dataclasses.replace(row, change=OF_PATCHES)
        changed.append(row)
    return changed


def timm_swin(spec: SwinSpec, keys: Collection[str] = ()) -> Table:
    """timm's downsampling begins a stage, that of Microsoft's release ends the one before."""
    ends = any(key.startswith("layers.0.downsample.") for key in keys)
    down = "layers.{before}" if ends else "layers.{stage}"
    rows = name_map(spec, _TIMM_SWIN, keys, layer="layers.{stage}.blocks.{i}", down=down)
    return rows if spec.k_bias else [_without_key(row, keys) for row in rows]


def timm_tiny_vit(spec: TinyViTSpec, keys: Collection[str] = ()) -> Table:
    rows = name_map(spec, _TIMM_TINY_VIT, keys, layer="stages.{stage}.blocks.{i}")
    return [_by_part(row, spec.blocks) for row in rows]


def _by_part(row: Row, blocks: Sequence[BlockSpec]) -> Row:
    """Puts the outputs of qkv, stored head by head as [q | k | v], into query, key and value."""
    match = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(?!down)\w+", row.target)
    if match is None:
        return row
    num_heads = blocks[int(match[1])].num_heads

    def reordered(array: np.ndarray, outer: int, inner: int) -> np.ndarray:
        parts = array.reshape(*array.shape[:-1], outer, inner, -1)
        return parts.swapaxes(-3, -2).reshape(array.shape)

    change = Change(
        lambda array: reordered(row.change.read(array), num_heads, 3),
        lambda array: row.change.write(reordered(array, 3, num_heads)),
    )
    return dataclasses.replace(row, change=change)


def hugging_face_vit(spec: ViTSpec, keys: Collection[str] = ()) -> Table:
    """The plain ViTs of transformers, with a classifier or without.

    A DeiT's distillation token that nobody classifies is a register.

    Raises:
      InputError: the file's ViT classifies its class token, and the spec something else.
    """
    at, keys = _encoder(keys, "deit." if spec.distilled else "vit.")
    pattern = re.compile(re.escape(at) + _FIRST_NORM)
    first = next(filter(None, map(pattern.match, keys)), None)
    is_of_tokens = first and first[2] == "layernorm_before" and f"{at}layernorm.weight" in keys
    if spec.pool != "token" and is_of_tokens:
        raise InputError(f"pool is {spec.pool!r} in the spec, and 'token' in the file")
    classifier = "cls_classifier" if spec.distilled else "classifier"
    rows = name_map(
        spec,
        _HUGGING_FACE_VIT,
        keys,
        at=at,
        layer=f"{at}{first[1] if first else 'encoder.layer.'}{{block}}",
        register="register_tokens" if spec.distilled else "distillation_token",
        classifier="visual_projection" if spec.kind == "embedding" else classifier,
    )
    return _positions_first(spec, _of_query_and_value(spec, rows))


def _of_query_and_value(spec: Spec, rows: Table) -> Table:
    """The rows, where those of qkv's biases have no source for a key without one."""
    return [
        dataclasses.replace(row, sources=row.sources[::2])
        if row.target.endswith("attn.qkv.bias") and not spec.k_bias
        else row
        for row in rows
    ]


def hugging_face_swin(spec: SwinSpec, keys: Collection[str] = ()) -> Table:
    """SwinForImageClassification of transformers, that of Swin V2, and the bare models."""
    at, keys = _encoder(keys, "swinv2." if spec.cosine_attention else "swin.")
    layer = f"{at}encoder.layers.{{stage}}.blocks.{{i}}"
    rows = name_map(spec, _HUGGING_FACE_SWIN, keys, at=at, layer=layer)
    return _of_query_and_value(spec, rows)


def _encoder(keys: Collection[str], otherwise: str) -> tuple[str, Collection[str]]:
    """The prefix of the encoder's names, and all names without what wrappers add to them."""
    found = next(filter(None, map(_ENCODER.match, keys)), None)
    if found is None:
        return otherwise, keys
    wrapper, encoder, _ = found.groups()
    return encoder, {key.removeprefix(wrapper) for key in keys} if wrapper else keys


def open_clip_vit(spec: ViTSpec, keys: Collection[str] = ()) -> Table:
    """The images' network; with the projection to what it shares with the texts', if it embeds."""
    head = ("head.kernel", "proj", array) if spec.kind == "embedding" else ("head", "head", linear)
    return name_map(spec, [*_OPEN_CLIP_VIT, head], keys, layer="transformer.resblocks.{block}")


# Where the modules of `model.py` in a folder of `export_torch` have other names than ours.
_MODULES = {"patch_embed.proj": "patch_embed", "patch_embed.norm": "patch_norm"}
_PARAMETERS = {
    "kernel": ("weight", TRANSPOSED),
    "scale": ("weight", SAME),
    "down": ("down.weight", SAME),
    "up": ("up.weight", TRANSPOSED),
    "bias": ("bias", SAME),
}


def pytorch(spec: Spec) -> Table:
    """The names of our own PyTorch modules, which `export_torch` writes.

    A pair of factors is two Linears; the bias of qkv has zeros for a key without one.
    """
    rows = timm(spec)
    targets = {row.target for row in rows}
    return [
        _of_module(spec, row, f"{row.target.removesuffix('bias')}up" in targets) for row in rows
    ]


def _of_module(spec: Spec, of_timm: Row, is_of_a_pair: bool) -> Row:
    target = of_timm.target
    module, _, kind = target.rpartition(".")
    if kind not in _PARAMETERS:
        return Row(target, (target,))
    name, change = _PARAMETERS[kind]
    if kind == "kernel" and not module.endswith("attn.qkv"):  # whose outputs stand as ours do
        change = of_timm.change
    elif target.endswith("attn.qkv.bias") and not spec.k_bias:
        change = WITHOUT_KEY
    if kind == "bias" and is_of_a_pair:
        name = "up.bias"
    return Row(target, (f"{_MODULES.get(module, module)}.{name}",), change)
