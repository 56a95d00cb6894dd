"""Several processes on one machine, with a stand-in for the interpreter."""

import re
import shlex
import signal
import subprocess
import time

import pytest

from tests.helpers.commands import is_running
from tests.helpers.launching import (
    ARGUMENTS,
    LAUNCH,
    environment,
    executable,
    launch,
    output,
    wait_until,
)

pytestmark = pytest.mark.processes


class TestLocal:
    def test_dry_run(self):
        lines = output("local.sh", "--dry-run", "2", *ARGUMENTS)
        first, second = (shlex.split(line) for line in lines)
        coordinator = first[4]
        assert re.fullmatch(r"--coordinator=127\.0\.0\.1:2\d{4}", coordinator)
        for number, command in enumerate((first, second)):
            assert command[:4] == ["env", "python", "-m", "flora_jax.main"]
            count = ["--num_processes=2", f"--process_id={number}"]
            assert command[4:] == [coordinator, *count, *ARGUMENTS]

    def test_devices(self):
        cpu = output("local.sh", "--dry-run", "2", DEVICES_PER_PROCESS=4)
        assert all("env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 python" in line for line in cpu)
        gpu = output("local.sh", "--dry-run", "2", CUDA_VISIBLE_DEVICES="4,5,6,7")
        shares = [shlex.split(line)[1] for line in gpu]
        assert shares == ["CUDA_VISIBLE_DEVICES=4,5", "CUDA_VISIBLE_DEVICES=6,7"]
        done = launch("local.sh", "--dry-run", "2", CUDA_VISIBLE_DEVICES="0,1,2")
        assert done.returncode == 2
        assert "3 GPUs cannot be split between 2 processes" in done.stderr

    def test_runs_all(self, tmp_path):
        python = executable(tmp_path / "python", 'echo "$JAX_NUM_CPU_DEVICES" "$@"')
        lines = output("local.sh", "3", "a b", PYTHON=python, DEVICES_PER_PROCESS=2)
        assert all(line.startswith("2 -m flora_jax.main --coord") for line in lines)
        numbers = [re.search(r"--process_id=(\d) a b$", line)[1] for line in lines]
        assert sorted(numbers) == ["0", "1", "2"]

    SLEEPS = 'echo $$ >"$OUT/$BASHPID.new"\nmv "$OUT/$BASHPID.new" "$OUT/$BASHPID"\nsleep 60'

    def test_all_stop_when_one_fails(self, tmp_path):
        fails = 'case "$*" in *--process_id=1*) sleep 0.3; exit 7 ;; esac\n'
        python = executable(tmp_path / "bin/python", fails + self.SLEEPS)
        out = tmp_path / "out"
        out.mkdir()
        start = time.monotonic()
        done = launch("local.sh", "3", PYTHON=python, OUT=out)
        assert done.returncode == 7
        assert time.monotonic() - start < 20
        assert not any(is_running(int(path.name)) for path in out.iterdir())

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal_stops_all(self, tmp_path, number):
        python = executable(tmp_path / "bin/python", self.SLEEPS)
        out = tmp_path / "out"
        out.mkdir()
        with subprocess.Popen(
            ["env", "--default-signal=INT", LAUNCH / "local.sh", "2"],
            env=environment(PYTHON=python, OUT=out),
        ) as process:
            wait_until(lambda: len([p for p in out.iterdir() if not p.suffix]) == 2)
            process.send_signal(number)
            assert process.wait(timeout=20) == 130
        assert not any(is_running(int(path.name)) for path in out.iterdir())
