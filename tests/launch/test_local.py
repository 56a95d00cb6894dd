"""Processes on one machine and SLURM jobs, with stand-ins for the interpreter and SLURM."""

import os
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


@pytest.mark.processes
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

    @pytest.fixture
    def out(self, tmp_path):
        """A folder with a file for each process, named like it."""
        (tmp_path / "out").mkdir()
        return tmp_path / "out"

    def test_all_stop_when_one_fails(self, tmp_path, out):
        fails = 'case "$*" in *--process_id=1*) sleep 0.3; exit 7 ;; esac\n'
        python = executable(tmp_path / "bin/python", fails + self.SLEEPS)
        start = time.monotonic()
        done = launch("local.sh", "3", PYTHON=python, OUT=out)
        assert done.returncode == 7
        assert time.monotonic() - start < 20
        assert not any(is_running(int(path.name)) for path in out.iterdir())

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal_stops_all(self, tmp_path, out, number):
        python = executable(tmp_path / "bin/python", self.SLEEPS)
        with subprocess.Popen(
            ["env", "--default-signal=INT", LAUNCH / "local.sh", "2"],
            env=environment(PYTHON=python, OUT=out),
        ) as process:
            wait_until(lambda: len([p for p in out.iterdir() if not p.suffix]) == 2)
            process.send_signal(number)
            assert process.wait(timeout=20) == 130
        assert not any(is_running(int(path.name)) for path in out.iterdir())


class TestSlurm:
    def test_dry_run(self):
        arguments = ["--workdir=/shared/run", *ARGUMENTS]
        (line,) = output("slurm.sbatch", "--dry-run", *arguments)
        command = "srun --kill-on-bad-exit=1 .venv/bin/python -m flora_jax.main --distributed"
        assert shlex.split(line) == [*command.split(), *arguments]

    @pytest.fixture
    def job(self, tmp_path):
        """A function: body of the task -> the job's process, with SLURM's commands."""
        executable(tmp_path / "bin/scontrol", f'echo "$0 $*" >>{tmp_path}/calls')
        executable(
            tmp_path / "bin/scancel", f'echo "$0 $*" >>{tmp_path}/calls\nkill $(<{tmp_path}/task)'
        )

        def start(task: str) -> subprocess.Popen:
            executable(tmp_path / "bin/srun", task)
            path = f"{tmp_path}/bin:{os.environ['PATH']}"
            return subprocess.Popen(
                ["bash", LAUNCH / "slurm.sbatch", "--workdir=/shared/run"],
                env=environment(SLURM_JOB_ID=7, PATH=path),
            )

        return start

    def test_exit_status_is_the_run_s(self, job, tmp_path):
        assert job("exit 5").wait(timeout=30) == 5
        assert not (tmp_path / "calls").exists()

    def test_preempted_job_saves_and_is_queued_again(self, job, tmp_path):
        save = f"trap 'sleep 0.3; echo saved >>{tmp_path}/calls; exit' TERM\n"
        started = f"echo $$ >{tmp_path}/task.new\nmv {tmp_path}/task.new {tmp_path}/task\n"
        with job(save + started + "while true; do sleep 0.05; done") as process:
            wait_until((tmp_path / "task").exists)
            process.terminate()
            process.wait(timeout=30)
        assert (tmp_path / "calls").read_text().splitlines() == [
            f"{tmp_path}/bin/scancel --signal=TERM 7",
            "saved",
            f"{tmp_path}/bin/scontrol requeue 7",
        ]
