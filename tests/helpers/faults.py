"""Runs that are sent a signal, and what a run is held to after a fault."""

import pathlib
import subprocess
import threading
import time

from safetensors.numpy import load_file

import flora_jax as flora
from flora_jax.models import functional
from tests.helpers.commands import flora_command
from tests.helpers.training import metrics_of

OFTEN = tuple(
    f"--config.{stage}.checkpoint_every=20"
    for stage in ("pretrain", "filter.train", "supernet", "finetune")
)


def end_of(process: subprocess.Popen, condition, send) -> tuple[int, str, float]:
    """Sends a signal once the condition holds: exit status, stderr, seconds until the end."""
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    deadline = time.monotonic() + 400
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    send()
    sent = time.monotonic()
    status = process.wait(timeout=100)
    seconds = time.monotonic() - sent
    reader.join()
    return status, errors[0], seconds


def send_when(condition, signal_number: int, workdir: pathlib.Path) -> tuple[int, str]:
    """Starts the command, and sends the signal once the condition holds: exit status, stderr."""
    with subprocess.Popen(
        **flora_command(workdir, *OFTEN), stderr=subprocess.PIPE, text=True
    ) as process:
        status, errors, seconds = end_of(
            process, condition, lambda: process.send_signal(signal_number)
        )
    assert seconds < 60
    return status, errors


def assert_same_run(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """Bit for bit."""
    for file in ("filter/space.json", "search/history.jsonl", "result.json"):
        assert (workdir / file).read_bytes() == (other / file).read_bytes(), file
    for stage in ("pretrain", "supernet", "finetune/subnet"):
        assert metrics_of(workdir / stage) == metrics_of(other / stage)
    pairs = [
        tuple(load_file(run / name / "model.safetensors") for run in (workdir, other))
        for name in ("dense", "subnet", "uniform")
    ]
    pairs.append(
        tuple(functional.split(flora.load(run / "supernet").network)[1] for run in (workdir, other))
    )
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        assert all((ours[name] == theirs[name]).all() for name in ours)
