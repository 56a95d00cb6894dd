"""Starts what a user would start: the command line, the benchmarks."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

DATA = pathlib.Path(__file__).parents[1] / "data"
ROOT = pathlib.Path(__file__).parents[2]
STOPPED = 128 + signal.SIGTERM  # exit status of a run that saved because it was told to
TINY_CONFIG = "configs/deit_t.py:improved,runlocal"


def flora_command(workdir: pathlib.Path, *arguments: str, config: str | None = TINY_CONFIG) -> dict:
    """Arguments for subprocess: the command line on a config, as a user starts it."""
    command = [sys.executable, "-m", "flora_jax.main", f"--workdir={workdir}"]
    own = [] if config is None else [f"--config={config}"]
    return {"args": [*command, *own, *arguments], "cwd": ROOT}


def run_flora(
    workdir: pathlib.Path, *arguments: str, config: str | None = TINY_CONFIG
) -> subprocess.CompletedProcess:
    return subprocess.run(
        **flora_command(workdir, *arguments, config=config),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def run_benchmark(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, f"benchmarks/{name}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
