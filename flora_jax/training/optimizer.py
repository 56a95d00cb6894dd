"""AdamW with the published learning rate schedule and weight decay rule.

Ours beside it is `relative_steps`: Adam's steps are alike for all parameters, of which those of a
network that is fitted to another one differ much in size.
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from flora_jax.models.functional import Parameters
from flora_jax.training.settings import TrainSettings


def learning_rate_schedule(settings: TrainSettings) -> optax.Schedule:
    """Linear warm-up, then a cosine whose clock starts at step 0, not at the end of warm-up.

    The published loop moves the schedule on after each step, so step t > 0 uses its value at t-1.
    """
    base, low = settings.learning_rate, settings.min_learning_rate
    start, warmup = settings.warmup_learning_rate, settings.warmup_steps

    def schedule(step):
        t = jnp.maximum(step - 1, 0).astype(jnp.float32)
        cosine = low + (base - low) * (1 + jnp.cos(jnp.pi * t / settings.steps)) / 2
        ramp = start + t * (base - start) / max(warmup, 1)
        return jnp.where(t < warmup, ramp, cosine)

    return schedule


def make_optimizer(
    settings: TrainSettings, undecayed: Collection[str]
) -> optax.GradientTransformation:
    """The optimiser of a flat dict of parameters.

    Args:
      undecayed: names that weight decay leaves alone (tokens, positions, gates), beside all
        one-dimensional parameters.
    """

    def decays(parameters: Parameters) -> dict[str, bool]:
        return {name: p.ndim > 1 and name not in undecayed for name, p in parameters.items()}

    by_size = optax.scale_by_param_block_rms() if settings.relative_steps else optax.identity()
    chain = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            learning_rate_schedule(settings),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            mask=decays,
        ),
        by_size,
    )

    def update(gradient: Parameters, state, parameters: Parameters):
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to an integer power
            return chain.update(gradient, state, parameters)

    return optax.GradientTransformation(chain.init, update)
