"""One optimiser step as a compiled function; genes are run-time values, so it compiles once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax.data.normalize import Normalization
from flora_jax.models import functional
from flora_jax.models.functional import Parameters
from flora_jax.train.optimizer import make_optimizer
from flora_jax.train.settings import TrainSettings


class TrainState(NamedTuple):
    """All that a run needs to go on: the checkpoint's content."""

    step: jax.Array  # int32 []
    parameters: Parameters
    optimizer: Any
    average: Parameters | None  # exponential moving average of the parameters


def initial_state(parameters: Parameters, settings: TrainSettings) -> TrainState:
    """Step 0, with a copy of the parameters: a step donates its state, the caller keeps them."""
    parameters = jax.tree.map(jnp.copy, parameters)
    return TrainState(
        step=jnp.int32(0),
        parameters=parameters,
        optimizer=make_optimizer(settings).init(parameters),
        average=jax.tree.map(jnp.copy, parameters) if settings.ema_decay else None,
    )


def task_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Soft cross entropy of logits [B, classes] against probabilities [B, classes], mean over B."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets).mean()


@functools.lru_cache(maxsize=32)
def make_step(
    graphdef,
    settings: TrainSettings,
    normalization: Normalization,
    teacher_graphdef=None,
    penalty: Callable[[Parameters], jax.Array] | None = None,
) -> Callable:
    """The compiled step of a network; equal arguments give the same compiled function.

    A `penalty` on the parameters (hashable, so that equal ones compile once) adds to the loss.

    Returns:
      step(state, batch, genes, teacher_parameters) -> (state, metrics float32 [2]) where batch
      has image uint8 [B, H, W, C] and label int32 [B], genes is int32 [L] or None, and metrics
      are the loss and the gradient's norm before clipping. The state passed in is donated.
    """
    optimizer = make_optimizer(settings)
    dtype = jnp.dtype(settings.compute_dtype)

    def logits_of(graphdef, parameters, images, genes=None):
        parameters = jax.tree.map(lambda p: p.astype(dtype), parameters)
        return functional.merge(graphdef, parameters)(images, genes)

    def loss(parameters, batch, genes, teacher_parameters):
        images = normalization(batch["image"], dtype)
        logits = logits_of(graphdef, parameters, images, genes)
        if teacher_graphdef is not None:
            teacher_logits = logits_of(teacher_graphdef, teacher_parameters, images)
            targets = jax.nn.softmax(teacher_logits.astype(jnp.float32))
        else:
            targets = optax.smooth_labels(
                jax.nn.one_hot(batch["label"], logits.shape[-1]), settings.label_smoothing
            )
        task = task_loss(logits, targets)
        return task if penalty is None else task + penalty(parameters)

    def loss_and_gradient(parameters, batch, genes, teacher_parameters):
        value_and_grad = jax.value_and_grad(loss)
        if settings.accumulate == 1:
            return value_and_grad(parameters, batch, genes, teacher_parameters)

        def add(total, micro_batch):
            return jax.tree.map(
                jnp.add, total, value_and_grad(parameters, micro_batch, genes, teacher_parameters)
            ), None

        # Strided, so that every device keeps the images it already holds.
        micro_batches = jax.tree.map(
            lambda x: x.reshape(-1, settings.accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters))
        total, _ = jax.lax.scan(add, zero, micro_batches)
        return jax.tree.map(lambda x: x / settings.accumulate, total)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch, genes, teacher_parameters):
        value, gradient = loss_and_gradient(state.parameters, batch, genes, teacher_parameters)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        average = state.average
        if average is not None:
            average = optax.incremental_update(parameters, average, 1 - settings.ema_decay)
        metrics = jnp.stack([value, optax.tree.norm(gradient)])
        return TrainState(state.step + 1, parameters, optimizer_state, average), metrics

    return step
