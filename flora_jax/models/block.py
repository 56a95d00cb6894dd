"""The pre-norm transformer block and the patch embedding, which all families share."""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flora_jax.models.layers import LayerNorm, Linear, MakeLinear
from flora_jax.models.spec import BlockInput, BlockLayers, Ranks


class Mlp(nnx.Module):
    """x [B*N, D] -> fc2(GELU(fc1(x))) [B*N, D]."""

    def __init__(self, layers: BlockLayers, ranks: Ranks, linear: MakeLinear, *, rngs: nnx.Rngs):
        self.fc1 = linear(layers.fc1, ranks[1], rngs=rngs)
        self.fc2 = linear(layers.fc2, ranks[2], rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """Pre-norm block, in two halves so that a search can score them apart. x [B*N, D].

    A stage's first block may begin with a `downsample` of all tokens.
    """

    def __init__(
        self,
        into: BlockInput,
        layers: BlockLayers,
        ranks: Ranks,
        attention: nnx.Module,
        epsilon: float,
        downsample: nnx.Module | None,
        linear: MakeLinear,
        *,
        rngs: nnx.Rngs,
    ):
        self.downsample = downsample
        self.norm1 = LayerNorm(into.width, epsilon)
        self.attn = attention
        self.norm2 = LayerNorm(into.width, epsilon)
        self.mlp = Mlp(layers, ranks, linear, rngs=rngs)

    def normalised(self, norm: LayerNorm, x: jax.Array) -> jax.Array:
        """What the attention and the MLP work on; a subclass may change it."""
        return norm(x)

    def attention_half(self, x: jax.Array) -> jax.Array:
        if self.downsample is not None:
            x = self.downsample(x)
        return x + self.attn(self.normalised(self.norm1, x))

    def mlp_half(self, x: jax.Array) -> jax.Array:
        return x + self.mlp(self.normalised(self.norm2, x))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp_half(self.attention_half(x))


BLOCK_OUTPUT = "block_output"  # what rematerialisation keeps
RunBlocks = Callable[[Sequence[Block], jax.Array], jax.Array]


def run_blocks(blocks: Iterable[Block], x: jax.Array) -> jax.Array:
    """Takes tokens [B*N, D] through all blocks."""
    for block in blocks:
        x = checkpoint_name(block(x), BLOCK_OUTPUT)
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
