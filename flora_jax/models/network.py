"""The common parts of all families' networks: patch embedding, blocks, classifier."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flora_jax.models.layers import LAYER_OUTPUT, Attention, LayerNorm, Linear, Mlp
from flora_jax.models.spec import BlockInput, Spec
from flora_jax.models.windows import Windows

CLASSIFIERS = ("head", "head_dist")  # the modules that outputs come from
BLOCK_OUTPUT = "block_output"  # what rematerialisation keeps
_PERIODS = (1, 2)  # Swin shifts the windows of every other block


class Block(nnx.Module):
    """A block in two halves, so that a search can score them apart. x [B*N, D].

    A norm stands before each half, or behind it: `post_norm`, of Swin V2. A stage's first block may
    begin with a `downsample` of all tokens. Where attention stays inside `windows`, it sees the
    tokens window by window. A `local_conv` follows it in hybrids.
    """

    def __init__(
        self,
        into: BlockInput,
        attention: Attention,
        mlp: Mlp,
        epsilon: float,
        downsample: nnx.Module | None = None,
        windows: Windows | None = None,
        local_conv: nnx.Module | None = None,
        post_norm: bool = False,
    ):
        self.downsample, self.windows, self.local_conv = downsample, windows, local_conv
        self.post_norm = post_norm
        self.norm1 = LayerNorm(into.width, epsilon)
        self.attn = attention
        self.norm2 = LayerNorm(into.width, epsilon)
        self.mlp = mlp

    def normalised(self, norm: LayerNorm, x: jax.Array) -> jax.Array:
        """The input of the attention and of the MLP; a subclass may change it."""
        return norm(x)

    def entered(self, x: jax.Array) -> jax.Array:
        """The tokens that it works on, after its downsampling."""
        return x if self.downsample is None else self.downsample(x)

    def cut(self, x: jax.Array) -> jax.Array:
        """The tokens in the order of its attention, window by window."""
        return x if self.windows is None else self.windows.cut(x)

    def attention_input(self, x: jax.Array) -> jax.Array:
        x = self.cut(x)
        return x if self.post_norm else self.normalised(self.norm1, x)

    def after_attention(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        """Adds what the attention made, as it comes out, to the residual stream."""
        mixed = mixed if self.windows is None else self.windows.join(mixed)
        return x + (self.normalised(self.norm1, mixed) if self.post_norm else mixed)

    def convolved(self, x: jax.Array) -> jax.Array:
        return x if self.local_conv is None else self.local_conv(x)

    def mlp_input(self, x: jax.Array) -> jax.Array:
        return x if self.post_norm else self.normalised(self.norm2, x)

    def after_mlp(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        """Adds what the MLP made to the residual stream."""
        return x + (self.normalised(self.norm2, mixed) if self.post_norm else mixed)

    def attention_half(self, x: jax.Array) -> jax.Array:
        x = self.entered(x)
        return self.convolved(self.after_attention(x, self.attn(self.attention_input(x))))

    def mlp_half(self, x: jax.Array) -> jax.Array:
        return self.after_mlp(x, self.mlp(self.mlp_input(x)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp_half(self.attention_half(x))


RunBlocks = Callable[[Sequence[Block], jax.Array], jax.Array]


def run_blocks(blocks: Iterable[Block], x: jax.Array) -> jax.Array:
    """Takes tokens [B*N, D] through all blocks."""
    for block in blocks:
        x = checkpoint_name(block(x), BLOCK_OUTPUT)
    return x


@dataclasses.dataclass(frozen=True)
class Loop:
    """Computes the same as `run_blocks`, with a loop wherever like blocks repeat.

    The backward pass computes again what is between the layers' products, for a loop would keep
    all of it; with `rematerialize`, all but the blocks' outputs.
    """

    rematerialize: bool = False

    def __call__(self, blocks: Sequence[Block], x: jax.Array) -> jax.Array:
        """Takes tokens [B*N, D] through all blocks."""
        parts = [nnx.split(block) for block in blocks]
        shapes = [(graphdef, jax.tree.map(jnp.shape, state)) for graphdef, state in parts]
        start = 0
        while start < len(blocks):
            repeats = {period: _repeats(shapes[start:], period) for period in _PERIODS}
            period = max(repeats, key=repeats.__getitem__)
            end = start + repeats[period] * period
            if repeats[period] == 1:
                x = run_blocks(blocks[start:end], x)
            else:
                x = self._run(parts[start:end], period, x)
            start = end
        return x

    def _run(self, parts: list, period: int, x: jax.Array) -> jax.Array:
        graphdefs, states = zip(*parts, strict=True)
        periods = [states[i : i + period] for i in range(0, len(states), period)]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *periods)
        kept = () if self.rematerialize else (LAYER_OUTPUT,)

        @functools.partial(
            jax.checkpoint,
            prevent_cse=False,  # a loop is no place where XLA would merge the two computations
            policy=jax.checkpoint_policies.save_only_these_names(*kept),
        )
        def one_period(x, states):
            return run_blocks(map(nnx.merge, graphdefs[:period], states), x), None

        return jax.lax.scan(one_period, x, stacked)[0]


def _repeats(shapes: list, period: int) -> int:
    """Times that the first `period` of them come in a row, at least once."""
    times = 1
    while shapes[:period] == shapes[times * period : (times + 1) * period]:
        times += 1
    return times


class Network(nnx.Module):
    """images float32 [B, H, W, C], normalised -> logits [B, num_classes], or what the spec says.

    Without a classifier (num_classes 0) it gives the pooled feature [B, D] instead.

    Raises:
      InputError: the images have another shape than the spec's, or are not floating point.
    """

    spec: Spec
    blocks: nnx.List

    @abc.abstractmethod
    def embed(self, images: jax.Array) -> jax.Array:
        """Turns images [B, H, W, C] into tokens [B*N, D], positions added."""

    @abc.abstractmethod
    def normalised(self, x: jax.Array) -> jax.Array:
        """Turns tokens [B*N, D] of the last block into [B, N, D], after the last norm."""

    @abc.abstractmethod
    def classify(self, x: jax.Array) -> jax.Array:
        """Turns tokens [B*N, D] of the last block into logits [B, num_classes]."""

    def features(self, images: jax.Array, run: RunBlocks = run_blocks) -> jax.Array:
        """Tokens [B, N, D] of images [B, H, W, C], after the last norm, prefix tokens first.

        A network that normalises only what it has pooled gives them as they are pooled. One whose
        tokens leave on the way (ViT-Slim) gives those that stay to the end.
        """
        return self.normalised(run(self.blocks, self.embed(images)))

    def __call__(self, images: jax.Array, run: RunBlocks = run_blocks) -> jax.Array:
        return self.classify(run(self.blocks, self.embed(images)))


def make_classifier(
    features: int, num_classes: int, bias: bool = True, *, rngs: nnx.Rngs
) -> Linear | None:
    """The layer that outputs come from; None where there are none."""
    if not num_classes:
        return None
    return Linear(features, num_classes, bias_features=num_classes * bias, rngs=rngs)


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
