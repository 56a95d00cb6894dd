"""AdamW with the published learning rate schedule and weight decay rule."""

import jax.numpy as jnp
import optax

from flora_jax.train.settings import TrainSettings

_NEVER_DECAYED = (
    "cls_token",
    "dist_token",
    "pos_embed",
    "absolute_pos_embed",
    "relative_position_bias_table",
    "gate",
)


def learning_rate_schedule(settings: TrainSettings) -> optax.Schedule:
    """Linear warm-up, then a cosine whose clock starts at step 0, not at the end of warm-up.

    The published loop moves the schedule on after each step, so step t > 0 uses its value at t-1.
    """
    base, low = settings.learning_rate, settings.min_learning_rate
    start, warmup = settings.warmup_learning_rate, settings.warmup_steps

    def schedule(step):
        t = jnp.maximum(step - 1, 0)
        cosine = low + (base - low) * (1 + jnp.cos(jnp.pi * t / settings.steps)) / 2
        ramp = start + t * (base - start) / max(warmup, 1)
        return jnp.where(t < warmup, ramp, cosine)

    return schedule


def decays(name: str, parameter) -> bool:
    """Whether weight decay applies: not to one-dimensional parameters, tokens or positions."""
    return parameter.ndim > 1 and name.rpartition(".")[2] not in _NEVER_DECAYED


def make_optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            learning_rate_schedule(settings),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            mask=lambda parameters: {name: decays(name, p) for name, p in parameters.items()},
        ),
    )
