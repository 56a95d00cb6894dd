"""What the benchmarks share: sizes, the machine, rounds of paired timings, the JSON file."""

import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

import jax

SIZES = {"deit_t": "tiny", "deit_s": "small", "deit_b": "base"}


_PAUSE = 0.3  # seconds, in which the threads of the work before stop spinning


def describe_machine(*facts: str) -> str:
    device = jax.devices()[0].device_kind
    machine = f"{device}, {platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    return ", ".join((machine, *facts))


def time_in_turn(
    work: dict[str, Callable[[int], object]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of every piece of work in every round, in turn, after rounds that do not count.

    Each is called with the number of the round, and must wait for its own result.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for index in range(-warm_up, rounds):
        for name, run in work.items():
            time.sleep(_PAUSE)
            started = time.perf_counter()
            run(index)
            if index >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def median_ratio(times: list[float], others: list[float]) -> float:
    """The median over the rounds, so that what slows a whole round cancels out."""
    return statistics.median(own / other for own, other in zip(times, others, strict=True))


def write_json(path: pathlib.Path | None, machine: str, ratios: dict[str, float]) -> None:
    if path:
        path.write_text(json.dumps({"machine": machine, "ratios": ratios}, indent=1) + "\n")
