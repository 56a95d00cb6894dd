"""The launch scripts, with stand-ins for gcloud, SLURM and the interpreter."""

import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest
import yaml

from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = ["local.sh", "slurm.sbatch", "tpu_pod.sh", "tpu_worker.sh"]
SLICE = ["--name=pod", "--project=p", "--zone=z"]
ARGUMENTS = ["--config=configs/deit_b.py", "--config.data.name=folder:/my pictures/it's"]
ON_SLICE = "--project=p --zone=z --quiet"

GCLOUD = """\
shift 2
echo "$2" >>"$FAKE/calls"
export HOME="$FAKE/home"
cd "$HOME"
case "$1 $2" in
"queued-resources describe")
  request=$(head -n 1 "$FAKE/requests")
  if [[ $(wc -l <"$FAKE/requests") -gt 1 ]]; then sed -i 1d "$FAKE/requests"; fi
  if [[ $request == ABSENT ]]; then echo "NOT_FOUND: no such resource" >&2; exit 1; fi
  echo "$request" ;;
"queued-resources delete") if [[ -e flora ]]; then flock flora/run.lock rm -r flora; fi ;;
"tpu-vm describe") echo READY ;;
"tpu-vm scp") cp "$3" "${4#*:}" ;;
"tpu-vm ssh")
  for argument; do [[ $argument != --command=* ]] || bash -c "${argument#*=}"; done ;;
esac
"""
UV = """\
if [[ $1 == venv ]]; then mkdir -p .venv/bin && cp "$FAKE/python" .venv/bin/python; fi
"""


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


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash_and_explain_themselves(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    assert "flora_jax.main" in "\n".join(output(script, "--help"))


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", *SCRIPTS], cwd=LAUNCH, check=True)


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("tpu_pod.sh", ["launch", *SLICE], "unknown verb launch; accepted: create, push"),
        ("tpu_pod.sh", ["create", "--name=pod", "--zone=z"], "--project is missing"),
        ("tpu_pod.sh", ["create", *SLICE], "--type is missing; give it, or set TPU_TYPE"),
        ("tpu_pod.sh", ["create", *SLICE, "--type=v9-8"], "give --runtime=VERSION"),
        ("tpu_pod.sh", ["run", *SLICE, "--workdir=gs://b/f"], "come after --"),
        ("tpu_pod.sh", ["run", *SLICE, "--", *ARGUMENTS], "a folder that all workers see"),
        ("tpu_pod.sh", ["run", *SLICE, "--", "--workdir=runs/a"], "accepted: gs://"),
        ("tpu_worker.sh", ["launch"], "unknown verb 'launch'; accepted:"),
        ("slurm.sbatch", ["--workdir=/shared/run"], "not inside a SLURM job"),
        ("slurm.sbatch", ARGUMENTS, "--workdir=DIR is missing"),
        ("local.sh", ["--workdir=run"], "the number of processes comes first"),
        ("local.sh", ["0", "--workdir=run"], "1 or more, not '0'"),
    ],
)
def test_wrong_arguments(script, arguments, message):
    done = launch(script, *arguments, *(["--dry-run"] if arguments[0] == "create" else []))
    assert done.returncode == 2
    assert message in done.stderr


