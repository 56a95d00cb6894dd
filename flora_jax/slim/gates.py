"""Gates on attention dimensions, MLP units and tokens (ViT-Slim, section 3.2)."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flora_jax.errors import InputError, unknown
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.functional import Parameters, Undecayed
from flora_jax.models.layers import LayerNorm, Linear, MakeLinear, make_linear
from flora_jax.models.network import Block, Network
from flora_jax.models.spec import BlockInput, BlockSpec, LinearShape, Rank, Spec

ATTENTION_GATES = ("dim", "head", "uniform")
_TOKEN_GATE_START = 3.0  # its tanh, 0.995, is the gate
GATE_NAMES = {"attn": "attn.qkv.gate", "mlp": "mlp.fc2.gate", "patch": "token_gate"}  # in a block


class Gate(Undecayed):
    """Values that multiply activations, and decide what can be cut."""


def per_dimension(gate, head_dim: int):
    """A gate on attention [H or 1, d] out of one that may be of pairs (i, i + d/2) [H or 1, d/2].

    Rotary positions mix the two dimensions of a pair, so they share a gate and leave together.
    """
    if gate.shape[1] in (1, head_dim):
        return gate
    return (jnp if isinstance(gate, jax.Array) else np).concatenate([gate, gate], axis=1)


class GatedQkv(Linear):
    """qkv whose output is multiplied per head and dimension, alike for q, k and v."""

    def __init__(
        self, layer: LinearShape, block: BlockSpec, gate_shape: tuple[int, int], *, rngs: nnx.Rngs
    ):
        sizes = (layer.in_features, layer.out_features)
        super().__init__(*sizes, bias_features=layer.bias_features, rngs=rngs)
        self.num_heads, self.head_dim = block.num_heads, block.head_dim
        self.gate = Gate(jnp.ones(gate_shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = super().__call__(x)
        gate = per_dimension(self.gate[...], self.head_dim)[None, None]
        return (qkv.reshape(len(x), 3, self.num_heads, -1) * gate).reshape(qkv.shape)


class GatedFc2(Linear):
    """fc2 whose input, the hidden units after GELU, is multiplied per unit.

    Where these are normalised, their gates multiply them before, too (`Mlp.hidden`).
    """

    def __init__(self, layer: LinearShape, *, rngs: nnx.Rngs):
        super().__init__(layer.in_features, layer.out_features, rngs=rngs)
        self.gate = Gate(jnp.ones(layer.in_features))

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x * self.gate[None])


class TokenGatedBlock(Block):
    """A block whose two normalised inputs are multiplied per token; the residual stream is not."""

    def __init__(self, into: BlockInput, *arguments):
        super().__init__(into, *arguments)
        self.token_gate = Gate(jnp.full(into.tokens, _TOKEN_GATE_START))

    def normalised(self, norm: LayerNorm, x: jax.Array) -> jax.Array:
        x = super().normalised(norm, x)
        gate = jnp.tanh(self.token_gate[...])
        return (x.reshape(-1, len(gate), x.shape[-1]) * gate[None, :, None]).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Gated:
    """A dense model with gates. `network` is an NNX model; its parameters include the gates."""

    network: Network
    attention: str
    has_token_gates: bool

    @property
    def spec(self) -> Spec:
        return self.network.spec

    def __call__(self, images: jax.Array) -> jax.Array:
        """images float32 [B, H, W, C] -> logits [B, num_classes]."""
        return self.network(images)

    def gates(self) -> dict[str, list[np.ndarray]]:
        """An array a block of each kind, as it multiplies: attn [H, d], [H, 1] or [1, d], with
        rotary positions d/2 pairs; mlp [hidden]; patch [N], or none without token gates."""
        values = {name: np.asarray(gate) for name, gate in self._named_gates()}

        def of_blocks(kind: str) -> list[np.ndarray]:
            blocks = range(len(self.spec.blocks))
            return [values[f"blocks.{b}.{GATE_NAMES[kind]}"] for b in blocks]

        tokens = map(np.tanh, of_blocks("patch")) if self.has_token_gates else []
        return {"attn": of_blocks("attn"), "mlp": of_blocks("mlp"), "patch": list(tokens)}

    def _named_gates(self):
        return functional.named_variables(self.network, Gate)

    def with_gates(self, gates: Mapping[str, jax.Array | np.ndarray]) -> "Gated":
        """The same network with some of its gates replaced, by name, as before the tanh."""
        parameters = {**functional.split(self.network)[1], **gates}
        network = functional.with_parameters(self.network, parameters)
        return dataclasses.replace(self, network=network)


def add_gates(model: Network, attention: str = "dim", tokens: bool | None = None) -> Gated:
    """A copy of a dense model with open gates: 1 on dimensions and units, tanh(3) on tokens.

    Args:
      attention: a gate per head and dimension ("dim"), per "head", or per dimension and shared by
        the heads ("uniform").
      tokens: whether tokens get gates; None: where they can, which is a ViT that classifies its
        class token.

    Raises:
      InputError: an unknown variant, a model that is already compressed, or token gates where
        tokens cannot leave (`Spec.why_tokens_stay`).
    """
    gated = abstract_gated(model.spec, attention, tokens)
    fresh = {
        name: jnp.full(gate.shape, _TOKEN_GATE_START if name.endswith(GATE_NAMES["patch"]) else 1.0)
        for name, gate in functional.named_variables(gated.network, Gate)
    }
    parameters = functional.split(model)[1] | fresh
    return dataclasses.replace(gated, network=functional.with_parameters(gated.network, parameters))


def abstract_gated(spec: Spec, attention: str = "dim", tokens: bool | None = None) -> Gated:
    """Does as `add_gates` on a model whose parameters are shapes without values."""
    if attention not in ATTENTION_GATES:
        raise InputError(unknown("attention gates", attention, ATTENTION_GATES))
    if any(rank is not None for rank in spec.ranks):
        raise InputError("gates need a dense model: slim first, then factorize the slim model")
    if any(block.tokens is not None for block in spec.blocks):
        raise InputError("this model was slimmed before: its tokens have left for good")
    reason = spec.why_tokens_stay
    if tokens and reason:
        raise InputError(f"no token gates here: {reason}")
    has_token_gates = reason is None if tokens is None else tokens

    gated_layers: dict[str, MakeLinear] = {}
    for block, layers in zip(spec.blocks, spec.block_layers, strict=True):
        width = block.head_dim if spec.rope_theta is None else block.head_dim // 2
        gate_shape = {
            "dim": (block.num_heads, width),
            "head": (block.num_heads, 1),
            "uniform": (1, width),
        }[attention]

        def qkv(layer, rank, *, rngs, block=block, gate_shape=gate_shape):
            return GatedQkv(layer, block, gate_shape, rngs=rngs)

        gated_layers[layers.qkv.name] = qkv
        gated_layers[layers.fc2.name] = lambda layer, rank, *, rngs: GatedFc2(layer, rngs=rngs)

    def gated_linear(layer: LinearShape, rank: Rank, *, rngs: nnx.Rngs) -> nnx.Module:
        return gated_layers.get(layer.name, make_linear)(layer, rank, rngs=rngs)

    block_class = TokenGatedBlock if has_token_gates else Block
    network = create_abstract(spec, linear=gated_linear, block=block_class)
    return Gated(network, attention, has_token_gates)


@dataclasses.dataclass(frozen=True)
class SparsityPenalty:
    """w1 * sum|attn| + w2 * sum|mlp| + w3 * sum|tanh(patch)| of a gated model's parameters."""

    attn: float = 2e-4
    mlp: float = 5e-5
    patch: float = 1e-4

    def terms(self, parameters: Parameters) -> jax.Array:
        """float32 [3]: the unweighted sums, attn, mlp, patch."""
        sums: dict[str, jax.Array | float] = dict.fromkeys(GATE_NAMES, 0.0)
        for name, value in parameters.items():
            for kind, gate_name in GATE_NAMES.items():
                if name.endswith(gate_name):
                    gate = jnp.tanh(value) if kind == "patch" else value
                    sums[kind] += jnp.abs(gate).sum()
        return jnp.stack([jnp.float32(total) for total in sums.values()])

    def __call__(self, parameters: Parameters) -> jax.Array:
        return self.terms(parameters) @ jnp.array([self.attn, self.mlp, self.patch])
