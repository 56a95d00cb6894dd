"""Where arrays live: one mesh with a data axis, for any number of devices and processes."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """All devices along one "data" axis.

    Auto, because `jax.make_mesh` defaults to Explicit axes, under which reshapes inside a plain
    ViT block raise ShardingTypeError.
    """
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree, mesh: Mesh):
    """Every device holds the whole tree."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def spread(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array that every process holds whole -> the same array split over "data"."""
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec("data")))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process' share [B_local, ...] of a batch -> global arrays [B, ...] split over "data"."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
