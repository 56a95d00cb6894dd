"""ViT-Slim's released code: its names of the gates, its count of the cost."""

from collections.abc import Mapping

import numpy as np

from flora_jax.errors import InputError
from flora_jax.models import functional
from flora_jax.models.spec import Spec
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.slim.cut import Masks
from flora_jax.slim.gates import GATE_NAMES, Gated, add_gates
from flora_jax.weights.detect import without_prefix
from flora_jax.weights.pretrained import from_state_dict as dense_from_state_dict

_PUBLISHED_NAMES = {"attn": "attn.zeta", "mlp": "mlp.zeta", "patch": "attn.patch_zeta"}


def from_state_dict(arrays: Mapping[str, np.ndarray], spec: Spec, attention: str = "dim") -> Gated:
    """A gated model from the published code's names: a timm DeiT's, and blocks.N.attn.zeta,
    blocks.N.attn.patch_zeta, blocks.N.mlp.zeta.

    Raises:
      InputError: weights or gates are missing, NaN, or of another shape than the spec's.
    """
    arrays = without_prefix(arrays, spec)
    weights = {name: a for name, a in arrays.items() if not name.endswith("zeta")}
    gated = add_gates(dense_from_state_dict(weights, spec), attention)
    parameters, gates = functional.split(gated.network)[1], dict[str, np.ndarray]()
    kinds = [kind for kind in GATE_NAMES if kind != "patch" or gated.has_token_gates]
    for block in range(len(spec.blocks)):
        for kind in kinds:
            name = f"blocks.{block}.{GATE_NAMES[kind]}"
            source, shape = f"blocks.{block}.{_PUBLISHED_NAMES[kind]}", parameters[name].shape
            if source not in arrays:
                raise InputError(f"the gates {source} are missing")
            value = np.asarray(arrays[source], np.float32)
            if value.size != np.prod(shape):
                raise InputError(
                    f"{source} has shape {value.shape}, expected {shape} for the gates of "
                    f"attention={attention!r} in this spec"
                )
            if np.isnan(value).any():
                raise InputError(f"the gates {source} are NaN")
            gates[name] = value.reshape(shape)
    return gated.with_gates(gates)


def published_flops(spec: ViTSpec, masks: Masks) -> tuple[int, int]:
    """Counts (the uncut model, the masked one) as ViT-Slim's released code does.

    It is not `spec.macs()` of the cut model: biases and the softmax (six operations a logit) are
    counted; the class token is not, in the uncut model; a block is charged with the tokens that the
    block before it kept; an empty head keeps its softmax, and tokens that are masked cost nothing
    though the masked attention still sees them; the patch embedding is always whole.
    """
    total = remaining = (
        spec.num_patches * spec.embed_dim * 3 * spec.patch_size** 2
        + spec.embed_dim * spec.num_classes * (1 + spec.distilled)
    )
    num_tokens = spec.num_patches
    for b, block in enumerate(spec.blocks):
        widths = (int(masks.attn[b].sum()), int(masks.mlp[b].sum()))
        uncut = (block.attention_dim, block.mlp_dim)
        total += _block_flops(spec.embed_dim, block.num_heads, spec.num_patches, *uncut)
        remaining += _block_flops(spec.embed_dim, block.num_heads, num_tokens, *widths)
        num_tokens = int(masks.patch[b].sum()) if masks.patch else spec.num_tokens
    return total, remaining


def _block_flops(width: int, num_heads: int, tokens: int, attention_dim: int, hidden: int) -> int:
    norms = 2 * tokens * width
    qkv = tokens * (width + 1) * 3 * attention_dim
    attention = 2 * tokens**2 * attention_dim + 6 * num_heads * tokens**2
    proj = tokens * (attention_dim + 1) * width
    mlp = tokens * (2 * width * hidden + width + hidden)
    return norms + qkv + attention + proj + mlp
