"""Where weights stand in the files of other libraries: one table a layout.

A table is a list of rows: our name, the names in the file, the change of layout between them.
"""

from collections.abc import Collection

from flora_jax.models.spec import Spec
from flora_jax.weights.layouts.hugging_face_names import hugging_face_swin, hugging_face_vit
from flora_jax.weights.layouts.open_clip_names import open_clip_vit
from flora_jax.weights.layouts.pytorch_names import pytorch
from flora_jax.weights.layouts.timm_names import timm, timm_swin, timm_vit
from flora_jax.weights.layouts.tiny_vit_names import timm_tiny_vit
from flora_jax.weights.rows import Row, Table

__all__ = [
    "hugging_face_swin",
    "hugging_face_vit",
    "open_clip_vit",
    "own",
    "pytorch",
    "timm",
    "timm_swin",
    "timm_tiny_vit",
    "timm_vit",
]


def own(spec: Spec, keys: Collection[str] = ()) -> Table:
    """This library's names, as `flora_jax.save` writes them."""
    return [Row(row.target, (row.target,)) for row in timm(spec)]
