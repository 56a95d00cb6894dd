"""Places of arrays: one mesh for any number of devices and processes, and one sharding rule."""

import functools
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flora_jax.errors import InputError

AXES = ("data", "fsdp")  # a batch is split over both, large parameters over the second
SPLIT, WHOLE = PartitionSpec(AXES), PartitionSpec()  # a batch, and what every device has whole
SMALLEST_SHARDED = 2**16  # elements; below, gathering costs more than it saves


def check_devices() -> None:
    """Raises InputError where JAX does not find the kind of device that it was told to take."""
    try:
        jax.devices()
    except Exception as error:  # of whatever kind the device's library raises
        if not (kinds := os.environ.get("JAX_PLATFORMS")):
            raise
        reason = (str(error).strip().splitlines() or ["none was found"])[0]
        raise InputError(
            f"JAX_PLATFORMS={kinds} is no device of this machine ({reason}); JAX_PLATFORMS=cpu "
            f"takes the CPU, without the variable JAX takes the fastest that it finds"
        ) from error


def make_mesh(fsdp: int = 1, devices=None) -> Mesh:
    """All devices, or those given, in groups of `fsdp` that hold each large parameter once.

    Auto, because `jax.make_mesh` defaults to Explicit axes, under which reshapes inside a plain
    ViT block raise ShardingTypeError.

    Raises:
      InputError: the number of devices is not a multiple of `fsdp`.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise InputError(
            f"fsdp {fsdp} does not divide the {len(devices)} devices; choose one of {divisors}"
        )
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def sharded_axis(shape: tuple[int, ...], mesh: Mesh) -> int | None:
    """The axis of a parameter that is split over "fsdp": the largest one that divides, if any."""
    parts = mesh.shape["fsdp"]
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not axes or np.prod(shape) < SMALLEST_SHARDED:
        return None
    return max(axes, key=lambda axis: shape[axis])


def parameter_partition(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    axis = sharded_axis(shape, mesh)
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "fsdp")


def shard_parameters(tree, mesh: Mesh):
    """Every array that is the size of a large parameter split over "fsdp", the others whole."""
    places = jax.tree.map(lambda x: NamedSharding(mesh, parameter_partition(x.shape, mesh)), tree)
    return jax.device_put(tree, places)


def replicate(tree, mesh: Mesh):
    """Every device holds the whole tree."""
    return jax.tree.map(lambda array: _placed(array, NamedSharding(mesh, WHOLE)), tree)


def spread(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array that every process holds whole -> the same array split over all devices."""
    return _placed(array, NamedSharding(mesh, SPLIT))


def _placed(array, place: NamedSharding) -> jax.Array:
    """In several processes `device_put` compares what each has: a copy of each on every device."""
    if place.is_fully_addressable or not getattr(array, "is_fully_addressable", True):
        return jax.device_put(array, place)
    return jax.make_array_from_callback(np.shape(array), place, np.asarray(array).__getitem__)


def on_each_device(function, mesh: Mesh, in_specs, out_specs):
    """The function with each device at its own share; it holds the only collectives there are.

    A Pallas kernel can be split over devices in no other way, and an automatic partitioner puts
    collectives inside the branches of sliced layers.
    """
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,  # a Pallas kernel does not say along which axes its result varies
    )


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process' share [B_local, ...] of a batch -> global arrays [B, ...] over all devices."""
    place = functools.partial(jax.make_array_from_process_local_data, NamedSharding(mesh, SPLIT))
    return {name: place(value) for name, value in batch.items()}


def equal_share(
    name: str, batch_size: int, num_devices: int, accumulate: int = 1, of: str = "devices"
) -> int:
    """Images of a batch that each device, or other taker, has in all the parts of its share.

    Raises InputError, which calls the batch size `name` and the takers `of`, where they cannot have
    equally many; names the nearest batch size that can be shared.
    """
    multiple = num_devices * accumulate
    if batch_size % multiple:
        nearest = max(1, round(batch_size / multiple)) * multiple
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        raise InputError(
            f"{name} {batch_size} cannot be shared by {num_devices} {of}{parts}; "
            f"the nearest that can: {nearest}"
        )
    return batch_size // num_devices
