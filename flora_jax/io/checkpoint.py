"""Orbax checkpoints of a training run: written in the background, verified before they are used.

Orbax reads altered array data without complaint, and takes any folder with a number for a step.
So a step counts only with a manifest of checksums, which is written once the step is complete:

  7000/                the newest step
  6000/                the one before
  manifests/7000.json  checksums of 7000/
  damaged/             steps that failed the check when training went on, each with the reason
"""

import itertools
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from flora_jax.cluster.processes import wait_for_all
from flora_jax.errors import InputError, MissingFileError, StorageError
from flora_jax.io.files import matching, num_bytes, read_json, sha256, write_json
from flora_jax.io.paths import absolute
from flora_jax.io.plain_names import plainly_named

log = logging.getLogger(__name__)

MANIFESTS, DAMAGED = "manifests", "damaged"
Parameters = dict[str, np.ndarray]
_NONE = -1


class Checkpoints:
    """The checkpoints of one run under `directory`/<step>. Use as a context manager.

    All processes of a run call the methods together, and see the same directory.

    Args:
      keep: this many of the newest steps stay, at least 1.
      keep_every: multiples of this step stay too; 0 for none.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2, keep_every: int = 0):
        self._keep, self._keep_every = keep, keep_every
        absolute(directory).mkdir(parents=True, exist_ok=True)
        self._directory = plainly_named(directory)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        if jax.process_index() == 0:
            for half_written in matching(self._directory, "*.orbax-checkpoint-tmp*"):
                half_written.rmtree()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        try:
            self._wait()
        finally:
            self._thread.shutdown()

    def save(self, step: int, state) -> None:
        """Returns once the caller may donate the state; a thread writes and checksums it.

        Raises:
          StorageError: the save before could not be completed. Earlier steps are unharmed.
          ValueError: the step is already there.
        """
        self._wait()
        folder = self._directory / str(step)
        if folder.exists():
            raise ValueError(f"{folder} already exists: restore first, then save later steps")
        # On CPU Orbax writes from the arrays' buffers; elsewhere it copies itself.
        copy = _copied(state) if jax.default_backend() == "cpu" else state
        response = ocp.save_async(folder, copy)
        self._pending = self._thread.submit(self._complete, folder, response)

    def restore(self, state):
        """The newest undamaged state, laid out like `state`; `state` itself when there is none.

        Damaged steps are moved to `directory`/damaged, so that training can save them again.

        Raises:
          InputError: an undamaged step is of another training, or was written where Orbax could
            not write whole ones.
        """
        self._wait()
        newest = np.int32(_NONE)
        if jax.process_index() == 0:  # the others wait for its answer
            folder = _newest_whole(self._directory, self._move_aside)
            if folder is not None:
                newest = np.int32(folder.name)
            elif (damaged := self._directory / DAMAGED).exists():
                log.error("no step left to go on from; the damaged ones are in %s", damaged)
        step = int(multihost_utils.broadcast_one_to_all(newest))
        if step == _NONE:
            return state
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        try:
            return ocp.load(self._directory / str(step), target)
        except ValueError as error:
            raise InputError(
                f"{self._directory / str(step)} is no state of this training: {error}"
            ) from error

    def latest_path(self) -> epath.Path | None:
        """The newest complete step, once the last save has ended. Raises as `save`."""
        self._wait()
        return next(iter(_complete_steps(self._directory)), None)

    def _complete(self, folder: epath.Path, response: ocp.AsyncResponse) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                write_manifest(folder, _manifest(folder))
                self._delete_old()
        except Exception as error:  # a full disk is a ValueError in Orbax
            raise StorageError(f"saving {folder} failed: {error}") from error

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _delete_old(self) -> None:
        for folder in _complete_steps(self._directory)[self._keep :]:
            if not (self._keep_every and int(folder.name) % self._keep_every == 0):
                folder.rmtree()
                _manifest(folder).unlink()

    def _move_aside(self, folder: epath.Path, reason: str) -> None:
        names = (f"{folder.name}-{n}" for n in itertools.count())
        paths = (self._directory / DAMAGED / name for name in names)
        moved = next(path for path in paths if not path.exists())
        log.warning("step %s is damaged and moved to %s: %s", folder.name, moved, reason)
        moved.parent.mkdir(exist_ok=True)
        moved.with_suffix(".txt").write_text(f"{reason}\n")
        _manifest(folder).unlink(missing_ok=True)
        folder.rename(moved)


def save_parameters(parameters: Parameters, folder: epath.PathLike) -> None:
    """Writes parameters alone as one Orbax checkpoint, with its checksums beside it.

    All processes call it together. `read_saved_parameters` reads it. Raises StorageError.
    """
    absolute(folder).parent.mkdir(parents=True, exist_ok=True)
    folder = plainly_named(folder)
    try:
        if jax.process_index() == 0 and folder.exists():
            folder.rmtree()  # of a process that was killed
        ocp.save(folder, parameters)
        if jax.process_index() == 0:
            write_manifest(folder, _manifest(folder))
        wait_for_all(f"{folder} is saved")
    except Exception as error:  # a full disk is a ValueError in Orbax
        raise StorageError(f"saving {folder} failed: {error}") from error


def has_saved_parameters(folder: epath.PathLike) -> bool:
    """True once `save_parameters` has completed this folder."""
    return _manifest(absolute(folder)).exists()


def read_saved_parameters(folder: epath.PathLike) -> Parameters:
    """The parameters of `save_parameters`, on the host. Raises InputError where damaged."""
    folder = plainly_named(folder)
    try:
        verify(folder, _manifest(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is damaged: {error}") from error
    return ocp.load(folder, _on_the_host(ocp.metadata(folder).metadata))


def read_parameters(directory: epath.PathLike) -> Parameters:
    """The parameters of the newest checkpoint (their moving average if kept), on the host.

    A damaged checkpoint is left where it is, and an older one read, with a warning.

    Raises:
      MissingFileError: there is no checkpoint.
      InputError: every checkpoint is damaged.
    """
    directory = plainly_named(directory)
    if not _step_folders(directory):
        raise MissingFileError(f"no checkpoint in {directory}")
    reasons: list[str] = []
    path = _newest_whole(directory, lambda _, reason: reasons.append(reason))
    if path is None:
        raise InputError(f"every checkpoint in {directory} is damaged: {'; '.join(reasons)}")
    if reasons:
        log.warning("read step %s, since newer ones are damaged: %s", path.name, "; ".join(reasons))
    saved = ocp.metadata(path).metadata
    wanted = "parameters" if saved["average"] is None else "average"
    target = jax.tree.map(lambda _: ocp.PLACEHOLDER, dict(saved))
    return ocp.load(path, target | {wanted: _on_the_host(saved[wanted])})[wanted]


@jax.jit
def _copied(tree):
    return jax.tree.map(jnp.copy, tree)


def _on_the_host(tree):
    return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), tree)


def _newest_whole(
    directory: epath.Path, on_damage: Callable[[epath.Path, str], None]
) -> epath.Path | None:
    """The newest step that its manifest verifies; `on_damage` gets the newer ones and why."""
    for folder in _step_folders(directory):
        try:
            verify(folder, _manifest(folder))
        except (OSError, ValueError) as error:
            on_damage(folder, str(error))
        else:
            return folder
    return None


def _step_folders(directory: epath.Path) -> list[epath.Path]:
    """The folders of all steps, the newest first."""
    if not directory.exists():
        return []
    folders = [path for path in directory.iterdir() if path.name.isascii() and path.name.isdigit()]
    return sorted(folders, key=lambda path: int(path.name), reverse=True)


def _complete_steps(directory: epath.Path) -> list[epath.Path]:
    """The steps that have a manifest, the newest first."""
    return [folder for folder in _step_folders(directory) if _manifest(folder).exists()]


def _manifest(folder: epath.Path) -> epath.Path:
    return folder.parent / MANIFESTS / f"{folder.name}.json"


def write_manifest(folder: epath.Path, manifest: epath.Path) -> None:
    """Writes the path, size in bytes and sha256 of every file under `folder` to a JSON file."""
    write_json(manifest, {name: _fingerprint(path) for name, path in _files(folder).items()})


def verify(folder: epath.Path, manifest: epath.Path) -> None:
    """Returns when the files under `folder` are those of its manifest, bit for bit.

    Only files found in the folder are opened, whatever paths a manifest names.

    Raises:
      InputError: they are not; says what is wrong.
    """
    if not manifest.exists():
        raise InputError(f"{manifest} is missing, so writing was not finished")
    recorded, files = read_json(manifest), _files(folder)
    if not recorded or not isinstance(recorded, dict):
        raise InputError(f"{manifest} is not a manifest")
    if differing := sorted(recorded.keys() ^ files.keys()):
        raise InputError(f"only in one of {folder} and {manifest}: {', '.join(differing)}")
    for name, path in files.items():
        if (found := _fingerprint(path)) != recorded[name]:
            raise InputError(f"{path} is altered: {found} instead of {recorded[name]}")


def _fingerprint(path: epath.Path) -> dict:
    return {"bytes": num_bytes(path), "sha256": sha256(path)}


def _files(folder: epath.Path) -> dict[str, epath.Path]:
    """All files by their paths below the folder; on gs://, epath's glob and walk do not serve."""
    files: dict[str, epath.Path] = {}
    for path in folder.iterdir():
        if path.is_dir():
            files |= {f"{path.name}/{name}": file for name, file in _files(path).items()}
        else:
            files[path.name] = path
    return files
