"""Models with random parameters, and their weights in any layout."""

import dataclasses

import numpy as np

import flora_jax as flora
from flora_jax.models import functional
from tests.helpers.networks import random_model as random_model

VIT = flora.ViTSpec(
    image_size=12, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3, in_channels=2
)
SWIN = flora.SwinSpec(
    image_size=16, patch_size=2, embed_dim=6, depths=(2, 1), num_heads=(2, 3), window_size=4,
    num_classes=3,
)  # fmt: skip
VITS = {
    "vit": VIT,
    "distilled": dataclasses.replace(VIT, distilled=True),
    "no_qkv_bias": dataclasses.replace(VIT, qkv_bias=False),
    "mean": dataclasses.replace(VIT, pool="mean"),
    "mean_no_token": dataclasses.replace(VIT, pool="mean", class_token=False),
}
SWINS = {
    "swin": SWIN,
    "absolute": dataclasses.replace(SWIN, absolute_pos_embed=True),
    "no_patch_norm": dataclasses.replace(SWIN, patch_norm=False, qkv_bias=False),
}


def written(model, table) -> dict[str, np.ndarray]:
    parameters = functional.split(model)[1]
    arrays = {}
    for row in table(model.spec):
        arrays |= row.write(np.asarray(parameters[row.target]))
    return arrays


def assert_same(model, other):
    first, second = functional.split(model)[1], functional.split(other)[1]
    assert model.spec == other.spec
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name, strict=True)
