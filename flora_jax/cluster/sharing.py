"""Equal shares of a batch."""

from flora_jax.errors import InputError


def equal_share(
    name: str, batch_size: int, num_devices: int, accumulate: int = 1, of: str = "devices"
) -> int:
    """Images of a batch that each of the devices, or of other takers, has in all its parts.

    Args:
      name: what the error calls the batch size.
      accumulate: parts that every share is cut into.
      of: what the takers are.

    Raises:
      InputError: they cannot have equally many; names the nearest batch size that can be shared.
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
