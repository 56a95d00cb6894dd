"""ViT-Slim (CVPR 2022): gates that learn what a network can do without, and the cut.

gated = slim.add_gates(model)
gated = flora_jax.train(gated, images, recipe, teacher=model, penalty=slim.SparsityPenalty())
masks = slim.threshold(gated, attn=0.7, mlp=0.7, patch=0.7)
small = slim.extract(gated, masks)               # a smaller plain model
"""

from flora_jax.slim.cut import Masks, apply_masks, cut_spec, extract
from flora_jax.slim.gates import Gated, SparsityPenalty, abstract_gated, add_gates
from flora_jax.slim.published import from_state_dict, published_flops
from flora_jax.slim.threshold import threshold, threshold_to_macs

__all__ = [
    "Gated",
    "Masks",
    "SparsityPenalty",
    "abstract_gated",
    "add_gates",
    "apply_masks",
    "cut_spec",
    "extract",
    "from_state_dict",
    "published_flops",
    "threshold",
    "threshold_to_macs",
]
