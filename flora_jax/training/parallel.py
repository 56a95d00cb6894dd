"""A loss and its gradient on all devices, each with its share of the batch.

Each device computes by itself, with whole parameters; the collectives come before and after.
"""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from flora_jax.cluster.mesh import (
    AXES,
    SPLIT,
    WHOLE,
    on_each_device,
    parameter_partition,
    sharded_axis,
)
from flora_jax.models.functional import Parameters


def data_parallel(loss_and_gradient: Callable, mesh: Mesh, parameters: Parameters) -> Callable:
    """The same function of a whole batch, its results the means over the devices.

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
