"""Cuts what the masks leave out of a gated model: a smaller plain one (ViT-Slim, for real).

The cut model computes what the masked one does. Attention dimensions and MLP units leave the
tensors. Tokens leave the sequence; in the attention, one constant stands for them
(`flora_jax.models.vit.Attention`).
"""

import numpy as np

from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.network import Network
from flora_jax.models.spec import BlockSpec
from flora_jax.slim.gates import GATE_NAMES, Gated, per_dimension
from flora_jax.slim.masks import Masks, cut_spec, dimension_order


def extract(gated: Gated, masks: Masks, fold: bool = True, tile: int = 1) -> Network:
    """Cuts a gated model by its masks.

    Args:
      fold: multiply the gates that stay into the weights, which keeps more of the trained function;
        False: they become 1, as published, and the cut model equals `apply_masks`. Token gates
        cannot be folded one by one: a block's kept tokens share the mean of theirs.
      tile: as in `cut_spec`.

    Raises:
      InputError: masks of other gates, or tile below 1.
    """
    masks.check_gated(gated)
    spec = cut_spec(gated.spec, masks, tile)
    parameters = {n: np.asarray(p) for n, p in functional.split(gated.network)[1].items()}
    for b, block in enumerate(gated.spec.blocks):
        name, cut = f"blocks.{b}", spec.blocks[b]
        attn_gate = parameters.pop(f"{name}.{GATE_NAMES['attn']}")
        mlp_gate = parameters.pop(f"{name}.{GATE_NAMES['mlp']}")
        token_gate = np.tanh(parameters.pop(f"{name}.{GATE_NAMES['patch']}", np.inf))
        if fold:
            kept_tokens = token_gate[masks.patch[b]].mean() if masks.patch else 1.0
            _fold(parameters, name, block, attn_gate, mlp_gate, kept_tokens)
        is_rotary = spec.rope_theta is not None
        _cut_attention(parameters, f"{name}.attn", block, cut, masks.attn[b], is_rotary)
        _cut_mlp(parameters, f"{name}.mlp", cut.mlp_dim, masks.mlp[b])
    if masks.patch and "pos_embed" in parameters:
        positions = parameters["pos_embed"]
        parameters["pos_embed"] = positions[masks.patch[0][-len(positions) :]]
    return functional.with_parameters(create_abstract(spec), parameters)


def _fold(parameters, name: str, block: BlockSpec, attn_gate, mlp_gate, token_gate) -> None:
    attn_gate = per_dimension(attn_gate, block.head_dim)
    per_column = np.broadcast_to(attn_gate, (3, block.num_heads, block.head_dim)).ravel()
    factors = {"attn.qkv.kernel": per_column}
    if f"{name}.attn.qkv.bias" in parameters:  # that of the key may be missing
        factors["attn.qkv.bias"] = per_column[: len(parameters[f"{name}.attn.qkv.bias"])]
    factors["mlp.fc2.kernel"] = mlp_gate[:, None]
    for norm in ("norm1", "norm2"):
        factors |= {f"{norm}.scale": token_gate, f"{norm}.bias": token_gate}
    for part, factor in factors.items():
        parameters[f"{name}.{part}"] = parameters[f"{name}.{part}"] * factor


def _cut_attention(
    parameters, name: str, block: BlockSpec, cut: BlockSpec, mask, is_rotary: bool
) -> None:
    """Kept dimensions move to the front of their head; a narrower head is filled up with zeros."""
    heads = np.flatnonzero(mask.any(1))
    order = dimension_order(mask[heads], cut.head_dim, is_rotary)
    is_kept = np.take_along_axis(mask[heads], order, axis=1)  # [heads, d], False where filled up

    def columns(array):
        """Takes [..., H*d] of the uncut block to [..., H, d] of the cut one."""
        by_head = array.reshape(*array.shape[:-1], block.num_heads, block.head_dim)
        return np.where(is_kept, by_head[..., heads[:, None], order], 0)

    # Attention divides logits by the root of the head's width, which must stay that of the uncut.
    scales = np.array([np.sqrt(cut.head_dim / block.head_dim), 1, 1])[:, None, None]
    for part in ("kernel", "bias"):
        array = parameters.get(f"{name}.qkv.{part}")
        if array is not None:
            each = array.reshape(*array.shape[:-1], -1, block.attention_dim)  # 2 without the key's
            qkv = (columns(each) * scales[: each.shape[-2]]).astype(array.dtype)
            parameters[f"{name}.qkv.{part}"] = qkv.reshape(*array.shape[:-1], -1)
    proj = columns(parameters[f"{name}.proj.kernel"].T)
    parameters[f"{name}.proj.kernel"] = proj.reshape(len(proj), -1).T
    for table in (f"{name}.relative_position_bias_table", f"{name}.attention_biases"):
        if table in parameters:
            parameters[table] = parameters[table][:, heads]


def _cut_mlp(parameters, name: str, mlp_dim: int, mask) -> None:
    """Kept units move to the front; rounding up fills with units that were to go, at weight 0."""
    order = np.argsort(~mask, kind="stable")[:mlp_dim]
    uncut = parameters[f"{name}.fc1.kernel"].shape[1]
    columns = np.concatenate([order + start for start in range(0, uncut, len(mask))])  # gate, value
    parameters[f"{name}.fc1.kernel"] = parameters[f"{name}.fc1.kernel"][:, columns]
    parameters[f"{name}.fc1.bias"] = parameters[f"{name}.fc1.bias"][columns]
    fc2 = parameters[f"{name}.fc2.kernel"][order]
    parameters[f"{name}.fc2.kernel"] = np.where(mask[order, None], fc2, 0)
