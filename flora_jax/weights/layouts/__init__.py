"""Where weights stand in the files of other libraries: one table a layout.

A table is a list of rows: our name, the names in the file, the change of layout between them.
"""

import dataclasses
import re
from collections.abc import Callable, Collection

from flora_jax.errors import InputError
from flora_jax.models.spec import Spec
from flora_jax.weights.layouts.hugging_face_names import hugging_face_swin, hugging_face_vit
from flora_jax.weights.layouts.timm_names import timm, timm_swin, timm_vit
from flora_jax.weights.rows import Row, Table

__all__ = [
    "LAYOUTS",
    "Layout",
    "detect",
    "hugging_face_swin",
    "hugging_face_vit",
    "is_buffer",
    "own",
    "timm",
    "timm_swin",
    "timm_vit",
]

# Computed from the spec, not learned, or of what is no part of the image's network: a token that
# training put in the place of patches, a layer behind the features, a network for texts.
_NO_WEIGHT = re.compile(
    r"(^|\.)(relative_position_index|attn_mask|position_ids|mask_token|logit_scale|logit_bias)$"
    r"|(^|\.)(pooler\.dense|text_model|text_projection|visual_projection)\."
)


def own(spec: Spec, keys: Collection[str] = ()) -> Table:
    """This library's names, as `flora_jax.save` writes them."""
    return [Row(row.target, (row.target,)) for row in timm(spec)]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way of naming a family's weights, known by one of its names."""

    title: str
    family: str
    signature: str
    table: Callable[..., Table]


LAYOUTS = (
    Layout("flora_jax Swin", "swin", r"blocks\.\d+\.attn\.relative_position_bias_table$", own),
    Layout("flora_jax ViT", "vit", r"blocks\.\d+\.attn\.proj\.kernel$", own),
    Layout(
        "Hugging Face Swin", "swin", r"swin\.|encoder\.layers\.\d+\.blocks\.", hugging_face_swin
    ),
    Layout(
        "Hugging Face ViT",
        "vit",
        r"(vit|deit)\.|(.*\.)?embeddings\.(cls_token|class_embedding|patch_embedding)",
        hugging_face_vit,
    ),
    Layout("timm Swin", "swin", r"layers\.\d+\.blocks\.\d+\.", timm_swin),
    Layout("timm ViT", "vit", r"blocks\.\d+\.", timm_vit),
)


def detect(keys: Collection[str]) -> Layout:
    """The layout that these names are in. Raises InputError when it is none of LAYOUTS."""
    for layout in LAYOUTS:
        if any(re.match(layout.signature, key) for key in keys):
            return layout
    examples = ", ".join(sorted(keys)[:3]) or "nothing"
    known = ", ".join(layout.title for layout in LAYOUTS)
    raise InputError(f"unknown weight names ({examples}, ...); known layouts: {known}")


def is_buffer(key: str) -> bool:
    """Whether this is no weight of the network: it follows from the spec, or is not used here."""
    return _NO_WEIGHT.search(key) is not None
