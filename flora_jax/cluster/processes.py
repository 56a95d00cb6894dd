"""One run in several processes: how they find one another, who writes, and when they stop."""

import functools
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import ParamSpec

import jax
from jax.experimental import multihost_utils

from flora_jax.errors import InputError, RunError

P = ParamSpec("P")
STOPPED = 128 + signal.SIGTERM  # exit status of a run that saved and ended because it was told to
_HEARTBEAT_SECONDS = 30  # after which a process that is gone ends the others


class Stopped(Exception):  # not an error
    """The run was told to end, and has saved where it is."""


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of several; without arguments, JAX asks the TPU, SLURM or Kubernetes.

    Raises:
      InputError: some of the arguments are given and others not.
      RunError: the processes do not find one another.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise InputError("coordinator, num_processes and process_id come together")
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes did not find one another: {error}") from error


def is_first() -> bool:
    """Whether this process is the one that writes, or the only one there is."""
    return jax.process_index() == 0


def by_the_first(write: Callable[P, None]) -> Callable[P, None]:
    """Makes a function that all processes call: the first does the work, the others wait for it.

    The name of such a function ends in `_once`.
    """

    @functools.wraps(write)
    def write_once(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_first():
            write(*args, **kwargs)
        wait_for_all(write.__qualname__)

    return write_once


def wait_for_all(what: str) -> None:
    """Returns when every process has come here."""
    multihost_utils.sync_global_devices(what)


def exit_at_once(status: int) -> None:
    """Exits without waiting for other processes, which Python's own exit would do."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class StopRequest:
    """Whether this run has been told to end: SIGTERM, or notice that its machines are taken away.

    While it is open, SIGTERM does not end the process. All processes get the same answer.
    """

    _calls = itertools.count()  # of the protocol by which processes agree on a step

    def __enter__(self) -> "StopRequest":
        self._received = threading.Event()
        self._previous = None
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and jax.process_count() == 1:  # otherwise JAX listens
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._received.set())
        return self

    def __exit__(self, *exception) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def is_set(self) -> bool:
        """Whether the run was told to end; all processes must ask equally often."""
        if jax.process_count() == 1:
            return self._received.is_set()
        return multihost_utils.reached_preemption_sync_point(next(self._calls))
