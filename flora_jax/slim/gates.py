"""Gates on attention dimensions, MLP units and tokens (ViT-Slim, section 3.2)."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flora_jax.io import pretrained
from flora_jax.models import Spec, create, functional
from flora_jax.models.block import Block
from flora_jax.models.functional import Parameters
from flora_jax.models.layers import Linear

ATTENTION_GATES = ("dim", "head", "uniform")
_TOKEN_GATE_START = 3.0  # its tanh, 0.995, is the gate


class GatedQkv(Linear):
    """qkv whose output is multiplied per head and dimension, alike for q, k and v."""

    def __init__(self, layer: Linear, num_heads: int, gate_shape: tuple[int, int]):
        self.kernel, self.bias = layer.kernel, layer.bias
        self.num_heads = num_heads
        self.gate = nnx.Param(jnp.ones(gate_shape))

    def __call__(self, x: jax.Array, gene: jax.Array | None = None) -> jax.Array:
        qkv = super().__call__(x)
        return (qkv.reshape(len(x), 3, self.num_heads, -1) * self.gate).reshape(qkv.shape)


class GatedFc2(Linear):
    """fc2 whose input, the hidden units after GELU, is multiplied per unit."""

    def __init__(self, layer: Linear):
        self.kernel, self.bias = layer.kernel, layer.bias
        self.gate = nnx.Param(jnp.ones(self.kernel.shape[0]))

    def __call__(self, x: jax.Array, gene: jax.Array | None = None) -> jax.Array:
        return super().__call__(x * self.gate)


class GatedBlock(Block):
    """A block whose two normalised inputs are multiplied per token; the residual stream is not."""

    def __init__(self, block: Block, gate_shape: tuple[int, int], num_tokens: int | None):
        self.downsample, self.norm1, self.norm2 = block.downsample, block.norm1, block.norm2
        self.attn, self.mlp = block.attn, block.mlp
        self.attn.qkv = GatedQkv(block.attn.qkv, block.attn.num_heads, gate_shape)
        self.mlp.fc2 = GatedFc2(block.mlp.fc2)
        start = jnp.full(num_tokens or 0, _TOKEN_GATE_START)
        self.token_gate = nnx.Param(start) if num_tokens else None

    def attention_half(self, x: jax.Array, gene: jax.Array | None = None) -> jax.Array:
        if self.downsample is not None:
            x = self.downsample(x)
        return x + self.attn(self._gated(self.norm1(x)), gene)

    def mlp_half(self, x: jax.Array, genes=(None, None)) -> jax.Array:
        return x + self.mlp(self._gated(self.norm2(x)), genes)

    def _gated(self, x: jax.Array) -> jax.Array:
        if self.token_gate is None:
            return x
        gate = jnp.tanh(self.token_gate[...])
        return (x.reshape(-1, len(gate), x.shape[-1]) * gate[:, None]).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Gated:
    """A dense model with gates. `network` is an NNX model; its parameters include the gates."""

    network: nnx.Module
    attention: str
    has_token_gates: bool

    @property
    def spec(self) -> Spec:
        return self.network.spec

    def __call__(self, images: jax.Array) -> jax.Array:
        """images float32 [B, H, W, C] -> logits [B, num_classes]."""
        return self.network(images)

    def gates(self) -> dict[str, list[np.ndarray]]:
        """Per kind, one array a block, as they multiply: attn [H, d], [H, 1] or [1, d]; mlp
        [hidden]; patch [N] (no arrays without token gates)."""
        parameters = functional.split(self.network)[1]

        def of_blocks(name: str) -> list[np.ndarray]:
            blocks = range(len(self.spec.blocks))
            return [np.asarray(parameters[f"blocks.{b}.{name}"]) for b in blocks]

        return {
            "attn": of_blocks("attn.qkv.gate"),
            "mlp": of_blocks("mlp.fc2.gate"),
            "patch": [np.tanh(g) for g in of_blocks("token_gate")] if self.has_token_gates else [],
        }


def add_gates(model: nnx.Module, attention: str = "dim", tokens: bool | None = None) -> Gated:
    """A copy of a dense model with open gates: 1 on dimensions and units, tanh(3) on tokens.

    Args:
      attention: a gate per head and dimension ("dim"), per "head", or per dimension and shared by
        the heads ("uniform").
      tokens: whether tokens get gates; None: where they can, which is a ViT that classifies its
        class token.

    Raises:
      ValueError: an unknown variant, a model that is already compressed, or token gates on a Swin
        or on a network that averages all patches.
    """
    gated = abstract_gated(model.spec, attention, tokens)
    fresh = {
        name: jnp.full(shape.shape, _TOKEN_GATE_START if name.endswith("token_gate") else 1.0)
        for name, shape in functional.split(gated.network)[1].items()
        if name.endswith("gate")
    }
    parameters = functional.split(model)[1] | fresh
    return dataclasses.replace(gated, network=functional.with_parameters(gated.network, parameters))


def abstract_gated(spec: Spec, attention: str = "dim", tokens: bool | None = None) -> Gated:
    """As `add_gates` on a model whose parameters are shapes without values."""
    if attention not in ATTENTION_GATES:
        raise ValueError(
            f"unknown attention gates {attention!r}; choose one of {', '.join(ATTENTION_GATES)}"
        )
    if any(rank is not None for rank in spec.ranks):
        raise ValueError("gates need a dense model: slim first, then factorize the slim model")
    if any(block.tokens is not None for block in spec.blocks):
        raise ValueError("this model was slimmed before: its tokens have left for good")
    reason = spec.why_tokens_stay
    if tokens and reason:
        raise ValueError(f"no token gates here: {reason}")
    has_token_gates = reason is None if tokens is None else tokens

    def build():
        network = create(spec)
        for i, (block, into) in enumerate(zip(spec.blocks, spec.block_inputs, strict=True)):
            gate_shape = {
                "dim": (block.num_heads, block.head_dim),
                "head": (block.num_heads, 1),
                "uniform": (1, block.head_dim),
            }[attention]
            num_tokens = into.tokens if has_token_gates else None
            network.blocks[i] = GatedBlock(network.blocks[i], gate_shape, num_tokens)
        return network

    return Gated(nnx.eval_shape(build), attention, has_token_gates)


@dataclasses.dataclass(frozen=True)
class SparsityPenalty:
    """w1 * sum|attn| + w2 * sum|mlp| + w3 * sum|tanh(patch)| of a gated model's parameters."""

    attn: float = 2e-4
    mlp: float = 5e-5
    patch: float = 1e-4

    def terms(self, parameters: Parameters) -> jax.Array:
        """float32 [3]: the unweighted sums, attn, mlp, patch."""
        sums = {"attn.qkv.gate": 0.0, "mlp.fc2.gate": 0.0, "token_gate": 0.0}
        for name, value in parameters.items():
            for kind in sums:
                if name.endswith(kind):
                    gate = jnp.tanh(value) if kind == "token_gate" else value
                    sums[kind] += jnp.abs(gate).sum()
        return jnp.stack([jnp.float32(total) for total in sums.values()])

    def __call__(self, parameters: Parameters) -> jax.Array:
        return self.terms(parameters) @ jnp.array([self.attn, self.mlp, self.patch])


