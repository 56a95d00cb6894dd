"""TPU slices, with stand-ins for gcloud and the interpreter."""

import os
import shlex
import shutil
import subprocess

import pytest

from tests.helpers.launching import (
    ARGUMENTS,
    LAUNCH,
    SLICE,
    environment,
    executable,
    output,
    wait_until,
)

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

    def test_logs(self):
        assert output("tpu_pod.sh", "logs", "--dry-run", *SLICE) == [
            "gcloud compute tpus tpu-vm ssh pod --worker=0 "
            f"'--command=tail -n 100 -F flora/run.log' {ON_SLICE}"
        ]

    def test_arguments_survive_both_shells(self):
        arguments = [*ARGUMENTS, "--workdir=gs://b/f"]
        (line,) = output("tpu_pod.sh", "run", "--dry-run", *SLICE, "--", *arguments)
        *_, worker, command, _, _, _ = shlex.split(line)
        assert worker == "--worker=all"
        remote = shlex.split(command.removeprefix("--command="))
        assert remote == ["bash", "flora/src/launch/tpu_worker.sh", "start", *arguments]

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
