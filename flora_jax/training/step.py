"""One optimiser step as a compiled function; genes are run-time values, so it compiles once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flora_jax.cluster.mesh import (
    AXES,
    SPLIT,
    WHOLE,
    on_each_device,
    parameter_partition,
    sharded_axis,
)
from flora_jax.data.normalize import Normalization
from flora_jax.evaluation.outputs import probabilities
from flora_jax.models import functional
from flora_jax.models.functional import Parameters, Structure
from flora_jax.models.network import BLOCK_OUTPUT, Loop, RunBlocks, run_blocks
from flora_jax.training.losses import distillation_loss, soft_targets, task_loss
from flora_jax.training.mixing import mix
from flora_jax.training.optimizer import make_optimizer
from flora_jax.training.settings import TrainSettings


class TrainState(NamedTuple):
    """All that a run needs to go on: the checkpoint's content."""

    step: jax.Array  # int32 []
    parameters: Parameters
    optimizer: Any
    average: Parameters | None  # exponential moving average of the parameters

    @property
    def final_parameters(self) -> Parameters:
        """The parameters that training hands on: the average where there is one."""
        return self.parameters if self.average is None else self.average


def initial_state(
    structure: Structure, parameters: Parameters, settings: TrainSettings
) -> TrainState:
    """The state at step 0, with a copy of the parameters, for a step donates its state."""
    parameters = jax.device_put(parameters, may_alias=False)
    return TrainState(
        step=jnp.int32(0),
        parameters=parameters,
        optimizer=make_optimizer(settings, structure.undecayed).init(parameters),
        average=jax.device_put(parameters, may_alias=False) if settings.ema_decay else None,
    )


def teacher_targets(
    structure: Structure, parameters: Parameters, images: jax.Array, run: RunBlocks = run_blocks
) -> jax.Array:
    """A teacher's probabilities for normalised images, float32 [B, classes]."""
    return probabilities(_forward(structure, parameters, images, run=run)[0])


def _forward(
    structure: Structure,
    parameters: Parameters,
    images: jax.Array,
    genes: jax.Array | None = None,
    run: RunBlocks = run_blocks,
) -> tuple[jax.Array, jax.Array]:
    """Logits [B, classes] and features [B, N, D] of a model, in the dtype of the images."""
    parameters = jax.tree.map(lambda p: p.astype(images.dtype), parameters)
    network = functional.merge(structure, parameters, genes)
    tokens = run(network.blocks, network.embed(images))
    return network.classify(tokens), network.normalised(tokens)


