"""A run that something terrible happened to ends as one that nothing happened to.

`make faults` runs all of this; `make test` what is not marked `faults`.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from flora_jax.errors import RunError
from flora_jax.methods import start
from tests.helpers.commands import ROOT, STOPPED, TINY_CONFIG, run_flora
from tests.helpers.faults import OFTEN, assert_same_run, end_of, send_when
from tests.helpers.files import flip_a_bit, largest_file
from tests.helpers.runs import tiny_config

pytestmark = pytest.mark.slow


def has_saved(workdir: pathlib.Path, stage: str, step: int):
    return lambda: (workdir / stage / f"checkpoints/manifests/{step}.json").exists()


def has_generations(workdir: pathlib.Path, count: int):
    history = workdir / "search/history.jsonl"
    return lambda: history.exists() and history.read_bytes().count(b"\n") > count


def has_done(workdir: pathlib.Path, stage: str):
    return lambda: "seconds" in json.loads((workdir / "stages.json").read_text()).get(stage, {})


def after(seconds: float):
    moment = time.monotonic() + seconds
    return lambda: time.monotonic() > moment


def finish_and_compare(workdir: pathlib.Path, finished_run: pathlib.Path) -> str:
    done = run_flora(workdir, *OFTEN)
    assert done.returncode == 0, done.stderr
    assert_same_run(workdir, finished_run)
    return done.stderr


def newest_step(workdir: pathlib.Path) -> pathlib.Path:
    checkpoints = workdir / "supernet/checkpoints"
    return checkpoints / str(max(int(p.stem) for p in (checkpoints / "manifests").glob("*.json")))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that was killed while it trained the supernet."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    status, _ = send_when(has_saved(workdir, "supernet", 60), signal.SIGKILL, workdir)
    assert status == -signal.SIGKILL
    return workdir


def flip_one_bit(workdir):
    flip_a_bit(largest_file(newest_step(workdir)))


def truncate(workdir):
    file = largest_file(newest_step(workdir))
    os.truncate(file, file.stat().st_size // 2)


def leave_an_empty_step(workdir):
    (workdir / "supernet/checkpoints/100000").mkdir()


def leave_half_a_step(workdir):
    newest = newest_step(workdir)
    half = newest.with_name(f"{int(newest.name) + 20}")
    shutil.copytree(newest, half)
    largest_file(half).unlink()


def jump_the_clock(workdir):
    for index, path in enumerate(sorted(workdir.rglob("*"))):
        os.utime(path, (0, 0) if index % 2 else (4_000_000_000, 4_000_000_000))


def leave_a_lock(workdir):
    (workdir / "run.lock").write_text("process 1 on a machine that is no more\n")


DAMAGES = (flip_one_bit, truncate, leave_an_empty_step, leave_half_a_step, jump_the_clock)
DAMAGES += (leave_a_lock,)


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage(damage, killed, finished_run, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    damage(tmp_path / "run")
    finish_and_compare(tmp_path / "run", finished_run)


def test_all_damages_at_once_and_ctrl_c(killed, finished_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(killed, workdir)
    damaged = newest_step(workdir).name
    for damage in DAMAGES:
        damage(workdir)
    status, errors = send_when(has_generations(workdir, 1), signal.SIGINT, workdir)
    assert f"step {damaged}" in errors
    assert "damaged" in errors
    assert status == 128 + signal.SIGINT, errors
    assert "stopped: search is saved at generation" in errors
    with (workdir / "search/history.jsonl").open("a") as history:
        history.write('{"generation": 1, "genes": [[0, ')
    finish_and_compare(workdir, finished_run)


def test_a_second_run_is_refused(finished_run):
    with pytest.raises(RunError, match=f"{finished_run} is in use by another run"):
        start.run(tiny_config(), finished_run)


def test_a_run_that_is_told_to_end_saves_the_step(killed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(killed, workdir)
    step = int(newest_step(workdir).name)
    newer = has_saved(workdir, "supernet", step + 20)
    status, errors = send_when(newer, signal.SIGTERM, workdir)
    assert status == STOPPED, errors
    saved = int(newest_step(workdir).name)
    assert saved > step
    assert f"stopped: supernet is saved at step {saved} of" in errors
    assert "Traceback" not in errors


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(seed, finished_run, tmp_path):
    """Twenty in all, five to a run, anywhere from its first second to its last stage."""
    rng = random.Random(seed)
    for _ in range(5):
        status, errors = send_when(after(rng.uniform(2, 14)), signal.SIGKILL, tmp_path / "run")
        assert status in (-signal.SIGKILL, 0), errors
    finish_and_compare(tmp_path / "run", finished_run)


@pytest.mark.faults
@pytest.mark.parametrize("spare", [100_000, 400_000])
def test_a_full_disk(spare, killed, finished_run, tmp_path):
    """A file system of the size that the run has already, and some bytes to spare."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(p.stat().st_size for p in killed.rglob("*") if p.is_file())
    blocks = 4096 * sum(1 for _ in killed.rglob("*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size + blocks + spare}", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        workdir = disk / "run"
        shutil.copytree(killed, workdir)
        full = run_flora(workdir, *OFTEN)
        assert full.returncode == 1
        assert "No space left" in full.stderr
        assert "Traceback" not in full.stderr
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        finish_and_compare(workdir, finished_run)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def run_in_two(workdir: pathlib.Path) -> subprocess.Popen:
    command = ["bash", "launch/local.sh", "2", f"--config={TINY_CONFIG}", f"--workdir={workdir}"]
    return subprocess.Popen(
        [*command, *OFTEN],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "DEVICES_PER_PROCESS": "2"},
        stderr=subprocess.PIPE,
        text=True,
    )


def signal_the_second_when(condition, name: str, workdir: pathlib.Path) -> tuple[int, str, float]:
    """Starts the two, and sends one the signal: as `end_of` for both."""
    command = ["pkill", f"-{name}", "-f", f"process_id=1.*{workdir}"]
    with run_in_two(workdir) as both:
        return end_of(both, condition, lambda: subprocess.run(command, check=True))


@pytest.mark.faults
def test_one_of_two_processes_is_killed_and_later_told_to_end(finished_run, tmp_path):
    """A whole run of two processes with two devices each, which is the run of one."""
    workdir = tmp_path / "run"
    saved = has_saved(workdir, "supernet", 40)
    status, errors, seconds = signal_the_second_when(saved, "KILL", workdir)
    assert status not in (0, STOPPED), errors
    assert seconds < 60
    # JAX tells all processes of the signal after a second or two, while they search.
    trained = has_done(workdir, "supernet")
    status, errors, _ = signal_the_second_when(trained, "TERM", workdir)
    assert status == STOPPED, errors
    assert "stopped: search is saved at generation" in errors
    with run_in_two(workdir) as both:
        _, errors = both.communicate(timeout=600)
    assert both.returncode == 0, errors
    for name in ("dense", "subnet", "uniform"):
        ours, theirs = (
            json.loads((run / "result.json").read_text())[name] for run in (workdir, finished_run)
        )
        assert (ours["macs"], ours["params"]) == (theirs["macs"], theirs["params"])
        assert abs(ours["top1"] - theirs["top1"]) < 0.02
    best = [
        json.loads((r / "search/best.json").read_text())["genes"] for r in (workdir, finished_run)
    ]
    assert best[0] == best[1]
