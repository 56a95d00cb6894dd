"""The names of OpenAI's CLIP and of OpenCLIP, where these build their own ViT."""

import dataclasses
from collections.abc import Collection

from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.layouts.tables import blocks, linear, norm, present_in
from flora_jax.weights.rows import SAME, Change, Row, Table, patch_kernel

# A block's modules: our name -> theirs.
_NAMES = {
    "norm1": "ln_1",
    "attn.qkv": "attn.in_proj",
    "attn.proj": "attn.out_proj",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_ADDING_FIRST_AXIS = Change(lambda array: array[None], lambda array: array[0])


def open_clip_vit(spec: ViTSpec, keys: Collection[str] = ()) -> Table:
    """The images' network, without the projection to what it shares with the texts'."""
    return present_in(
        spec,
        Row("cls_token", ("class_embedding",), _ADDING_FIRST_AXIS),
        Row("reg_token", ("reg_token",)),
        Row("pos_embed", ("positional_embedding",), SAME),
        *linear("patch_embed.proj", "conv1", kernel=patch_kernel(spec)),
        *norm("norm_pre", "ln_pre"),
        *norm("norm", "ln_post"),
        *linear("head", "head"),
        *map(_joined, blocks(spec, "transformer.resblocks.{block}", _NAMES)),
    )


def _joined(row: Row) -> Row:
    """torch.nn.MultiheadAttention has no dot in the names of its projections."""
    return dataclasses.replace(
        row, sources=tuple(name.replace(".in_proj.", ".in_proj_") for name in row.sources)
    )
