"""Where weights stand in the files of other libraries: one table a layout.

A table is a list of rows: our name, the names in the file, the change of layout between them.
"""

import re
from collections.abc import Callable, Collection

from flora_jax.errors import InputError
from flora_jax.models.spec import Spec
from flora_jax.models.swin_spec import SwinSpec
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.rows import (
    DOUBLED,
    DOUBLED_TRANSPOSED,
    TRANSPOSED,
    WITHOUT_FIRST_AXIS,
    Change,
    Row,
    Table,
    patch_kernel,
)

# A searchable layer of a published subnet: a pair of factors, or `fc` where it stayed dense.
_OF_A_SUBNET = re.compile(r"\.(VT|(qkv|fc1|fc2)\.fc)\.weight$")


# A block's modules: our name -> theirs, several where qkv is stored apart.
_TIMM_VIT = {
    name: name for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
}
_BIAS_TABLE = "attn.relative_position_bias_table"
_TIMM_SWIN = _TIMM_VIT | {_BIAS_TABLE: _BIAS_TABLE}

# transformers writes the names of its version 4 to every file; version 5 has others in memory.
_HUGGING_FACE_VIT = {
    "norm1": "layernorm_before",
    "attn.qkv": "attention.attention.query attention.attention.key attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_HUGGING_FACE_SWIN = _HUGGING_FACE_VIT | {
    "attn.qkv": "attention.self.query attention.self.key attention.self.value",
    _BIAS_TABLE: "attention.self.relative_position_bias_table",
}
_HUGGING_FACE_5_VIT = _HUGGING_FACE_VIT | {
    "attn.qkv": "attention.q_proj attention.k_proj attention.v_proj",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_HUGGING_FACE_5_SWIN = _HUGGING_FACE_5_VIT | {
    _BIAS_TABLE: "attention.relative_position_bias.relative_position_bias_table"
}

# Each table lists what any spec of the family may have; the rows that this spec lacks drop out.
# The `keys` of a file choose between spellings; without them it is the current one.


def timm_vit(spec: ViTSpec, keys: Collection[str] = ()) -> Table:
    """timm's ViT and DeiT, and the DeiT release."""
    return _present_in(
        spec,
        Row("cls_token", ("cls_token",), WITHOUT_FIRST_AXIS),
        Row("dist_token", ("dist_token",), WITHOUT_FIRST_AXIS),
        Row("pos_embed", ("pos_embed",), WITHOUT_FIRST_AXIS),
        *_linear("patch_embed.proj", "patch_embed.proj", kernel=patch_kernel(spec)),
        *_norm("norm", "fc_norm" if spec.pool == "mean" else "norm"),
        *_linear("head", "head"),
        *_linear("head_dist", "head_dist"),
        *_blocks(spec, "blocks.{block}", _TIMM_VIT, _is_subnet(spec, keys)),
    )


def timm_swin(spec: SwinSpec, keys: Collection[str] = ()) -> Table:
    """timm's Swin from 0.9 on, and Microsoft's release, where a stage ends with downsampling."""
    ends_with_it = any(key.startswith("layers.0.downsample.") for key in keys)
    return _present_in(
        spec,
        Row("absolute_pos_embed", ("absolute_pos_embed",), WITHOUT_FIRST_AXIS),
        *_linear("patch_embed.proj", "patch_embed.proj", kernel=patch_kernel(spec)),
        *_norm("patch_embed.norm", "patch_embed.norm"),
        *_norm("norm", "norm"),
        *_linear("head", "head" if "head.weight" in keys else "head.fc"),
        *_downsampling(spec, f"layers.{{{'before' if ends_with_it else 'stage'}}}.downsample"),
        *_blocks(spec, "layers.{stage}.blocks.{i}", _TIMM_SWIN, _is_subnet(spec, keys)),
    )


def hugging_face_vit(spec: ViTSpec, keys: Collection[str] = ()) -> Table:
    """transformers' ViT and DeiT: bare, ForImageClassification, or with its teacher's head too.

    A DeiT that has both tokens and one classifier classifies the class token alone. Its logits are
    then those of ours with a second head of zeros, for ours are the mean of both.
    """
    if spec.pool != "token":
        raise InputError("Hugging Face ViTs classify the class token: set pool='token' in the spec")
    is_5 = _is_transformers_5(keys)
    model = _encoder(keys, "deit." if spec.distilled else "vit.")
    at, block = f"{model}embeddings", f"{model}{'layers' if is_5 else 'encoder.layer'}.{{block}}"
    proj = f"{at}.patch_embeddings.projection"
    if spec.distilled and "classifier.weight" in keys:
        heads = [
            Row("head.kernel", ("classifier.weight",), DOUBLED_TRANSPOSED),
            Row("head.bias", ("classifier.bias",), DOUBLED),
        ]
    else:
        heads = _linear("head", "cls_classifier" if spec.distilled else "classifier")
        heads += _linear("head_dist", "distillation_classifier")
    return _present_in(
        spec,
        Row("cls_token", (f"{at}.cls_token",), WITHOUT_FIRST_AXIS),
        Row("dist_token", (f"{at}.distillation_token",), WITHOUT_FIRST_AXIS),
        Row("pos_embed", (f"{at}.position_embeddings",), WITHOUT_FIRST_AXIS),
        *_linear("patch_embed.proj", proj, kernel=patch_kernel(spec)),
        *_norm("norm", f"{model}layernorm"),
        *heads,
        *_blocks(spec, block, _HUGGING_FACE_5_VIT if is_5 else _HUGGING_FACE_VIT),
    )


def hugging_face_swin(spec: SwinSpec, keys: Collection[str] = ()) -> Table:
    """SwinForImageClassification of transformers, and the bare SwinModel."""
    model = _encoder(keys, "swin.")
    at, layer = f"{model}embeddings", f"{model}encoder.layers"
    proj = f"{at}.patch_embeddings.projection"
    names = _HUGGING_FACE_5_SWIN if _is_transformers_5(keys) else _HUGGING_FACE_SWIN
    return _present_in(
        spec,
        Row("absolute_pos_embed", (f"{at}.position_embeddings",), WITHOUT_FIRST_AXIS),
        *_linear("patch_embed.proj", proj, kernel=patch_kernel(spec)),
        *_norm("patch_embed.norm", f"{at}.norm"),
        *_norm("norm", f"{model}layernorm"),
        *_linear("head", "classifier"),
        *_downsampling(spec, f"{layer}.{{before}}.downsample"),
        *_blocks(spec, f"{layer}.{{stage}}.blocks.{{i}}", names),
    )


def timm(spec: Spec) -> Table:
    """timm's current names; a compressed layer has those of the published subnets."""
    tables: dict[str, Callable[..., Table]] = {"vit": timm_vit, "swin": timm_swin}
    return tables[spec.family](spec)


def own(spec: Spec, keys: Collection[str] = ()) -> Table:
    """This library's names, as `flora_jax.save` writes them."""
    return [Row(row.target, (row.target,)) for row in timm(spec)]


def _is_subnet(spec: Spec, keys: Collection[str]) -> bool:
    return any(rank is not None for rank in spec.ranks) or any(map(_OF_A_SUBNET.search, keys))


def _encoder(keys: Collection[str], default: str) -> str:
    """What stands before the names of transformers' encoder: "vit.", nothing where it is bare."""
    for key in keys:
        if found := re.search(r"(\w+\.)?embeddings\.patch_embeddings\.", key):
            return found[1] or ""
    return default


def _is_transformers_5(keys: Collection[str]) -> bool:
    return any(key.endswith(".q_proj.weight") for key in keys)


def _linear(ours: str, *theirs: str, kernel: Change = TRANSPOSED) -> Table:
    return [
        Row(f"{ours}.kernel", tuple(f"{name}.weight" for name in theirs), kernel),
        Row(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs)),
    ]