@functools.lru_cache(maxsize=32)
def make_step(
    structure: Structure,
    settings: TrainSettings,
    normalization: Normalization,
    mesh: Mesh,
    teacher_structure: Structure | None = None,
    penalty: Callable[[Parameters], jax.Array] | None = None,
) -> Any:
    """The compiled step of a network; equal arguments give the same compiled function.

    A `penalty` on the parameters (hashable, so that equal ones compile once) adds to the loss.

    Returns:
      step(state, batch, genes, teacher_parameters) -> (state, metrics float32 [2]) where batch
      has image uint8 [B, H, W, C] and label int32 [B], genes is int32 [L] or None, and metrics
      are the loss and the gradient's norm before clipping. The state passed in is donated.
      Where the batch has target_probs [B, k] and target_index [B, k], the arguments of
      `soft_targets`, these are what the network learns from; then there is no teacher.
    """
    optimizer = make_optimizer(settings, structure.undecayed)
    dtype = jnp.dtype(settings.compute_dtype)
    run = Loop(settings.rematerialize) if settings.loop_over_blocks else run_blocks
    forward: Callable = functools.partial(_forward, structure, run=run)
    if settings.rematerialize and not settings.loop_over_blocks:
        blocks_alone = jax.checkpoint_policies.save_only_these_names(BLOCK_OUTPUT)
        forward = jax.checkpoint(forward, policy=blocks_alone)

    def loss(parameters, images, targets, genes, teacher_parameters):
        outputs = forward(parameters, images, genes)
        extra = jnp.float32(0) if penalty is None else penalty(parameters)
        if teacher_structure is None:
            return task_loss(outputs[0], targets) + extra
        taught = _forward(teacher_structure, teacher_parameters, images, run=run)
        spec = functional.merge(structure, parameters).spec
        return distillation_loss(outputs, taught, spec, settings.distill_features) + extra

    def loss_and_gradient(parameters, images, targets, genes, teacher_parameters):
        value_and_grad = jax.value_and_grad(loss)
        if settings.accumulate == 1:
            return value_and_grad(parameters, images, targets, genes, teacher_parameters)

        def add(total, micro_batch):
            found = value_and_grad(parameters, *micro_batch, genes, teacher_parameters)
            return jax.tree.map(jnp.add, total, found), None

        micro_batches = jax.tree.map(
            lambda x: x.reshape(settings.accumulate, -1, *x.shape[1:]), (images, targets)
        )
        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters))
        total, _ = jax.lax.scan(add, zero, micro_batches)
        return jax.tree.map(lambda x: x / settings.accumulate, total)

    def targets_of(batch, num_classes: int):
        if "target_probs" in batch:
            if teacher_structure is not None:
                raise ValueError("a step learns from a teacher or stored predictions, not both")
            return soft_targets(batch["target_probs"], batch["target_index"], num_classes)
        labels = jax.nn.one_hot(batch["label"], num_classes)
        if not num_classes:  # the features of a teacher are all there is to learn
            return labels
        return optax.smooth_labels(labels, settings.label_smoothing)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch, genes, teacher_parameters):
        num_classes = functional.merge(structure, state.parameters).spec.num_classes
        images, targets = normalization(batch["image"], dtype), targets_of(batch, num_classes)
        if settings.mixup or settings.cutmix:
            key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
            images, targets = mix(key, images, targets, settings.mixup, settings.cutmix)
        value, gradient = data_parallel(loss_and_gradient, mesh, state.parameters)(
            state.parameters, images, targets, genes, teacher_parameters
        )
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        average = state.average
        if average is not None:
            average = optax.incremental_update(parameters, average, 1 - settings.ema_decay)
        metrics = jnp.stack([value, optax.tree.norm(gradient)])
        return TrainState(state.step + 1, parameters, optimizer_state, average), metrics

    return step


def data_parallel(loss_and_gradient: Callable, mesh: Mesh, parameters: Parameters) -> Callable:
    """The same function of a whole batch, its results the means over the devices.

    Each device computes by itself, with whole parameters; the collectives come before and after.

    Args:
      loss_and_gradient: (parameters, images, targets, *others) -> (loss, gradient).
      parameters: for their shapes. Those that `mesh` splits are gathered before, and their
        gradients come back split in the same way.
    """
    split = {name: sharded_axis(p.shape, mesh) for name, p in parameters.items()}
    partitions = {name: parameter_partition(p.shape, mesh) for name, p in parameters.items()}

    def gather(shards: Parameters) -> Parameters:
        return {
            name: shard
            if split[name] is None
            else jax.lax.all_gather(shard, "fsdp", axis=split[name], tiled=True)
            for name, shard in shards.items()
        }

    def mean(name: str, gradient: jax.Array) -> jax.Array:
        if split[name] is None:
            return jax.lax.pmean(gradient, AXES)
        shard = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=split[name], tiled=True)
        return jax.lax.pmean(shard, "data") / mesh.shape["fsdp"]

    def on_one_device(shards, images, targets, *others):
        loss, gradient = loss_and_gradient(gather(shards), images, targets, *others)
        return jax.lax.pmean(loss, AXES), {name: mean(name, g) for name, g in gradient.items()}

    def on_all(shards, images, targets, *others):
        in_specs = (partitions, SPLIT, SPLIT, *[WHOLE] * len(others))
        run = on_each_device(on_one_device, mesh, in_specs, (WHOLE, partitions))
        return run(shards, images, targets, *others)

    return on_all
