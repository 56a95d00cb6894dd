"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of whole batches, inside the step."""

import jax
import jax.numpy as jnp

SWITCH_PROBABILITY = 0.5  # of CutMix where both are on, as DeiT trains


def mix(
    key: jax.Array, images: jax.Array, targets: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Each image with its partner at the mirrored position of the batch, all in one proportion.

    Args:
      key: decides on the method, the proportion and the box.
      images: float [B, H, W, C].
      targets: float32 [B, classes].
      mixup, cutmix: parameter of each method's Beta distribution; 0 leaves the method out, and
        one of them is above 0.

    Returns:
      images and targets, mixed.
    """
    switch_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
    share = jax.random.beta(mixup_key, mixup, mixup) if mixup else jnp.float32(1)
    own = jnp.broadcast_to(share, images.shape[1:3])
    if cutmix:
        uncut = _outside_box(box_key, jax.random.beta(cutmix_key, cutmix, cutmix), *own.shape)
        cuts = jax.random.bernoulli(switch_key, SWITCH_PROBABILITY if mixup else 1.0)
        own = jnp.where(cuts, uncut, own)
    per_pixel, wide = own[None, ..., None], images.astype(jnp.float32)
    blend = per_pixel * wide + (1 - per_pixel) * wide[::-1]
    share = own.mean()
    return blend.astype(images.dtype), share * targets + (1 - share) * targets[::-1]


def _outside_box(key: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """0 in a box of about 1 - share of the area, anywhere and cut off at the edges; 1 outside."""
    shape = jnp.array([height, width], jnp.float32)
    half = jnp.floor(shape * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
    centre = jnp.floor(jax.random.uniform(key, (2,)) * shape).astype(jnp.int32)
    first, end = centre - half, centre + half
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
    in_box = (first[0] <= rows) & (rows < end[0]) & (first[1] <= columns) & (columns < end[1])
    return 1.0 - in_box.astype(jnp.float32)
