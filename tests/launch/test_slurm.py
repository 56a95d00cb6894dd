"""SLURM jobs, with stand-ins for SLURM's commands."""

import os
import shlex
import subprocess

import pytest

from tests.helpers.launching import ARGUMENTS, LAUNCH, environment, executable, output, wait_until


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
