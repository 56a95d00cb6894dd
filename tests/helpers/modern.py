"""Tiny networks of today's kinds: weights, images and outputs of timm and transformers."""

import dataclasses
import functools
import json

import numpy as np

import flora_jax as flora
from tests.helpers.commands import DATA
from tests.helpers.networks import MICRO


def _like(spec, **changes):
    return dataclasses.replace(spec, blocks=(), **changes)


_DINOV2 = _like(MICRO, image_size=42, patch_size=14, num_classes=0, layer_scale=True)
_DINOV2_REGISTERS = _like(_DINOV2, num_registers=4, positions="patches")
_DINOV3 = _like(
    MICRO,
    image_size=64,
    patch_size=16,
    num_registers=4,
    positions="none",
    rope_theta=100.0,
    layer_norm_eps=1e-5,
    layer_scale=True,
    pool="mean",
    fc_norm=False,
    qkv_bias=False,
)
_EVA02 = _like(
    MICRO,
    image_size=42,
    patch_size=14,
    rope_theta=10000.0,
    rope_grid=16,
    k_bias=False,
    gated_mlp=True,
    activation="silu",
    mlp_ratio=8 / 3,
    pool="mean",
)
_BEIT = _like(
    MICRO, positions="none", relative_positions=True, k_bias=False, pool="mean", layer_scale=True
)
_CLIP = _like(MICRO, pre_norm=True, patch_bias=False, activation="quick_gelu", layer_norm_eps=1e-5)
_SIGLIP = _like(MICRO, class_token=False, pool="attention", num_classes=0)

_PE = _like(
    MICRO,
    pre_norm=True,
    patch_bias=False,
    layer_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_grid=14,
    rope_offset=1,
    pool="attention",
    pool_num_heads=8,
)

TINY_VIT = flora.TinyViTSpec(
    image_size=64,
    embed_dims=(24, 32, 48, 64),
    depths=(1, 2, 2, 1),
    num_heads=(1, 2, 3, 4),
    window_sizes=(7, 4, 4, 2),
    num_classes=10,
)

_HF_SWIN_V2 = flora.swin_v2(
    "tiny",
    image_size=32,
    patch_size=2,
    embed_dim=24,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=4,
    num_classes=10,
)
SWINS_V2 = {
    "hf_swin_v2": _HF_SWIN_V2,
    # Windows that tile no feature map, and were others before.
    "timm_swin_v2": _like(_HF_SWIN_V2, window_size=6, pretrained_window_sizes=(4, 0)),
}

SPECS = {
    "timm_deit3": _like(MICRO, positions="patches", layer_scale=True),
    "timm_dinov2": _DINOV2,
    "timm_dinov2_registers": _DINOV2_REGISTERS,
    "timm_dinov3": _DINOV3,
    "timm_dinov3_swiglu": _like(_DINOV3, gated_mlp=True, activation="silu"),
    "timm_eva02": _like(_EVA02, mlp_norm=True),
    "timm_eva02_packed": _EVA02,
    "timm_beitv2": _BEIT,
    "timm_pe": _PE,
    "timm_clip": _CLIP,
    "timm_siglip": _SIGLIP,
    "timm_siglip_gap": _like(MICRO, class_token=False, pool="mean", fc_norm=False),
    "timm_augreg_no_head": _like(MICRO, num_classes=0),
    "hf_beit": _like(_BEIT, layer_norm_eps=1e-12),
    "hf_clip": _like(_CLIP, num_classes=0),
    "hf_deit_one_head": _like(MICRO, num_registers=1, layer_norm_eps=1e-12),
    "hf_dinov2": _DINOV2,
    "hf_dinov2_classifier": _like(_DINOV2, pool="token_and_mean", num_classes=10),
    "hf_dinov2_registers": _DINOV2_REGISTERS,
    "hf_dinov3": _like(
        _DINOV3, pool="token", fc_norm=True, qkv_bias=True, k_bias=False, num_classes=0
    ),
    "hf_siglip": _like(_SIGLIP, activation="gelu_tanh"),
    "hf_vit_no_head": _like(MICRO, num_classes=0, layer_norm_eps=1e-12),
}
TOKENS_STAY = {name for name, spec in SPECS.items() if spec.pool != "token"}


@functools.cache
def golden(name) -> dict[str, np.ndarray]:
    with np.load(DATA / f"modern/{name}.npz") as archive:
        return dict(archive)


def arrays(name) -> dict[str, np.ndarray]:
    return {k.removeprefix("sd/"): v for k, v in golden(name).items() if k.startswith("sd/")}


def config(name) -> dict:
    return json.loads(str(golden(name)["config_json"]))


def images(name) -> np.ndarray:
    return golden(name)["images_nchw"].transpose(0, 2, 3, 1)


@functools.cache
def model(name):
    return flora.from_state_dict(arrays(name), SPECS[name])


@functools.cache
def output(name) -> np.ndarray:
    """What the model makes of its images."""
    return np.asarray(model(name)(images(name)))


def shallow(name, depth) -> flora.ViTSpec:
    """A spec of this kind for what takes long to compile and needs no golden weights."""
    return _like(SPECS[name], depth=depth)
