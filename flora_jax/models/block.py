"""The pre-norm transformer block and the patch embedding, which all families share."""

import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flora_jax.models.layers import LayerNorm, Linear, make_linear
from flora_jax.models.spec import BlockSpec


class Mlp(nnx.Module):
    def __init__(self, width: int, block: BlockSpec, *, rngs: nnx.Rngs):
        self.fc1 = make_linear(width, block.mlp_dim, block.ranks[1], rngs=rngs)
        self.fc2 = make_linear(block.mlp_dim, width, block.ranks[2], rngs=rngs)

    def __call__(self, x: jax.Array, genes=(None, None)) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x, genes[0]), approximate=False), genes[1])


class Block(nnx.Module):
    """Pre-norm block, in two halves so that a search can score them apart. x [B*N, D].

    A stage's first block may begin with a `downsample` of all tokens.
    """

    def __init__(
        self,
        width: int,
        block: BlockSpec,
        attention: nnx.Module,
        epsilon: float,
        downsample: nnx.Module | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.downsample = downsample
        self.norm1 = LayerNorm(width, epsilon)
        self.attn = attention
        self.norm2 = LayerNorm(width, epsilon)
        self.mlp = Mlp(width, block, rngs=rngs)

    def attention_half(self, x: jax.Array, gene: jax.Array | None = None) -> jax.Array:
        if self.downsample is not None:
            x = self.downsample(x)
        return x + self.attn(self.norm1(x), gene)

    def mlp_half(self, x: jax.Array, genes=(None, None)) -> jax.Array:
        return x + self.mlp(self.norm2(x), genes)

    def __call__(self, x: jax.Array, genes=(None, None, None)) -> jax.Array:
        return self.mlp_half(self.attention_half(x, genes[0]), genes[1:])


BLOCK_OUTPUT = "block_output"  # what rematerialisation keeps


def run_blocks(blocks: nnx.List, x: jax.Array, genes: jax.Array | None) -> jax.Array:
    """Tokens through all blocks; genes int32 [L], three a block."""
    for i, block in enumerate(blocks):
        x = block(x, (None,) * 3 if genes is None else genes[3 * i : 3 * i + 3])
        x = checkpoint_name(x, BLOCK_OUTPUT)
    return x


class PatchEmbed(nnx.Module):
    """images [B, H, W, C] -> patches projected to [B*N, D], normalised by `norm` if given.

    `kept` lists the patches to project, in rows; None for all.
    """

    def __init__(
        self,
        patch_size: int,
        in_channels: int,
        width: int,
        norm: LayerNorm | None = None,
        kept: tuple[int, ...] | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.patch_size, self.kept = patch_size, kept
        self.proj = Linear(patch_size * patch_size * in_channels, width, rngs=rngs)
        self.norm = norm

    def __call__(self, images: jax.Array) -> jax.Array:
        batch, height, width, channels = images.shape
        size = self.patch_size
        grid = images.reshape(batch, height // size, size, width // size, size, channels)
        patches = grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)
        if self.kept is not None:
            patches = patches[:, np.array(self.kept, int)]
        x = self.proj(patches.reshape(-1, patches.shape[-1]))
        return x if self.norm is None else self.norm(x)
