"""Where runs live: names, homes and owners, file systems, data that moves, Ctrl-C."""

import dataclasses
import errno
import fcntl
import grp
import os
import pathlib
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

import flora_jax as flora
from flora_jax.configs import digits, file_of
from flora_jax.errors import InputError, StorageError
from flora_jax.io.checkpoint import Checkpoints, read_saved_parameters, save_parameters
from flora_jax.io.files import locked, user_cache_dir, write_json
from flora_jax.io.paths import as_text, user_path
from flora_jax.io.places import check_can_hold_a_run
from flora_jax.methods import start
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings
from flora_jax.runs.workdir import CONFIG_FILE, IMAGES_FILE, Run, planned, stale_steps
from tests.helpers.checkpoints import names, restored_step, state_at
from tests.helpers.commands import ROOT, flora_command
from tests.helpers.pictures import save

ODD_NAMES = ("w[0-9]", "[", "a*b?", "{x,y}", "50 % # : &", "-rf", "two\nlines", "größe 模型", "~")
ODD_NAMES += ("back\\slash", os.fsdecode(b"na\xefve"))


@pytest.fixture
def nobody(monkeypatch):
    """A user that the machine does not know, without a home folder."""

    def unknown(number):
        raise KeyError(f"no name for {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(grp, "getgrgid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


# --- paths as users give them --------------------------------------------------------------------


def test_tilde_is_the_home_folder_wherever_a_path_is_taken(
    tiny_model, tiny_spec, tmp_path, monkeypatch
):
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    flora.save(tiny_model, "~/models/a")
    flora.export_timm(tiny_model, "~/a.safetensors")
    assert flora.load("~/models/a").spec == tiny_spec
    assert flora.from_pretrained("~/a.safetensors", tiny_spec).spec == tiny_spec
    (home / "mine.py").touch()
    assert file_of("~/mine.py:runlocal") == f"{home}/mine.py:runlocal"
    assert user_path("runs/~/x") == epath.Path("runs/~/x")
    assert names(here) == []


def test_names_that_cannot_be_used_are_refused_and_shown(nobody):
    for path, message in (
        ("/hf/runs/1", "/hf/runs/1 would be taken for hf://runs/1"),
        ("hdfs://runs/1", "unknown 'hdfs://'; give a folder on disk or gs://"),
        ("~/runs/x", "no home folder; give the whole path, or set HOME"),
    ):
        for use in (user_path, flora.load, Run.open, flora.from_pretrained):
            with pytest.raises(InputError, match=message):
                use(path)
    assert as_text(os.fsdecode(b"na\xefve")) == "na\N{REPLACEMENT CHARACTER}ve"
    assert as_text("größe") == "größe"


# --- folders that hold a run ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD_NAMES)
def test_checkpoints_in_a_folder_of_any_name(name, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # has the links
    check_can_hold_a_run(tmp_path / name / "run")
    assert names(tmp_path) == []  # nothing is left behind
    folder = tmp_path / name / "checkpoints"
    (folder / "9.orbax-checkpoint-tmp").mkdir(parents=True)
    with Checkpoints(folder, keep=1) as checkpoints:
        for step in (3, 6):
            checkpoints.save(step, state_at(step))
    assert names(folder) == ["6", "manifests"]
    assert restored_step(folder) == 6


def test_a_folder_that_cannot_hold_a_run_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"for the \[ in its name; try gs://bucket/v-2]$"):
        check_can_hold_a_run("gs://bucket/v[2]")
    (tmp_path / "file").touch()
    config = digits.get_config()
    config.pretrained = "no/such/weights.safetensors"  # comes after it
    with pytest.raises(StorageError, match=r"file/run cannot hold a run: .*Not a directory"):
        flora.run(config, tmp_path / "file/run")
    check_can_hold_a_run(tmp_path)  # what is there is left as it is
    other = {"value": np.zeros(3, np.float32)}
    monkeypatch.setattr("flora_jax.io.places.read_saved_parameters", lambda folder: other)
    with pytest.raises(StorageError, match="has other values"):
        check_can_hold_a_run(tmp_path / "run")
    assert names(tmp_path) == ["file"]


def test_a_checkpoint_of_another_training_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state_at(3))
        with pytest.raises(InputError, match=rf"{tmp_path}/3 is no state of this training: "):
            checkpoints.restore(state_at(0)._replace(parameters={"other": state_at(0).step}))


