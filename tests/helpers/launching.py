"""Runs the launch scripts, with stand-ins for the commands they call."""

import os
import pathlib
import subprocess
import time

from tests.helpers.commands import ROOT

LAUNCH = ROOT / "launch"
SLICE = ["--name=pod", "--project=p", "--zone=z"]
ARGUMENTS = ["--config=configs/deit_b.py", "--config.data.name=folder:/my pictures/it's"]


def executable(path: pathlib.Path, body: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{body}")
    path.chmod(0o755)
    return path


def environment(**variables) -> dict[str, str]:
    """Ours, without what the scripts read, and without GPUs."""
    ours = ("TPU_", "SLURM_", "DEVICES_PER_PROCESS", "PYTHON", "CUDA_VISIBLE_DEVICES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", **{k: str(v) for k, v in variables.items()}}


def launch(script, *arguments, **variables) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def output(script, *arguments, **variables) -> list[str]:
    done = launch(script, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