_PUBLISHED_NAMES = {
    "attn.zeta": "attn.qkv.gate",
    "mlp.zeta": "mlp.fc2.gate",
    "attn.patch_zeta": "token_gate",
}


def from_state_dict(arrays: Mapping[str, np.ndarray], spec: Spec, attention: str = "dim") -> Gated:
    """A gated model from the published code's names: a timm DeiT's, and blocks.N.attn.zeta,
    blocks.N.attn.patch_zeta, blocks.N.mlp.zeta.

    Raises:
      ValueError: weights or gates are missing, or of another shape than the spec's.
    """
    weights = {name: a for name, a in arrays.items() if not name.endswith("zeta")}
    parameters = functional.split(pretrained.from_state_dict(weights, spec))[1]
    gated = abstract_gated(spec, attention)
    for name, shape in functional.split(gated.network)[1].items():
        if not name.endswith("gate"):
            continue
        block = ".".join(name.split(".")[:2])
        source = next(s for s, ours in _PUBLISHED_NAMES.items() if name == f"{block}.{ours}")
        if f"{block}.{source}" not in arrays:
            raise ValueError(f"the gates {block}.{source} are missing")
        value = np.asarray(arrays[f"{block}.{source}"], np.float32)
        if value.size != np.prod(shape.shape):
            raise ValueError(
                f"{block}.{source} has shape {value.shape}, expected {shape.shape} for the gates "
                f"of attention={attention!r} in this spec"
            )
        parameters[name] = value.reshape(shape.shape)
    return dataclasses.replace(gated, network=functional.with_parameters(gated.network, parameters))
