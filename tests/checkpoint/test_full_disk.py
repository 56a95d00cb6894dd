"""Saving where no more can be written."""

import functools
import resource
import shutil
import signal
import subprocess

import jax
import jax.numpy as jnp
import pytest

from flora_jax.io.checkpoint import Checkpoints
from flora_jax.training.step import TrainState
from tests.helpers.checkpoints import program, restored_step, state_at
from tests.helpers.commands import ROOT

_program = functools.partial(program, __name__)
pytestmark = pytest.mark.slow


def save_until_full(directory: str):
    """The program of a process whose files may not grow, or whose disk is small."""
    random = TrainState(jnp.int32(9), {"w": jax.random.normal(jax.random.key(0), 2**19)}, {}, None)
    try:
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(3, state_at(3))
            checkpoints.save(9, random)
    except OSError as error:
        print(error)
    print(restored_step(directory))


def limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))


def _output(*command: str) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    return subprocess.run(command, cwd=ROOT, **options)


def _check(done: subprocess.CompletedProcess, folder, reason: str):
    error, step = done.stdout.splitlines()
    assert error.startswith(f"saving {folder}/9 failed: ")
    assert reason in error
    assert step == "3"


def test_a_file_that_may_not_grow(tmp_path):
    done = _output(*_program("limit_file_size()", f"save_until_full({str(tmp_path)!r})"))
    _check(done, tmp_path, "File too large")


def test_a_full_disk(tmp_path):
    namespace = ["unshare", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or _output(*namespace, *mount).returncode:
        pytest.skip("this system does not let a process mount a small disk of its own")
    script = 'limit=$1; shift; mount -t tmpfs -o size=1m tmpfs "$limit" && exec "$@"'
    program = _program(f"save_until_full({str(tmp_path)!r})")
    done = _output(*namespace, "sh", "-c", script, "sh", str(tmp_path), *program)
    _check(done, tmp_path, "No space left on device")
