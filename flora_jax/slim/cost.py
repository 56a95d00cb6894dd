"""The published count of a masked model's cost, for comparison with the cut model's own MACs."""

from flora_jax.models.vit_spec import ViTSpec
from flora_jax.slim.masks import Masks


def published_flops(spec: ViTSpec, masks: Masks) -> tuple[int, int]:
    """(the uncut model, the masked one), counted as ViT-Slim's released code does.

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