class TestPod:
    @pytest.mark.parametrize(
        "accelerator, options, expected",
        [
            ("v5litepod-16", [], "--runtime-version=v2-alpha-tpuv5-lite"),
            ("v5p-32", ["--spot"], "--runtime-version=v2-alpha-tpuv5 --spot"),
            ("v6e-16", [], "--runtime-version=v2-alpha-tpuv6e"),
            ("v4-32", [], "--runtime-version=tpu-ubuntu2204-base"),
            ("v9-8", ["--runtime=new"], "--runtime-version=new"),
        ],
    )
    def test_create(self, accelerator, options, expected):
        arguments = [*SLICE, f"--type={accelerator}", *options]
        assert output("tpu_pod.sh", "create", "--dry-run", *arguments) == [
            "gcloud compute tpus queued-resources create pod --node-id=pod "
            f"--accelerator-type={accelerator} {expected} {ON_SLICE}"
        ]

    def test_options_from_the_environment(self):
        given = {"TPU_NAME": "pod", "TPU_PROJECT": "p", "TPU_ZONE": "z", "TPU_TYPE": "v6e-8"}
        options = [*SLICE, "--type=v6e-8", "--spot"]
        from_options = output("tpu_pod.sh", "create", "--dry-run", *options)
        assert output("tpu_pod.sh", "create", "--dry-run", **given, TPU_SPOT=1) == from_options

    def test_push_logs_and_stop(self, tmp_path):
        assert output("tpu_pod.sh", "push", "--dry-run", *SLICE, TMPDIR=tmp_path) == [
            f"git -C {ROOT} archive --prefix=flora/src/ --output={tmp_path}/flora-pod.tar.gz HEAD",
            f"gcloud compute tpus tpu-vm scp {tmp_path}/flora-pod.tar.gz pod:flora.tar.gz "
            f"--worker=all {ON_SLICE}",
            "gcloud compute tpus tpu-vm ssh pod --worker=all "
            "'--command=rm -rf flora/src && tar -xzf flora.tar.gz && "
            f"bash flora/src/launch/tpu_worker.sh install' {ON_SLICE}",
            f"rm {tmp_path}/flora-pod.tar.gz",
        ]
        assert output("tpu_pod.sh", "logs", "--dry-run", *SLICE) == [
            "gcloud compute tpus tpu-vm ssh pod --worker=0 "
            f"'--command=tail -n 100 -F flora/run.log' {ON_SLICE}"
        ]
        assert output("tpu_pod.sh", "stop", "--dry-run", *SLICE) == [
            "gcloud compute tpus tpu-vm ssh pod --worker=all "
            f"'--command=bash flora/src/launch/tpu_worker.sh stop' {ON_SLICE}",
            f"gcloud compute tpus queued-resources delete pod --force {ON_SLICE}",
        ]

    def test_arguments_survive_both_shells(self):
        arguments = [*ARGUMENTS, "--workdir=gs://b/f"]
        (line,) = output("tpu_pod.sh", "run", "--dry-run", *SLICE, "--", *arguments)
        *_, worker, command, _, _, _ = shlex.split(line)
        assert worker == "--worker=all"
        remote = shlex.split(command.removeprefix("--command="))
        assert remote == ["bash", "flora/src/launch/tpu_worker.sh", "start", *arguments]

    def test_keep_tells_its_rounds(self):
        options = [*SLICE, "--type=v6e-8", "--poll=5"]
        lines = output("tpu_pod.sh", "keep", "--dry-run", *options, "--", "--workdir=gs://b/f")
        assert [line for line in lines if line.startswith("#")] == [
            "# every 5 s",
            "# where there is no slice",
            "# where nothing runs on it",
            "# where it was taken away",
        ]

    @pytest.fixture
    def pod(self, tmp_path):
        """A function: verb, arguments -> the process; the slice is a folder of this machine."""
        executable(tmp_path / "bin/gcloud", GCLOUD)
        executable(tmp_path / "bin/python3", "")
        executable(tmp_path / "home/.local/bin/uv", UV)
        repository = tmp_path / "repository"
        shutil.copytree(LAUNCH, repository / "launch")
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", repository]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "All"]):
            subprocess.run([*git, *command], check=True)

        def run(verb, *arguments) -> subprocess.CompletedProcess:
            options = [*SLICE, "--type=v6e-8", "--poll=0.2", "--", *arguments]
            return subprocess.run(
                [repository / "launch/tpu_pod.sh", verb, *options],
                env=environment(FAKE=tmp_path, PATH=f"{tmp_path}/bin:{os.environ['PATH']}"),
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )

        return run

    @staticmethod
    def actions(tmp_path) -> list[str]:
        calls = (tmp_path / "calls").read_text().split()
        return [call for call in calls if call != "describe"]

    def test_keep_starts_again_on_another_slice(self, pod, tmp_path):
        states = ["ABSENT", "ABSENT", "PROVISIONING", "ACTIVE", "SUSPENDED", "ABSENT", "ACTIVE"]
        (tmp_path / "requests").write_text("".join(f"{state}\n" for state in states))
        executable(tmp_path / "python", 'printf "%s\\n" "$@" >>"$FAKE/ran"\n')
        done = pod("keep", *ARGUMENTS, "--workdir=gs://b/f")
        assert done.returncode == 0, done.stderr
        assert "the slice is SUSPENDED" in done.stderr
        # ssh: has a run been started; install; start.
        start = ["create", "ssh", "scp", "ssh", "ssh"]
        calls = self.actions(tmp_path)
        assert calls[:11] == [*start, "delete", *start]
        assert set(calls[11:]) == {"ssh"}
        command = ["-m", "flora_jax.main", "--distributed", *ARGUMENTS, "--workdir=gs://b/f"]
        assert (tmp_path / "ran").read_text().splitlines() == command * 2

    def test_keep_ends_with_a_run_that_fails(self, pod, tmp_path):
        (tmp_path / "requests").write_text("ACTIVE\n")
        executable(tmp_path / "python", "exit 3")
        failed = pod("keep", "--workdir=gs://b/f")
        assert failed.returncode == 1
        assert "the run failed with status 3" in failed.stderr
        assert "delete" not in self.actions(tmp_path)
        executable(tmp_path / "python", 'echo mended >"$FAKE/ran"')
        mended = pod("keep", "--workdir=gs://b/f")
        assert mended.returncode == 0, mended.stderr
        assert (tmp_path / "ran").exists()

    def test_keep_starts_a_run_again_that_was_told_to_end(self, pod, tmp_path):
        (tmp_path / "requests").write_text("ACTIVE\n")
        saves_once = 'test -e "$FAKE/told" || { touch "$FAKE/told"; exit 143; }'
        executable(tmp_path / "python", saves_once)
        done = pod("keep", "--workdir=gs://b/f")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "told").exists()

    def test_stop_lets_the_run_save(self, pod, tmp_path):
        save = f'trap "touch {tmp_path}/saved; exit" TERM\ntouch {tmp_path}/started\n'
        executable(tmp_path / "python", save + "while true; do sleep 0.05; done")
        for verb, *arguments in (["push"], ["run", "--workdir=gs://b/f"]):
            done = pod(verb, *arguments)
            assert done.returncode == 0, done.stderr
        wait_until((tmp_path / "started").exists)
        twice = pod("run", "--workdir=gs://b/f")
        assert twice.returncode == 1
        assert "a run is going on this worker" in twice.stderr
        assert pod("stop").returncode == 0
        assert (tmp_path / "saved").exists()
        assert self.actions(tmp_path)[-2:] == ["ssh", "delete"]


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
        assert not any(alive(int(path.name)) for path in out.iterdir())

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
        assert not any(alive(int(path.name)) for path in out.iterdir())


def test_jobset_is_consistent():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    spec = jobset["spec"]
    assert spec["network"]["subdomain"] == jobset["metadata"]["name"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    (job,) = (replicated["template"]["spec"] for replicated in spec["replicatedJobs"])
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    machines = math.prod(map(int, topology.split("x"))) // chips
    assert job["parallelism"] == job["completions"] == machines
    assert container["command"][:4] == ["python", "-m", "flora_jax.main", "--distributed"]
