"""From gates to a decision: what stays and what goes (ViT-Slim, section 3.3)."""

import bisect
import dataclasses
import itertools
import logging
import math

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import numpy as safetensors

from flora_jax.cluster.processes import by_the_first
from flora_jax.errors import InputError
from flora_jax.io.files import replacing
from flora_jax.models.spec import BlockSpec, Spec
from flora_jax.slim.gates import GATE_NAMES, Gated, per_dimension

log = logging.getLogger(__name__)

KINDS = tuple(GATE_NAMES)
DECISION_FILE = "slim/decision.safetensors"  # in the folder of a run


@dataclasses.dataclass(frozen=True, eq=False)
class Masks:
    """What stays of a model, one bool array a block: attn [H, d], mlp [hidden], patch [N].

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
    """Which dimensions a cut head has, int [H, head_dim], for the mask [H, d] of the heads kept.

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


def threshold(gated: Gated, attn: float = 1.0, mlp: float = 1.0, patch: float = 1.0) -> Masks:
    """Keeps the largest gates of each kind, counted over all blocks.

    A token that leaves at one block stays away from the later ones: it is kept up to the last
    block that wants it. The tokens that are classified, and at least one attention dimension and
    one MLP unit of every block, always stay.

    Args:
      attn, mlp, patch: the share of the gates to keep, in (0, 1].

    Raises:
      InputError: a budget outside (0, 1], or one for tokens where tokens have no gates.
    """
    budgets = {"attn": attn, "mlp": mlp, "patch": patch}
    for kind, budget in budgets.items():
        if not 0 < budget <= 1:
            raise InputError(f"budget {kind}={budget} lies outside (0, 1]")
    if not gated.has_token_gates and patch != 1:
        raise InputError(f"budget patch={patch}, but this network's tokens have no gates")
    gates = gated.gates()
    masks = _masks_at(gates, gated.spec, budgets)
    _warn_of_emptied_blocks(gates, masks)
    return masks


def _masks_at(gates: dict[str, list[np.ndarray]], spec: Spec, budgets: dict[str, float]) -> Masks:
    thresholds = {
        kind: _quantile(np.concatenate([gate.ravel() for gate in gates[kind]]), budgets[kind])
        for kind in KINDS
        if gates[kind]
    }
    return Masks(
        attn=tuple(
            np.broadcast_to(
                per_dimension(_keep(gate, thresholds["attn"]), block.head_dim),
                (block.num_heads, block.head_dim),
            )
            for gate, block in zip(gates["attn"], spec.blocks, strict=True)
        ),
        mlp=tuple(_keep(gate, thresholds["mlp"]) for gate in gates["mlp"]),
        patch=_keep_tokens(gates["patch"], thresholds.get("patch", 0.0), spec),
        thresholds=thresholds,
    )


def _quantile(values: np.ndarray, budget: float) -> float:
    return float(np.sort(values)[min(int((1 - budget) * len(values)), len(values) - 1)])


def _keep(gate: np.ndarray, threshold: float) -> np.ndarray:
    return gate >= min(threshold, gate.max())


def _keep_tokens(gates: list[np.ndarray], threshold: float, spec: Spec) -> tuple[np.ndarray, ...]:
    kept, wanted_later = [], False
    for gate in reversed(gates):
        wanted_later = wanted_later | (gate >= threshold)
        wanted_later[: spec.num_prefix_tokens] = True
        kept.append(wanted_later)
    return tuple(reversed(kept))


def _warn_of_emptied_blocks(gates: dict[str, list[np.ndarray]], masks: Masks) -> None:
    for kind, what in (("attn", "attention"), ("mlp", "MLP")):
        for b, gate in enumerate(gates[kind]):
            if gate.max() < masks.thresholds[kind]:
                log.warning(
                    "the budget empties the %s of block %d: its largest gate is kept all the same",
                    *(what, b),
                )


def threshold_to_macs(gated: Gated, macs: int, tile: int = 1) -> Masks:
    """The masks of the largest common budget of all kinds whose cut model costs at most `macs`.

    Budgets are tried in thousandths. Widths are rounded up to `tile` as in `cut_spec`.

    Raises:
      InputError: not even the smallest budget is that cheap; names the least MACs.
    """
    gates, steps = gated.gates(), 1000

    def masks_at(step: int) -> Masks:
        return _masks_at(gates, gated.spec, dict.fromkeys(KINDS, step / steps))

    def cost(step: int) -> int:
        return cut_spec(gated.spec, masks_at(step), tile).macs()

    # A larger budget keeps all that a smaller one keeps: the cost is monotone in it.
    step = bisect.bisect_right(range(1, steps + 1), macs, key=cost)
    if step == 0:
        raise InputError(f"no budget reaches {macs} MACs; the least is {cost(1)}")
    masks = masks_at(step)
    _warn_of_emptied_blocks(gates, masks)
    return masks


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


def write_decision(path: epath.PathLike, gated: Gated, masks: Masks) -> None:
    """Writes gates and masks to a `.safetensors` file, by kind and block; `read_decision` reads it.

    Raises:
      StorageError: it cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    for kind, gates in gated.gates().items():
        for block, (gate, mask) in enumerate(zip(gates, getattr(masks, kind), strict=True)):
            arrays[f"{kind}.{block}.gate"] = np.ascontiguousarray(gate)
            arrays[f"{kind}.{block}.mask"] = np.ascontiguousarray(mask)
        if gates:
            arrays[f"{kind}.threshold"] = np.array([masks.thresholds[kind]])
    with replacing(path) as partial:
        partial.write_bytes(safetensors.save(arrays))


write_decision_once = by_the_first(write_decision)


def read_decision(path: epath.PathLike) -> tuple[dict[str, list[np.ndarray]], Masks]:
    """The gates, as `Gated.gates` gives them, and the masks that came of them."""
    arrays = safetensors.load(epath.Path(path).read_bytes())

    def of_blocks(kind: str, what: str) -> list[np.ndarray]:
        names = (f"{kind}.{block}.{what}" for block in itertools.count())
        return [arrays[name] for name in itertools.takewhile(arrays.__contains__, names)]

    thresholds = {
        kind: float(arrays[f"{kind}.threshold"][0])
        for kind in KINDS
        if f"{kind}.threshold" in arrays
    }
    attn, mlp, patch = (tuple(of_blocks(kind, "mask")) for kind in KINDS)
    masks = Masks(attn, mlp, patch, thresholds)
    return {kind: of_blocks(kind, "gate") for kind in KINDS}, masks
