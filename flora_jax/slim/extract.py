"""Cuts what the masks leave out of a gated model: a smaller plain one (ViT-Slim, for real).

The cut model computes what the masked one does. Attention dimensions and MLP units leave the
tensors. Tokens leave the sequence; in the attention, one constant stands for them
(`flora_jax.models.vit.Attention`).
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from flax import nnx

from flora_jax.models import Spec, create_abstract, functional
from flora_jax.models.spec import BlockSpec

if TYPE_CHECKING:
    from flora_jax.slim.gates import Gated
    from flora_jax.slim.masks import Masks


def cut_spec(spec: Spec, masks: "Masks", tile: int = 1) -> Spec:
    """The spec of the cut model.

    A block's heads are as wide as its widest; a head that loses all its dimensions leaves.

    Args:
      tile: head and MLP widths are rounded up to a multiple of it, where the uncut width allows.

    Raises:
      ValueError: masks of another spec, or tile below 1.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    masks.check(spec)
    blocks = []
    for b, block in enumerate(spec.blocks):
        widths = masks.attn[b].sum(1)
        tokens = tuple(np.flatnonzero(masks.patch[b]).tolist()) if masks.patch else None
        if tokens is not None and len(tokens) == len(masks.patch[b]):
            tokens = None
        blocks.append(
            BlockSpec(
                num_heads=int((widths > 0).sum()),
                head_dim=_round_up(int(widths.max()), tile, block.head_dim),
                mlp_dim=_round_up(int(masks.mlp[b].sum()), tile, block.mlp_dim),
                tokens=tokens,
            )
        )
    return dataclasses.replace(spec, blocks=tuple(blocks))


def _round_up(width: int, tile: int, most: int) -> int:
    return min(-(-width // tile) * tile, most)


def extract(gated: "Gated", masks: "Masks", fold: bool = True, tile: int = 1) -> nnx.Module:
    """The cut model.

    Args:
      fold: multiply the gates that stay into the weights, which keeps more of the trained function;
        False: they become 1, as published, and the cut model equals `apply_masks`. Token gates
        cannot be folded one by one: a block's kept tokens share the mean of theirs.
      tile: as in `cut_spec`.

    Raises:
      ValueError: masks of other gates, or tile below 1.
    """
    masks.check_gated(gated)
    spec = cut_spec(gated.spec, masks, tile)
    parameters = {n: np.asarray(p) for n, p in functional.split(gated.network)[1].items()}
    for b, block in enumerate(gated.spec.blocks):
        name, cut = f"blocks.{b}", spec.blocks[b]
        attn_gate = parameters.pop(f"{name}.attn.qkv.gate")
        mlp_gate = parameters.pop(f"{name}.mlp.fc2.gate")
        token_gate = np.tanh(parameters.pop(f"{name}.token_gate", np.inf))
        if fold:
            kept_tokens = token_gate[masks.patch[b]].mean() if masks.patch else 1.0
            _fold(parameters, name, block, attn_gate, mlp_gate, kept_tokens)
        _cut_attention(parameters, f"{name}.attn", block, cut, masks.attn[b])
        _cut_mlp(parameters, f"{name}.mlp", cut.mlp_dim, masks.mlp[b])
    if masks.patch:
        parameters["pos_embed"] = parameters["pos_embed"][masks.patch[0]]
    return functional.with_parameters(create_abstract(spec), parameters)


def _fold(parameters, name: str, block: BlockSpec, attn_gate, mlp_gate, token_gate) -> None:
    per_column = np.broadcast_to(attn_gate, (3, block.num_heads, block.head_dim)).ravel()
    factors = {"attn.qkv.kernel": per_column, "attn.qkv.bias": per_column}
    factors["mlp.fc2.kernel"] = mlp_gate[:, None]
    for norm in ("norm1", "norm2"):
        factors |= {f"{norm}.scale": token_gate, f"{norm}.bias": token_gate}
    for part, factor in factors.items():
        if f"{name}.{part}" in parameters:
            parameters[f"{name}.{part}"] = parameters[f"{name}.{part}"] * factor


def _cut_attention(parameters, name: str, block: BlockSpec, cut: BlockSpec, mask) -> None:
    """Kept dimensions move to the front of their head; a narrower head is filled up with zeros."""
    heads = np.flatnonzero(mask.any(1))
    order = np.argsort(~mask[heads], axis=1, kind="stable")[:, : cut.head_dim]
    is_kept = np.take_along_axis(mask[heads], order, axis=1)  # [heads, d], False where filled up

    def columns(array):
        """[..., H*d of the uncut block] -> [..., H, d of the cut one]"""
        by_head = array.reshape(*array.shape[:-1], block.num_heads, block.head_dim)
        return np.where(is_kept, by_head[..., heads[:, None], order], 0)

    # Attention divides logits by the root of the head's width, which must stay that of the uncut.
    scales = np.array([np.sqrt(cut.head_dim / block.head_dim), 1, 1])[:, None, None]
    for part in ("kernel", "bias"):
        array = parameters.get(f"{name}.qkv.{part}")
        if array is not None:
            qkv = (columns(array.reshape(*array.shape[:-1], 3, -1)) * scales).astype(array.dtype)
            parameters[f"{name}.qkv.{part}"] = qkv.reshape(*array.shape[:-1], -1)
    proj = columns(parameters[f"{name}.proj.kernel"].T)
    parameters[f"{name}.proj.kernel"] = proj.reshape(len(proj), -1).T
    table = f"{name}.relative_position_bias_table"
    if table in parameters:
        parameters[table] = parameters[table][:, heads]


def _cut_mlp(parameters, name: str, mlp_dim: int, mask) -> None:
    """Kept units move to the front; rounding up fills with units that were to go, at weight 0."""
    order = np.argsort(~mask, kind="stable")[:mlp_dim]
    parameters[f"{name}.fc1.kernel"] = parameters[f"{name}.fc1.kernel"][:, order]
    parameters[f"{name}.fc1.bias"] = parameters[f"{name}.fc1.bias"][order]
    fc2 = parameters[f"{name}.fc2.kernel"][order]
    parameters[f"{name}.fc2.kernel"] = np.where(mask[order, None], fc2, 0)
