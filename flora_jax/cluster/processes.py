"""One run in several processes: how they find one another, who writes, and when they stop."""

import functools
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec

import jax
import numpy as np
from jax.experimental import multihost_utils

from flora_jax.errors import RunError

P = ParamSpec("P")
_HEARTBEAT_SECONDS = 30  # after which a process that is gone ends the others


class Stopped(Exception):  # not an error
    """The run was told to end, and has saved where it is.

    Args:
      signal_number: what told it: SIGTERM, or SIGINT, which Ctrl-C sends.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGTERM):
        super().__init__(message)
        self.exit_status = 128 + signal_number


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of several; without arguments, JAX asks the TPU, SLURM or Kubernetes.

    Raises RunError where the processes do not find one another, or some arguments are missing.
    """
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes did not find one another: {error}") from error


def is_first() -> bool:
    """True for the process that writes, or for the only one there is."""
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


def true_in_all(flags: np.ndarray) -> np.ndarray:
    """The flags bool [n] that are true in every process; all get the same, and must all ask."""
    if jax.process_count() == 1:
        return flags
    return np.logical_and.reduce(multihost_utils.process_allgather(flags))


def exit_at_once(status: int) -> None:
    """Exits without waiting for other processes, which Python's own exit would do."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class StopRequest:
    """Request that a run ends: SIGTERM, Ctrl-C, or notice that machines will go.

    While it is open, neither ends the process; a second Ctrl-C is answered as if it were not. All
    processes get the same answer.
    """

    _calls = itertools.count()  # of the protocol by which processes agree on a step

    def __enter__(self) -> "StopRequest":
        self._received: int | None = None
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
            if jax.process_count() == 1:  # otherwise JAX listens
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_terminate)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def is_set(self) -> bool:
        """True once the run was told to end; all processes must ask equally often."""
        if jax.process_count() == 1:
            return self._received is not None
        return multihost_utils.reached_preemption_sync_point(next(self._calls))

    def stopped(self, message: str) -> Stopped:
        """The exception to raise once all is saved; `message` says where the run is."""
        return Stopped(message, self._received or signal.SIGTERM)

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            self._previous[number](number, frame)
            return
        self._received = number
        print("saving; Ctrl-C again ends at once", file=sys.stderr, flush=True)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the other processes


class Timer:
    """Says every so many seconds that it is time; all processes get the first one's answer.

    Args:
      seconds: 0 for never.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._seconds, self._clock = seconds, clock
        self._next = clock() + seconds

    def is_due(self) -> bool:
        """True when the time has come since it last had; all processes must ask equally often."""
        if not self._seconds:
            return False
        due = self._clock() >= self._next
        if jax.process_count() > 1:
            due = bool(multihost_utils.broadcast_one_to_all(np.bool_(due)))
        if due:
            self._next = self._clock() + self._seconds
        return due
