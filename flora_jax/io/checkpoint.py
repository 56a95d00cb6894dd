"""Orbax checkpoints of a training run: the newest two steps, written whole or not at all."""

import jax
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp


class Checkpoints:
    """The checkpoints of one run under `directory`/<step>. Use as a context manager."""

    def __init__(self, directory: epath.PathLike, keep: int = 2):
        self._directory = epath.Path(directory).resolve()  # Orbax takes absolute paths only
        self._directory.mkdir(parents=True, exist_ok=True)
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._checkpointer.close()

    def save(self, step: int, state) -> None:
        self._checkpointer.save(step, state, force=True)

    def restore(self, state):
        """The newest saved state, laid out like `state`; `state` itself when there is none."""
        latest = self._checkpointer.latest
        if latest is None:
            return state
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        return self._checkpointer.load(latest.step, target)

    def latest_path(self) -> epath.Path | None:
        latest = self._checkpointer.latest
        return None if latest is None else self._directory / str(latest.step)


def read_parameters(directory: epath.PathLike) -> dict[str, jax.Array]:
    """The parameters of the newest checkpoint (their moving average if kept), on one device.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    directory = epath.Path(directory).resolve()
    steps = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {directory}")
    path = directory / str(max(steps))
    saved = ocp.metadata(path).metadata
    wanted = "parameters" if saved["average"] is None else "average"
    device = SingleDeviceSharding(jax.local_devices()[0])
    target = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
        if name == wanted
        else jax.tree.map(lambda _: ocp.PLACEHOLDER, tree)
        for name, tree in saved.items()
    }
    return ocp.load(path, target)[wanted]
