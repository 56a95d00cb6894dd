"""Trial of a folder for a run: in a moment, instead of when hours are to be saved."""

import contextlib
import os

import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from flora_jax.cluster.processes import is_first, wait_for_all
from flora_jax.errors import InputError, StorageError
from flora_jax.io.checkpoint import read_saved_parameters, save_parameters
from flora_jax.io.paths import absolute, is_url


def check_can_hold_a_run(folder: epath.PathLike) -> None:
    """Saves a tiny checkpoint below `folder`, reads it back, and leaves everything as it was.

    All processes call it together. It takes a tenth of a second on a disk, and in a bucket the
    time of its requests.

    Raises:
      InputError: it is in a bucket, with a [ in its name; proposes another.
      StorageError: nothing can be written there, or not read again; says why.
    """
    folder = absolute(folder)
    name = os.fspath(folder)
    if is_url(folder) and "[" in name:  # which Orbax takes for a pattern
        better = name.replace("[", "-")
        raise InputError(f"{name} cannot hold a run, for the [ in its name; try {better}")
    number = int(multihost_utils.broadcast_one_to_all(np.int32(os.getpid())))
    trial, saved = folder / f".trial-{number}", np.arange(3, dtype=np.float32)
    missing = [p for p in (folder, *folder.parents) if not (is_url(folder) or p.exists())]
    try:
        trial.mkdir(parents=True, exist_ok=True)  # where it cannot, Orbax' threads go on waiting
        save_parameters({"value": saved}, trial / "checkpoint")
        if not np.array_equal(read_saved_parameters(trial / "checkpoint")["value"], saved):
            raise StorageError("a checkpoint read back has other values")
        wait_for_all("the folder was tried")
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise StorageError(f"{name} cannot hold a run: {reason}") from error
    finally:
        if is_first():
            with contextlib.suppress(OSError):  # never made, or another run has begun in it
                trial.rmtree()
                for path in missing:
                    os.rmdir(path)