def _norm(ours: str, theirs: str) -> Table:
    return [Row(f"{ours}.scale", (f"{theirs}.weight",)), Row(f"{ours}.bias", (f"{theirs}.bias",))]


def _factors(ours: str, theirs: str) -> Table:
    return [
        Row(f"{ours}.down", (f"{theirs}.VT.weight",)),
        Row(f"{ours}.up", (f"{theirs}.U.weight",), TRANSPOSED),
        Row(f"{ours}.bias", (f"{theirs}.U.bias",)),
    ]


def _places(spec: Spec) -> list[dict[str, int]]:
    """The number of every block, its stage, and its number `i` within the stage."""
    depths = spec.depths if isinstance(spec, SwinSpec) else (len(spec.blocks),)
    places = [(stage, i) for stage, depth in enumerate(depths) for i in range(depth)]
    return [{"block": block, "stage": stage, "i": i} for block, (stage, i) in enumerate(places)]


def _downsampling(spec: SwinSpec, theirs: str) -> Table:
    """`theirs` has a place for the number of the `stage` it leads to, or of the one `before`."""
    rows: Table = []
    for place in _places(spec):
        if place["stage"] > 0 and place["i"] == 0:
            ours = f"blocks.{place['block']}.downsample"
            name = theirs.format(**place, before=place["stage"] - 1)
            rows += _norm(f"{ours}.norm", f"{name}.norm")
            rows.append(Row(f"{ours}.reduction.kernel", (f"{name}.reduction.weight",), TRANSPOSED))
    return rows


def _blocks(spec: Spec, prefix: str, names: dict[str, str], is_subnet: bool = False) -> Table:
    """The rows of all blocks; `prefix` has places for the numbers of `_places`."""
    rows: Table = []
    for place, block in zip(_places(spec), spec.blocks, strict=True):
        ranks = dict(zip(("attn.qkv", "mlp.fc1", "mlp.fc2"), block.ranks, strict=True))
        for name, their_names in names.items():
            ours = f"blocks.{place['block']}.{name}"
            theirs = [f"{prefix.format(**place)}.{part}" for part in their_names.split()]
            if name.startswith("norm"):
                rows += _norm(ours, *theirs)
            elif name == _BIAS_TABLE:
                rows.append(Row(ours, tuple(theirs)))
            elif ranks.get(name) is not None:
                rows += _factors(ours, theirs[0])
            elif name in ranks and is_subnet:
                rows += _linear(ours, f"{theirs[0]}.fc")
            else:
                rows += _linear(ours, *theirs)
    return rows


def _present_in(spec: Spec, *rows: Row) -> Table:
    options = {r"blocks\.\d+\.attn\.qkv\.bias": spec.qkv_bias}
    if isinstance(spec, ViTSpec):
        options |= {"cls_token": spec.class_token, "dist_token|head_dist": spec.distilled}
    elif isinstance(spec, SwinSpec):
        options["absolute_pos_embed"] = spec.absolute_pos_embed
        options[r"patch_embed\.norm"] = spec.patch_norm
    absent = [names for names, is_present in options.items() if not is_present]
    return [row for row in rows if not any(re.match(names, row.target) for names in absent)]
