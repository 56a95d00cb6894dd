"""What the networks of all families have in common: an embedding, blocks and a classifier."""

import abc

import jax
from flax import nnx

from flora_jax.models.block import RunBlocks, run_blocks
from flora_jax.models.spec import Spec

CLASSIFIERS = ("head", "head_dist")  # the modules that logits come from


class Network(nnx.Module):
    """images float32 [B, H, W, C], normalised -> logits [B, num_classes].

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
