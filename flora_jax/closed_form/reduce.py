"""Reductions: fewer dimensions a head and fewer MLP units, from second moments alone.

Heads. q -> q A, k -> k A^-T and v -> v B, rows of proj -> B^-1 proj leave attention as it is. With
Gq = E[q q^T], Gk = cov(k) (softmax ignores the mean of k) and U, s, V = svd(Gq^1/2 Gk^1/2),

    q' = q Gq^-1/2 U_r s_r^1/2,    k' = k Gk^-1/2 V_r s_r^1/2

are the r dimensions of least error in the logits, the sum of s^2 beyond r. With Gc the covariance
of what a head gives and U, s = svd(Gc^1/2 proj), v' = v Gc^-1/2 U_r leaves the least error behind
proj. Positions that turn queries and keys allow no such A: there the pairs of dimensions of most
energy stay. Where logits are cosines (Swin V2) only a rotation A of both leaves attention as it is:
there the leading dimensions are those of most energy in the mean of Gq and E[k k^T], each at trace
1, and the head's scale is multiplied by the share of their lengths that stays, which the cosine of
what is left would otherwise have in excess. Where a norm follows proj or fc2, errors are weighed by
its scale.

MLP. Units are taken out in small groups, each time those whose loss the others mend best:
|fc2 row|^2 over the unit's entry in the inverse covariance (optimal brain surgeon), after which
both are brought up to date.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from flora_jax.closed_form.calibrate import Calibration
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.network import Network
from flora_jax.models.spec import BlockSpec, Spec
from flora_jax.models.swin import LARGEST_LOG_SCALE

_FLOOR = 1e-6  # of a covariance's eigenvalues, as a share of the largest
_MLP_RIDGE = 0.02  # share of the units' mean variance: few images tell little about their mending
Arrays = dict[str, np.ndarray]


class Shape(NamedTuple):
    """Dimensions of each head of a block, and units of its MLP."""

    head_dim: int
    mlp_dim: int


class Heads(NamedTuple):
    """The dimensions of a block's heads, new ones in order of importance, [H, d, d] each.

    `query`, `key` and `value` multiply what a head had, `back` undoes `value`: the leading r
    columns of the three, and rows of `back`, are a reduction to r. `pairs` are the rotary pairs in
    that order, int [H, d/2], where there are any; `lengths` [H, d], where logits are cosines, the
    share of the length of query times that of key that the leading 1..d keep.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    back: np.ndarray
    pairs: np.ndarray | None
    lengths: np.ndarray | None

    def leading(self, width: int) -> np.ndarray:
        """Numbers of the `width` leading dimensions of query and key; rotary ones come in pairs."""
        if self.pairs is None:
            return np.arange(width)
        pairs = np.arange(width // 2)
        return np.concatenate([pairs, pairs + self.pairs.shape[1]])


class Units(NamedTuple):
    """MLP units in order of importance, int [hidden], and what is lost without the last of them.

    `loss[i]` is the squared error of the MLP's output a token with `left[i]` units, the best that
    can be done with these by a new fc2; `left` falls from all.
    """

    order: np.ndarray
    left: np.ndarray
    loss: np.ndarray


def importance(model: Network, calibration: Calibration) -> list[tuple[Heads, Units]]:
    """Orders of dimensions and units, a pair a block.

    Raises:
      InputError: the model has ranks, or the calibration is of another model.
    """
    calibration.check_fits(model)
    spec, parameters = model.spec, functional.split(model)[1]

    def of_block(number: int) -> tuple[Heads, Units]:
        own, block = of_one_block(parameters, number), spec.blocks[number]
        heads = order_heads(own, spec, block, calibration, f"blocks.{number}")
        covariance = calibration.covariance_of(f"blocks.{number}.mlp.fc2")
        fc2 = own["mlp.fc2.kernel"] * (own["norm2.scale"][None] if spec.post_norm else 1)
        return heads, order_units(covariance, fc2, unit_step(block.mlp_dim))

    # A thread a block: LAPACK's own threads stall one another on a busy machine.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(of_block, range(len(spec.blocks))))


def unit_step(mlp_dim: int) -> int:
    """Units that leave an MLP together."""
    return max(1, mlp_dim // 24)


def reduced_spec(spec: Spec, shapes: Sequence[Shape]) -> Spec:
    """The spec with these shapes, one a block; `reduced` says which rotary pairs stay."""
    blocks = []
    for block, (head_dim, mlp_dim) in zip(spec.blocks, shapes, strict=True):
        pairs = block.rotary_pairs
        if spec.rope_theta is not None and head_dim < block.head_dim:
            pairs = (tuple(range(head_dim // 2)),) * block.num_heads
        cut = dataclasses.replace(block, head_dim=head_dim, mlp_dim=mlp_dim, rotary_pairs=pairs)
        blocks.append(cut)
    return dataclasses.replace(spec, blocks=tuple(blocks))


def reduced(
    model: Network,
    orders: Sequence[tuple[Heads, Units]],
    shapes: Sequence[Shape],
    *,
    turn_whole: bool = False,
) -> Network:
    """The network cut to these shapes, one a block; nothing is fitted yet (`refit`).

    A block that keeps all its units, or dimensions unless `turn_whole`, keeps these as they are.
    """
    spec, parameters = model.spec, {n: np.asarray(p) for n, p in functional.split(model)[1].items()}
    blocks = []
    for number, (block, (heads, units), shape) in enumerate(
        zip(spec.blocks, orders, shapes, strict=True)
    ):
        own = of_one_block(parameters, number)
        cut = dataclasses.replace(block, head_dim=shape.head_dim, mlp_dim=shape.mlp_dim)
        if turn_whole or shape.head_dim < block.head_dim:
            cut = _cut_heads(own, block, cut, heads)
        if shape.mlp_dim < block.mlp_dim:
            _cut_units(own, block, np.sort(units.order[: shape.mlp_dim]))
        parameters |= {f"blocks.{number}.{name}": array for name, array in own.items()}
        blocks.append(cut)
    network = create_abstract(dataclasses.replace(spec, blocks=tuple(blocks)))
    return functional.with_parameters(network, {n: jnp.asarray(p) for n, p in parameters.items()})


def rotated(model: Network, calibration: Calibration) -> Network:
    """The same function with every head's dimensions in order of importance, and none left out."""
    whole = [Shape(block.head_dim, block.mlp_dim) for block in model.spec.blocks]
    return reduced(model, importance(model, calibration), whole, turn_whole=True)


def order_heads(
    own: Arrays, spec: Spec, block: BlockSpec, calibration: Calibration, name: str
) -> Heads:
    """The dimensions of a block's heads in order of importance."""
    mean, covariance = (
        calibration.mean_of(f"{name}.attn.qkv"),
        calibration.covariance_of(f"{name}.attn.qkv"),
    )
    kernels, biases = _by_head(own, block)
    of_context = calibration.covariance_of(f"{name}.attn.proj")
    proj = own["attn.proj.kernel"].astype(float).reshape(block.num_heads, block.head_dim, -1)
    if spec.post_norm:
        proj = proj * own["norm1.scale"][None, None]
    query, key, value, back, pairs, lengths = [], [], [], [], [], []
    for head in range(block.num_heads):
        (w_q, w_k, _), (b_q, _, _) = kernels[:, head], biases[:, head]
        mean_q = mean @ w_q + b_q
        moment_q = w_q.T @ covariance @ w_q + np.outer(mean_q, mean_q)
        covariance_k = w_k.T @ covariance @ w_k
        mean_k = mean @ w_k + biases[1, head]
        if spec.cosine_attention:
            a_q, kept = _turn(moment_q, covariance_k + np.outer(mean_k, mean_k))
            a_k = a_q
            lengths.append(kept)
        elif spec.rope_theta is None:
            a_q, a_k = _match(moment_q, covariance_k)
        else:
            energy_k = np.diag(covariance_k) + mean_k**2
            order = _by_energy(np.diag(moment_q), energy_k)
            a_q = a_k = np.eye(block.head_dim)[:, np.concatenate([order, order + len(order)])]
            pairs.append(order)
        own_part = slice(head * block.head_dim, (head + 1) * block.head_dim)
        root, inverse = _roots(of_context[own_part, own_part])
        u = np.linalg.svd(root @ proj[head], full_matrices=True)[0]
        query.append(a_q)
        key.append(a_k)
        value.append(inverse @ u)
        back.append(u.T @ root)
    return Heads(
        np.stack(query),
        np.stack(key),
        np.stack(value),
        np.stack(back),
        np.stack(pairs) if pairs else None,
        np.stack(lengths) if lengths else None,
    )


def _match(moment_q: np.ndarray, covariance_k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A for the queries and A^-T for the keys, [d, d], by ascending loss in the logits."""
    (root_q, inverse_q), (root_k, inverse_k) = _roots(moment_q), _roots(covariance_k)
    u, s, vt = np.linalg.svd(root_q @ root_k)
    half = np.sqrt(np.maximum(s, s.max() * _FLOOR**2))
    return inverse_q @ u * half, inverse_k @ vt.T * (s / half)


def _turn(moment_q: np.ndarray, moment_k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A rotation [d, d] for queries and keys, most energy first, and the lengths that stay [d]."""
    tiny = np.finfo(np.float32).tiny
    shares = [moment / max(np.trace(moment), tiny) for moment in (moment_q, moment_k)]
    turn = np.linalg.eigh(sum(shares))[1][:, ::-1]
    kept = [np.cumsum(np.diag(turn.T @ share @ turn)) for share in shares]
    return turn, np.sqrt(np.maximum(kept[0] * kept[1], tiny))


def _by_energy(energy_q: np.ndarray, energy_k: np.ndarray) -> np.ndarray:
    """The pairs (i, i + d/2) by what they add to the logits, most first, int [d/2]."""
    first, second = (each.reshape(2, -1).sum(0) for each in (energy_q, energy_k))
    return np.argsort(-first * second, kind="stable")


def _roots(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The square root and its inverse of a covariance with floored eigenvalues."""
    sizes, vectors = np.linalg.eigh(matrix)
    roots = np.sqrt(np.maximum(sizes, 0) + max(_FLOOR * sizes.max(), np.finfo(np.float32).tiny))
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T


def order_units(covariance: np.ndarray, fc2: np.ndarray, step: int) -> Units:
    """MLP units by importance; they leave in groups of `step`.

    Args:
      covariance: float64 [hidden, hidden] of what enters fc2.
      fc2: [hidden, D], its kernel.
    """
    size = len(covariance)
    ridge = _MLP_RIDGE * np.trace(covariance) / size or 1.0
    inverse = np.linalg.inv(covariance + ridge * np.eye(size))
    kernel, stay = fc2.astype(float), np.arange(size)
    gone, left, losses = [], [size], [0.0]
    while len(stay) > step:
        by_loss = np.argsort((kernel**2).sum(1) / np.diag(inverse), kind="stable")
        out, rest = by_loss[:step], np.sort(by_loss[step:])
        both = np.concatenate([kernel[out], inverse[np.ix_(out, rest)]], axis=1)
        mend = np.linalg.solve(inverse[np.ix_(out, out)], both)
        across = inverse[np.ix_(rest, out)]
        losses.append(losses[-1] + float((kernel[out] * mend[:, : kernel.shape[1]]).sum()))
        kernel = kernel[rest] - across @ mend[:, : kernel.shape[1]]
        inverse = inverse[np.ix_(rest, rest)] - across @ mend[:, len(mend[0]) - len(rest) :]
        gone.append(stay[out])
        stay = stay[rest]
        left.append(len(stay))
    order = np.concatenate([stay, *(each[::-1] for each in reversed(gone))])
    return Units(order, np.array(left), np.array(losses))


def _cut_heads(own: Arrays, block: BlockSpec, cut: BlockSpec, heads: Heads) -> BlockSpec:
    """Multiplies qkv and proj; returns the cut block with its rotary pairs."""
    width, number = cut.head_dim, block.num_heads
    kept = heads.leading(width)
    # Attention divides logits by the root of the head's width, which must stay that of the uncut.
    scale = math.sqrt(width / block.head_dim)
    turns = (heads.query[..., kept] * scale, heads.key[..., kept], heads.value[..., :width])
    own |= turned_qkv(own, np.stack(turns)) | scaled_logits(own, heads, width)
    proj = own["attn.proj.kernel"]
    cut_proj = heads.back[:, :width] @ proj.reshape(number, block.head_dim, -1)
    own["attn.proj.kernel"] = cut_proj.reshape(number * width, -1).astype(proj.dtype)
    if heads.pairs is None:
        return cut
    pairs = heads.pairs[:, : width // 2]
    if block.rotary_pairs is not None:
        pairs = np.take_along_axis(np.array(block.rotary_pairs), pairs, axis=1)
    return dataclasses.replace(cut, rotary_pairs=tuple(map(tuple, pairs.tolist())))


def turned_qkv(own: Mapping[str, Any], turns: Any) -> dict[str, Any]:
    """qkv's kernel and bias, if any, with query, key and value times [3, H, d, r]; NumPy or JAX."""
    turned, (_, heads, width, _) = {}, turns.shape
    for name in filter(own.__contains__, ("attn.qkv.kernel", "attn.qkv.bias")):
        stored = own[name]
        parts = stored.reshape(-1, stored.shape[-1] // (heads * width), heads, width)
        parts = parts.astype(turns.dtype).transpose(1, 2, 0, 3)  # [3, H, C, d]
        made = parts @ (turns if len(parts) == 3 else turns[::2])  # keys may lack a bias
        made = made.transpose(2, 0, 1, 3).reshape(*stored.shape[:-1], -1)
        turned[name] = made.astype(stored.dtype)
    return turned


def scaled_logits(own: Arrays, heads: Heads, width: int) -> Arrays:
    """The scale of cosines of the `width` leading dimensions, where logits are cosines."""
    if heads.lengths is None:
        return {}
    whole = own["attn.logit_scale"]
    scale = np.minimum(whole.astype(float), LARGEST_LOG_SCALE)
    return {"attn.logit_scale": (scale + np.log(heads.lengths[:, width - 1])).astype(whole.dtype)}


def _cut_units(own: Arrays, block: BlockSpec, kept: np.ndarray) -> None:
    parts = own["mlp.fc1.kernel"].shape[1] // block.mlp_dim  # gate and value
    columns = np.concatenate([kept + part * block.mlp_dim for part in range(parts)])
    own["mlp.fc1.kernel"] = own["mlp.fc1.kernel"][:, columns]
    own["mlp.fc1.bias"] = own["mlp.fc1.bias"][columns]
    for name in ("mlp.fc2.kernel", "mlp.norm.scale", "mlp.norm.bias"):
        if name in own:
            own[name] = own[name][kept]


def _by_head(own: Arrays, block: BlockSpec) -> tuple[np.ndarray, np.ndarray]:
    """Kernels [3, H, C, d] and biases [3, H, d] of query, key and value, float64."""
    split = (3, block.num_heads, block.head_dim)
    kernel = own["attn.qkv.kernel"].astype(float).reshape(-1, *split).transpose(1, 2, 0, 3)
    bias: np.ndarray = np.zeros(split)
    stored = own.get("attn.qkv.bias")
    if stored is not None:
        has_key = len(stored) == bias.size
        bias[[0, 1, 2] if has_key else [0, 2]] = stored.reshape(-1, block.num_heads, block.head_dim)
    return kernel, bias


def of_one_block(parameters: Mapping, number: int) -> Arrays:
    start = f"blocks.{number}."
    return {
        n.removeprefix(start): np.asarray(p) for n, p in parameters.items() if n.startswith(start)
    }
