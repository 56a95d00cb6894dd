"""Milliseconds of pieces of work that take turns: a busy machine slows all of them alike."""

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import jax
import numpy as np

WARM_UP = 2  # rounds
_QUIET = 0.1  # of the cores, that other programs may keep busy
_LEAST = 3  # rounds, however long they take
Name = TypeVar("Name", bound=Hashable)


def median_ratio(times: np.ndarray, others: np.ndarray) -> float:
    """The median over the rounds, so that what slows a whole round cancels out."""
    return float(np.median(times / others))


def time_in_turn(
    work: Mapping[Name, Callable],
    rounds: int,
    pause: float = 0.0,
    untimed: int = 0,
    *,
    warm_up: int = WARM_UP,
    seconds: float = math.inf,
) -> dict[Name, np.ndarray]:
    """Milliseconds of each in every round, float64 [rounds], after two rounds that do not count.

    Before each are `pause` seconds, in which threads of the work before stop spinning, and
    `untimed` calls, after which memory and caches are its own again.

    Args:
      warm_up: rounds that do not count.
      seconds: after which no further round begins, once there are three that count.
    """
    times: dict[Name, list[float]] = {name: [] for name in work}
    begun = time.perf_counter()
    for done in range(warm_up + rounds):
        if done >= warm_up + _LEAST and time.perf_counter() - begun > seconds:
            break
        for name, run in work.items():
            time.sleep(pause)
            for _ in range(untimed):
                run()
            started = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: np.array(all_rounds[warm_up:]) for name, all_rounds in times.items()}


def other_work() -> Callable[[], float]:
    """Begins to watch; what it returns says how many cores other programs have kept busy since.

    0.0 where the system does not say: Linux does.
    """
    started, before = time.perf_counter(), _cpu_seconds_of_others()

    def since() -> float:
        busy, seconds = _cpu_seconds_of_others() - before, time.perf_counter() - started
        return max(busy / seconds, 0.0) if seconds > 0 else 0.0

    return since


def busy_elsewhere(cores: float) -> str:
    """What `other_work` found in words, "" where it is hardly any."""
    total = os.cpu_count() or 1
    if cores <= _QUIET * total:
        return ""
    return f"other programs keep {cores:.1f} of {total} cores busy"


def _cpu_seconds_of_others() -> float:
    with contextlib.suppress(OSError), open("/proc/stat") as file:
        user, nice, system, _, _, *interrupts = map(int, file.readline().split()[1:8])
        own = sum(os.times()[:2])
        return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - own
    return 0.0


def describe_device() -> str:
    """The first device and what it is in; a CPU by its name where Linux says it."""
    device = jax.local_devices()[0].device_kind
    if device == "cpu":
        device = _cpu_name() or device
    return f"{device}, {platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        lines = (line.partition(":") for line in file)
        return next((value.strip() for key, _, value in lines if key.strip() == "model name"), "")
    return ""
