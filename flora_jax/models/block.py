"""The pre-norm transformer block and the patch embedding, which all families share."""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flora_jax.models.layers import LayerNorm, Linear
from flora_jax.models.spec import BlockInput
from flora_jax.models.windows import Windows


class Block(nnx.Module):
    """Pre-norm block, in two halves so that a search can score them apart. x [B*N, D].

    A stage's first block may begin with a `downsample` of all tokens. Where attention stays inside
    `windows`, it sees the tokens window by window. A `local_conv` follows it in hybrids.
    """

    def __init__(
        self,
        into: BlockInput,
        attention: nnx.Module,
        mlp: nnx.Module,
        epsilon: float,
        downsample: nnx.Module | None = None,
        windows: Windows | None = None,
        local_conv: nnx.Module | None = None,
    ):
        self.downsample, self.windows, self.local_conv = downsample, windows, local_conv
        self.norm1 = LayerNorm(into.width, epsilon)
        self.attn = attention
        self.norm2 = LayerNorm(into.width, epsilon)
        self.mlp = mlp

    def normalised(self, norm: LayerNorm, x: jax.Array) -> jax.Array:
        """What the attention and the MLP work on; a subclass may change it."""
        return norm(x)

    def attention_half(self, x: jax.Array) -> jax.Array:
        if self.downsample is not None:
            x = self.downsample(x)
        tokens = x if self.windows is None else self.windows.cut(x)
        mixed = self.attn(self.normalised(self.norm1, tokens))
        x = x + (mixed if self.windows is None else self.windows.join(mixed))
        return x if self.local_conv is None else self.local_conv(x)

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

    `kept` lists the patches to project, in rows; None for all. `bias` is that of the projection.
    """

    def __init__(
        self,
        patch_size: int,
        in_channels: int,
        width: int,
        norm: LayerNorm | None = None,
        kept: tuple[int, ...] | None = None,
        bias: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        self.patch_size, self.kept = patch_size, kept
        pixels, bias_features = patch_size * patch_size * in_channels, width * bias
        self.proj = Linear(pixels, width, bias_features=bias_features, rngs=rngs)
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
