"""Masks made true: the gated model with gates of 0 and 1, or what they leave cut out.

ViT-Slim as published only masks. The cut model computes the same: attention dimensions and MLP
units leave the tensors; tokens leave the sequence, and one constant stands for them in the
attention (`flora_jax.models.vit.SelfAttention`).
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from flora_jax.errors import InputError
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.network import Network
from flora_jax.models.spec import BlockSpec, Spec
from flora_jax.slim.gates import GATE_NAMES, Gated, per_dimension


@dataclasses.dataclass(frozen=True, eq=False)
class Masks:
    """Masks of a model, an array a block, True stays: attn [H, d], mlp [hidden], patch [N].

    `thresholds` are the gate values that divide, by kind; patch is absent without token gates.
    """

    attn: tuple[np.ndarray, ...]
    mlp: tuple[np.ndarray, ...]
    patch: tuple[np.ndarray, ...]
    thresholds: dict[str, float]

    def check(self, spec: Spec) -> None:
        """Raises InputError unless these are masks of this spec."""
        expected = {
            "attn": [(block.num_heads, block.head_dim) for block in spec.blocks],
            "mlp": [(block.mlp_dim,) for block in spec.blocks],
            "patch": [(into.tokens,) for into in spec.block_inputs] if self.patch else [],
        }
        for kind, shapes in expected.items():
            actual = [mask.shape for mask in getattr(self, kind)]
            if actual != shapes:
                raise InputError(f"{kind} masks have shapes {actual}, the spec's are {shapes}")
        for b, mask in enumerate(self.attn if spec.rope_theta is not None else ()):
            first, second = np.split(mask, 2, axis=1)
            if (first != second).any():
                raise InputError(
                    f"the attention mask of block {b} parts dimensions i and i + d/2, which rotary "
                    f"positions mix: both stay or both go"
                )

    def check_gated(self, gated: Gated) -> None:
        """Raises InputError unless these are masks of this model's spec and kinds of gates."""
        self.check(gated.spec)
        if bool(self.patch) != gated.has_token_gates:
            raise InputError(
                "the masks decide on tokens, but this network's tokens have no gates"
                if self.patch
                else "the masks do not decide on tokens, but this network's tokens have gates"
            )


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


def apply_masks(gated: Gated, masks: Masks) -> Gated:
    """The published form of a slimmed model: every gate is 0 or 1, nothing is cut.

    Raises:
      InputError: masks of other gates.
    """
    masks.check_gated(gated)
    gates = {}
    for b, uncut in enumerate(gated.gates()["attn"]):
        attn = masks.attn[b][: uncut.shape[0], : uncut.shape[1]]
        if (per_dimension(attn, gated.spec.blocks[b].head_dim) != masks.attn[b]).any():
            raise InputError(
                f"the attention mask of block {b} is not one of attention={gated.attention!r}"
            )
        of_kinds = {"attn": attn, "mlp": masks.mlp[b]}
        if gated.has_token_gates:
            of_kinds["patch"] = np.where(masks.patch[b], np.inf, 0)  # before the tanh
        for kind, gate in of_kinds.items():
            gates[f"blocks.{b}.{GATE_NAMES[kind]}"] = jnp.float32(gate)
    return gated.with_gates(gates)


def cut_spec(spec: Spec, masks: Masks, tile: int = 1) -> Spec:
    """The spec of the cut model.

    A block's heads are as wide as its widest; a head that loses all its dimensions leaves.

    Args:
      tile: head and MLP widths are rounded up to a multiple of it, where the uncut width allows;
        with rotary positions a head's width is even.

    Raises:
      InputError: masks of another spec, or tile below 1.
    """
    if tile < 1:
        raise InputError(f"tile must be at least 1, got {tile}")
    masks.check(spec)
    blocks = []
    for b, block in enumerate(spec.blocks):
        widths = masks.attn[b].sum(1)
        tokens = tuple(np.flatnonzero(masks.patch[b]).tolist()) if masks.patch else None
        if tokens is not None and len(tokens) == len(masks.patch[b]):
            tokens = None
        is_rotary = spec.rope_theta is not None
        head_tile = math.lcm(tile, 2) if is_rotary else tile
        cut = BlockSpec(
            num_heads=int((widths > 0).sum()),
            head_dim=_round_up(int(widths.max()), head_tile, block.head_dim),
            mlp_dim=_round_up(int(masks.mlp[b].sum()), tile, block.mlp_dim),
            tokens=tokens,
        )
        if is_rotary:
            cut = dataclasses.replace(cut, rotary_pairs=_rotary_pairs(block, cut, masks.attn[b]))
        blocks.append(cut)
    return dataclasses.replace(spec, blocks=tuple(blocks))


