"""Milliseconds of pieces of work that take turns: a busy machine slows all of them alike."""

import os
import platform
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import jax
import numpy as np

WARM_UP = 2  # rounds
Name = TypeVar("Name", bound=Hashable)


def median_ratio(times: np.ndarray, others: np.ndarray) -> float:
    """The median over the rounds, so that what slows a whole round cancels out."""
    return float(np.median(times / others))


def time_in_turn(
    work: Mapping[Name, Callable], rounds: int, pause: float = 0.0, untimed: int = 0
) -> dict[Name, np.ndarray]:
    """Milliseconds of each in every round, float64 [rounds], after two rounds that do not count.

    Before each are `pause` seconds, in which threads of the work before stop spinning, and
    `untimed` calls, after which memory and caches are its own again.
    """
    times: dict[Name, list[float]] = {name: [] for name in work}
    for _ in range(WARM_UP + rounds):
        for name, run in work.items():
            time.sleep(pause)
            for _ in range(untimed):
                run()
            started = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: np.array(all_rounds[WARM_UP:]) for name, all_rounds in times.items()}


def describe_device() -> str:
    device = jax.local_devices()[0].device_kind
    return f"{device}, {platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