def test_who_owns_a_file_does_not_matter(nobody, tmp_path):
    check_can_hold_a_run(tmp_path / "run")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state_at(3))
    assert restored_step(tmp_path / "checkpoints") == 3
    save_parameters({"w": np.ones(2)}, tmp_path / "parameters")
    np.testing.assert_array_equal(read_saved_parameters(tmp_path / "parameters")["w"], np.ones(2))


def test_no_cache_where_none_can_be_kept(nobody, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "flora_jax")
    monkeypatch.chdir(tmp_path)
    assert user_cache_dir("index") is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert user_cache_dir("index") is None
    assert [r.message.partition(":")[0] for r in caplog.records] == ["no cache of index"] * 2


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "run.lock"):
        (record,) = caplog.records
    assert record.message.startswith(f"{tmp_path} cannot be locked (no locks): ")


# --- data that moves -----------------------------------------------------------------------------


def folder_of_pictures(root, side=9):
    picture = np.zeros((side, side, 3), np.uint8)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("ant", "bee"):
            for i in range(count):
                save(root / split / name / f"{i}.png", picture)
    return root


def settings_of(name, **changes) -> Settings:
    settings = Settings.from_config(digits.get_config())
    data = dataclasses.replace(settings.data, name=name, heldout_fraction=0.25, **changes)
    return dataclasses.replace(settings, data=data)


def test_a_run_goes_on_where_the_same_images_lie_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here, workdir = folder_of_pictures(tmp_path / "here"), epath.Path(tmp_path / "run")

    def run_on(name, **changes) -> Run:
        settings = settings_of(name, **changes)
        return Run(settings, workdir, Images(settings))

    def plan_of(run):
        return planned(run, start.script_of(run.settings))

    before = run_on(f"folder:{here}")
    records = {name: {"key": of.key, "seconds": 1.0} for name, of in plan_of(before).items()}
    write_json(workdir / "stages.json", records)
    write_json(workdir / CONFIG_FILE, before.settings.to_config())
    write_json(workdir / IMAGES_FILE, {"signature": before.images_signature})
    there = shutil.copytree(here, tmp_path / "there")
    moved = run_on(f"folder:{there}", data_dir="/data", num_threads=3, num_workers=2)
    assert stale_steps(moved, plan_of(moved)) == []
    smaller = folder_of_pictures(tmp_path / "smaller", side=8)
    fewer = folder_of_pictures(tmp_path / "fewer")
    (fewer / "train/ant/0.png").unlink()
    for other in (smaller, fewer):
        run = run_on(f"folder:{other}")
        with pytest.raises(InputError, match=r"another config; .*\n  data\.name: .*here.* there, "):
            stale_steps(run, plan_of(run))


# --- Ctrl-C --------------------------------------------------------------------------------------

LINE = "interrupted; the same command goes on\n"
PROGRAMS = {
    # In one call of C, as when a network is compiled: no Python runs in the main thread.
    "compiling": "print(1, flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**8)",
    "with a worker": """
interrupts.leave_to_this_process()
spawn = multiprocessing.get_context('spawn')
spawn.Process(target=time.sleep, args=(99,), daemon=True).start()
event = spawn.Event()  # of shared memory, which is tidied up in silence
print(1, flush=True)
time.sleep(99)""",
    "twice": """
from flora_jax.cluster.processes import StopRequest
with StopRequest() as request:
    print(1, flush=True)
    while not request.is_set(): time.sleep(0.01)
    print(2, flush=True)
    time.sleep(99)""",
}


@pytest.mark.parametrize("moment", PROGRAMS)
def test_ctrl_c_ends_at_once_in_one_line(moment):
    """The signal goes to the whole group, as a terminal sends it."""
    start = "import hashlib, multiprocessing, time; from flora_jax.cluster import interrupts; "
    program = f"{start}interrupts.answer_at_once()\n{PROGRAMS[moment]}"
    times, said = (2, "saving; Ctrl-C again ends at once\n") if moment == "twice" else (1, "")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, **pipes, start_new_session=True) as process:
        try:
            for _ in range(times):
                process.stdout.readline()
                os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=30)  # until the last of the group has ended
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert errors == said + LINE
    assert process.returncode == 128 + signal.SIGINT


@pytest.mark.slow
def test_ctrl_c_while_the_program_starts(tmp_path):
    with subprocess.Popen(
        **flora_command(tmp_path / "run"), stderr=subprocess.PIPE, text=True
    ) as process:
        state = pathlib.Path(f"/proc/{process.pid}/status")
        while process.poll() is None and not re.search(r"SigBlk:\t0+2\n", state.read_text()):
            time.sleep(0.01)  # then it imports JAX
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == LINE
    assert process.returncode == 128 + signal.SIGINT
    assert names(tmp_path) == []