def dimension_order(mask: np.ndarray, head_dim: int, in_pairs: bool) -> np.ndarray:
    """The dimensions of cut heads, int [H, head_dim], for the mask [H, d] of the heads kept.

    Those that stay come first; a narrower head is filled up with some that were to go. `in_pairs`
    keeps (i, i + d/2) that far apart.
    """
    if not in_pairs:
        return np.argsort(~mask, axis=1, kind="stable")[:, :head_dim]
    half = mask.shape[1] // 2
    pairs = np.argsort(~mask[:, :half], axis=1, kind="stable")[:, : head_dim // 2]
    return np.concatenate([pairs, pairs + half], axis=1)


def _rotary_pairs(block: BlockSpec, cut: BlockSpec, mask: np.ndarray):
    """`rotary_pairs` of the cut block; None where its heads are whole and in order."""
    heads = np.flatnonzero(mask.any(1))
    order = dimension_order(mask[heads], cut.head_dim, in_pairs=True)[:, : cut.head_dim // 2]
    every = np.arange(block.head_dim // 2)
    if block.rotary_pairs is not None:
        order = np.take_along_axis(np.array(block.rotary_pairs)[heads], order, axis=1)
    elif order.shape[1] == len(every) and (order == every).all():
        return None
    return tuple(map(tuple, order.tolist()))


def _round_up(width: int, tile: int, most: int) -> int:
    return min(-(-width // tile) * tile, most)


def _fold(parameters, name: str, block: BlockSpec, attn_gate, mlp_gate, token_gate) -> None:
    attn_gate = per_dimension(attn_gate, block.head_dim)
    per_column = np.broadcast_to(attn_gate, (3, block.num_heads, block.head_dim)).ravel()
    factors = {"attn.qkv.kernel": per_column}
    if f"{name}.attn.qkv.bias" in parameters:  # that of the key may be missing
        factors["attn.qkv.bias"] = per_column[: len(parameters[f"{name}.attn.qkv.bias"])]
    factors["mlp.fc2.kernel"] = mlp_gate[:, None]
    if f"{name}.mlp.norm.scale" in parameters:  # before which it multiplies the value
        gate_and_value = np.concatenate([np.ones_like(mlp_gate), mlp_gate])
        factors |= {"mlp.fc1.kernel": gate_and_value, "mlp.fc1.bias": gate_and_value}
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
    tables = ("relative_position_bias_table", "attention_biases", "cpb_mlp.fc2.kernel")
    for table in (f"{name}.{each}" for each in tables):
        if table in parameters:
            parameters[table] = parameters[table][:, heads]
    if f"{name}.logit_scale" in parameters:
        parameters[f"{name}.logit_scale"] = parameters[f"{name}.logit_scale"][heads]


def _cut_mlp(parameters, name: str, mlp_dim: int, mask) -> None:
    """Kept units move to the front; rounding up fills with units that were to go, at weight 0."""
    order = np.argsort(~mask, kind="stable")[:mlp_dim]
    uncut = parameters[f"{name}.fc1.kernel"].shape[1]
    columns = np.concatenate([order + start for start in range(0, uncut, len(mask))])  # gate, value
    parameters[f"{name}.fc1.kernel"] = parameters[f"{name}.fc1.kernel"][:, columns]
    parameters[f"{name}.fc1.bias"] = parameters[f"{name}.fc1.bias"][columns]
    fc2 = parameters[f"{name}.fc2.kernel"][order]
    parameters[f"{name}.fc2.kernel"] = np.where(mask[order, None], fc2, 0)
    if f"{name}.norm.scale" in parameters:  # in which what fills up counts as zero
        stays = np.concatenate([np.ones(mlp_dim, bool), mask[order]])
        for part in ("kernel", "bias"):
            array = parameters[f"{name}.fc1.{part}"]
            parameters[f"{name}.fc1.{part}"] = np.where(stays, array, 0)
        for part in ("scale", "bias"):
            parameters[f"{name}.norm.{part}"] = parameters[f"{name}.norm.{part}"][order]
