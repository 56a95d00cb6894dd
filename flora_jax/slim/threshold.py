"""Masks from gates: one global quantile a kind (ViT-Slim, section 3.3).

    mask = gate >= the (1 - budget) quantile of all gates of its kind

Ours: a token stays up to the last block that wants it, no block is emptied, and one budget of MACs
in the place of three shares (`threshold_to_macs`).
"""

import bisect
import itertools
import logging

import numpy as np
from etils import epath
from safetensors import numpy as safetensors

from flora_jax.cluster.processes import by_the_first
from flora_jax.errors import InputError
from flora_jax.io.files import replacing
from flora_jax.models.spec import Spec
from flora_jax.slim.cut import Masks, cut_spec
from flora_jax.slim.gates import GATE_NAMES, Gated, per_dimension

log = logging.getLogger(__name__)

KINDS = tuple(GATE_NAMES)
DECISION_FILE = "slim/decision.safetensors"  # in the folder of a run


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
