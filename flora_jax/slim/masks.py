"""From gates to a decision: what stays and what goes (ViT-Slim, section 3.3)."""

import bisect
import dataclasses
import logging

import jax.numpy as jnp
import numpy as np

from flora_jax.models import Spec, functional
from flora_jax.slim.extract import cut_spec
from flora_jax.slim.gates import Gated

log = logging.getLogger(__name__)

KINDS = ("attn", "mlp", "patch")


@dataclasses.dataclass(frozen=True, eq=False)
class Masks:
    """What stays, one bool array a block: attn [H, d], mlp [hidden], patch [N].

    `thresholds` are the gate values that divide, by kind; patch is absent without token gates.
    """

    attn: tuple[np.ndarray, ...]
    mlp: tuple[np.ndarray, ...]
    patch: tuple[np.ndarray, ...]
    thresholds: dict[str, float]

    def check(self, spec: Spec) -> None:
        """Raises ValueError unless these are masks of this spec."""
        expected = {
            "attn": [(block.num_heads, block.head_dim) for block in spec.blocks],
            "mlp": [(block.mlp_dim,) for block in spec.blocks],
            "patch": [(into.tokens,) for into in spec.block_inputs] if self.patch else [],
        }
        for kind, shapes in expected.items():
            actual = [mask.shape for mask in getattr(self, kind)]
            if actual != shapes:
                raise ValueError(f"{kind} masks have shapes {actual}, the spec's are {shapes}")

    def check_gated(self, gated: Gated) -> None:
        """Raises ValueError unless these are masks of this model's spec and kinds of gates."""
        self.check(gated.spec)
        if bool(self.patch) != gated.has_token_gates:
            raise ValueError(
                "the masks decide on tokens, but this network's tokens have no gates"
                if self.patch
                else "the masks do not decide on tokens, but this network's tokens have gates"
            )


def threshold(gated: Gated, attn: float = 1.0, mlp: float = 1.0, patch: float = 1.0) -> Masks:
    """Keeps the largest gates of each kind, counted over all blocks.

    A token that leaves at one block stays away from the later ones: it is kept up to the last
    block that wants it. The tokens that are classified, and at least one attention dimension and
    one MLP unit of every block, always stay.

    Args:
      attn, mlp, patch: the share of the gates to keep, in (0, 1].

    Raises:
      ValueError: a budget outside (0, 1], or one for tokens where tokens have no gates.
    """
    budgets = {"attn": attn, "mlp": mlp, "patch": patch}
    for kind, budget in budgets.items():
        if not 0 < budget <= 1:
            raise ValueError(f"budget {kind}={budget} lies outside (0, 1]")
    if not gated.has_token_gates and patch != 1:
        raise ValueError(f"budget patch={patch}, but this network's tokens have no gates")
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
            np.broadcast_to(_keep(gate, thresholds["attn"]), (block.num_heads, block.head_dim))
            for gate, block in zip(gates["attn"], spec.blocks, strict=True)
        ),
        mlp=tuple(_keep(gate, thresholds["mlp"]) for gate in gates["mlp"]),
        patch=_keep_tokens(gates["patch"], thresholds.get("patch"), spec),
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
      ValueError: not even the smallest budget is that cheap; names the least MACs.
    """
    gates, steps = gated.gates(), 1000

    def masks_at(step: int) -> Masks:
        return _masks_at(gates, gated.spec, dict.fromkeys(KINDS, step / steps))

    def cost(step: int) -> int:
        return cut_spec(gated.spec, masks_at(step), tile).macs()

    # A larger budget keeps all that a smaller one keeps: the cost is monotone in it.
    step = bisect.bisect_right(range(1, steps + 1), macs, key=cost)
    if step == 0:
        raise ValueError(f"no budget reaches {macs} MACs; the least is {cost(1)}")
    masks = masks_at(step)
    _warn_of_emptied_blocks(gates, masks)
    return masks


def apply_masks(gated: Gated, masks: Masks) -> Gated:
    """The published form of a slimmed model: every gate is 0 or 1, nothing is cut.

    Raises:
      ValueError: masks of other gates.
    """
    masks.check_gated(gated)
    parameters = functional.split(gated.network)[1]
    for b in range(len(gated.spec.blocks)):
        shape = parameters[f"blocks.{b}.attn.qkv.gate"].shape
        attn = masks.attn[b][: shape[0], : shape[1]]
        if (attn != masks.attn[b]).any():
            raise ValueError(
                f"the attention mask of block {b} is not one of attention={gated.attention!r}"
            )
        parameters[f"blocks.{b}.attn.qkv.gate"] = jnp.float32(attn)
        parameters[f"blocks.{b}.mlp.fc2.gate"] = jnp.float32(masks.mlp[b])
        if gated.has_token_gates:
            before_tanh = np.where(masks.patch[b], np.inf, 0)
            parameters[f"blocks.{b}.token_gate"] = jnp.float32(before_tanh)
    return dataclasses.replace(gated, network=functional.with_parameters(gated.network, parameters))
