"""The names of our own PyTorch modules: those of `model.py` in a folder of `export_torch`."""

import numpy as np

from flora_jax.models.spec import Spec
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.layouts.timm_names import timm
from flora_jax.weights.rows import SAME, TRANSPOSED, Change, Row, Table

# What other names than ours these modules have.
_MODULES = {"patch_embed.proj": "patch_embed", "patch_embed.norm": "patch_norm"}
_PARAMETERS = {
    "kernel": ("weight", TRANSPOSED),
    "scale": ("weight", SAME),
    "down": ("down.weight", SAME),
    "up": ("up.weight", TRANSPOSED),
    "bias": ("bias", SAME),
}


def pytorch(spec: Spec) -> Table:
    """A pair of factors is two Linears; the bias of qkv has zeros for a key without one."""
    rows = timm(spec)
    targets = {row.target for row in rows}
    return [_row(spec, row, f"{row.target.removesuffix('bias')}up" in targets) for row in rows]


def _row(spec: Spec, of_timm: Row, is_of_a_pair: bool) -> Row:
    target = of_timm.target
    module, _, kind = target.rpartition(".")
    if kind not in _PARAMETERS:
        return Row(target, (target,))
    name, change = _PARAMETERS[kind]
    if kind == "kernel" and not module.endswith("attn.qkv"):  # whose outputs stand as ours do
        change = of_timm.change
    elif target.endswith("attn.qkv.bias") and isinstance(spec, ViTSpec) and not spec.k_bias:
        change = Change(_without_key, _with_key)
    if kind == "bias" and is_of_a_pair:
        name = "up.bias"
    return Row(target, (f"{_MODULES.get(module, module)}.{name}",), change)


def _with_key(bias: np.ndarray) -> np.ndarray:
    query, value = np.split(bias, 2)
    return np.concatenate([query, np.zeros_like(query), value])


def _without_key(bias: np.ndarray) -> np.ndarray:
    query, _, value = np.split(bias, 3)
    return np.concatenate([query, value])
