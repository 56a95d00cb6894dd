"""The layout of a file's names, and the prefixes that wrappers put before them."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

from flora_jax.errors import InputError, few
from flora_jax.models.spec import Spec
from flora_jax.weights import layouts
from flora_jax.weights.copies import names_within
from flora_jax.weights.name_map import Table

# Counted or computed, not learned, or of what is no part of the images' network: a token that
# training put in the place of patches, a layer behind the features, a norm of local crops, a
# network for texts.
_NO_WEIGHT = re.compile(
    r"(^|\.)((relative_position_index|attention_bias_idxs|attn_mask|position_ids|num_batches_tracked|n_averaged"
    r"|mask_token|logit_scale|logit_bias|rope_embed\.periods|qkv\.bias_mask)$"
    r"|(pooler\.dense|text_model|text_projection|visual_projection|local_cls_norm)\.)"
    r"|(^|\.)visual\.head\.|^proj$"  # OpenCLIP's last projection
)
# What of OpenCLIP's files is of the images' network.
_OF_IMAGES = re.compile(r"(\w+\.)*?visual\.")
# A training checkpoint of DINOv2 has its blocks in chunks, numbered on from one to the next.
_CHUNK = re.compile(r"(^|\.)blocks\.\d+\.(?=\d+\.)")


class Layout(NamedTuple):
    """The names of a family's weights in one library; `signature` is in one name of each file."""

    title: str
    family: str
    table: Callable[..., Table]
    signature: str


# The first whose signature stands in a name, at its beginning or behind a dot.
LAYOUTS = [
    Layout(
        *("Hugging Face Swin", "swin", layouts.hugging_face_swin),
        r"layers\.\d+\.blocks\.\d+\.layernorm_",
    ),
    Layout(
        *("Hugging Face ViT", "vit", layouts.hugging_face_vit),
        r"layers?\.\d+\.layernorm_|embeddings\.(cls_token|class_embedding|patch_embedding)",
    ),
    Layout(
        *("timm TinyViT", "tiny_vit", layouts.timm_tiny_vit),
        r"stages\.\d+\.blocks\.\d+\.(attn\.attention_biases$|local_conv\.)",
    ),
    Layout("flora_jax TinyViT", "tiny_vit", layouts.own, r"blocks\.\d+\.attn\.attention_biases$"),
    Layout("timm Swin", "swin", layouts.timm_swin, r"layers\.\d+\.blocks\.\d+\."),
    Layout(
        *("flora_jax Swin", "swin", layouts.own),
        r"blocks\.\d+\.attn\.relative_position_bias_table$",
    ),
    Layout("flora_jax ViT", "vit", layouts.own, r"blocks\.\d+\.attn\.proj\.kernel$"),
    Layout("OpenCLIP ViT", "vit", layouts.open_clip_vit, r"transformer\.resblocks\.\d+\."),
    Layout("timm ViT", "vit", layouts.timm_vit, r"blocks\.\d+\."),
]


def detect(keys: Collection[str], spec: Spec) -> Layout:
    """The layout that these names are in, whatever stands before them.

    Raises:
      InputError: none of LAYOUTS, or one of another family than the spec's.
    """
    for layout in LAYOUTS:
        if any(re.search(rf"(^|\.)({layout.signature})", key) for key in keys):
            break
    else:
        expected = [source for row in layouts.timm(spec) for source in row.sources]
        raise InputError(
            f"unknown weight names: found {few(keys, 3)}; expected names such as "
            f"{few(expected, 3)}, or those of another of the layouts "
            f"{', '.join(layout.title for layout in LAYOUTS)}"
        )
    if layout.family != spec.family:
        raise InputError(
            f"these are weights of a {layout.title}, but the spec is a {type(spec).__name__}"
        )
    return layout


def without_prefix(arrays: Mapping[str, np.ndarray], spec: Spec) -> dict[str, np.ndarray]:
    """The arrays under the names of their layout, without what wrappers put before (`copies`).

    Raises:
      InputError: as `detect`, or several copies of the weights, or two names that become one.
    """
    arrays = {key: a for key, a in arrays.items() if _OF_IMAGES.match(key)} or arrays
    arrays = {_CHUNK.sub(r"\1blocks.", key): a for key, a in arrays.items()}
    table = detect(arrays, spec).table(spec, arrays)
    names = names_within(arrays, [source for row in table for source in row.sources])
    return {name: arrays[key] for key, name in names.items()}


def is_buffer(key: str) -> bool:
    """Whether this is no weight of the network: it follows from the spec, or is not used here."""
    return _NO_WEIGHT.search(key) is not None
