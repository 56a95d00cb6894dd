"""The command line: large pages, progress, errors in a line, an installed wheel."""

import io
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import warnings

import absl.logging
import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from hypothesis import given
from hypothesis import strategies as st

import flora_jax as flora
from flora_jax import configs, help, main
from flora_jax.cluster import memory
from flora_jax.cluster.mesh import check_devices, equal_share
from flora_jax.errors import (
    InputError,
    MissingFileError,
    RunError,
    StorageError,
    UserError,
    did_you_mean,
    differences,
    few,
    unknown,
)
from flora_jax.methods import start
from flora_jax.methods.listing import stages
from flora_jax.progress import Progress
from flora_jax.training.train import NonFiniteLossError
from tests.helpers.commands import ROOT

PROGRAM = """
import json, os, sys
from flora_jax.cluster import memory
{before}
if __name__ == "__main__":
    memory.use_large_pages()
    print(json.dumps([os.getpid(), sys.argv, os.environ.get("GLIBC_TUNABLES")]))
"""
CAN = "memory._can_be_asked_for = lambda: True"


@pytest.fixture
def started_anew(tmp_path):
    """A function: (how, what the program does first, tunables) -> its pid and what it printed."""

    def run(how: list[str], before: str, tunables: str | None):
        for name in ("a program.py", "program.py"):
            (tmp_path / name).write_text(PROGRAM.format(before=before))
        environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        environment |= {"PYTHONPATH": str(ROOT)}
        environment |= {"GLIBC_TUNABLES": tunables} if tunables else {}
        command = [sys.executable, "-X", "utf8", *how, "--flag", "a b", ""]
        options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **options) as process:
            printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        return process.pid, *json.loads(printed)

    return run


FILE, MODULE = ["a program.py"], ["-m", "program"]


@pytest.mark.parametrize(
    "how, before, tunables, expected",
    [
        (FILE, CAN, None, "glibc.malloc.hugetlb=1"),
        (MODULE, CAN, "glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        (FILE, CAN, "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        (MODULE, f"{CAN}; sys.executable = '/nowhere/python'", None, "glibc.malloc.hugetlb=1"),
        (MODULE, "memory._can_be_asked_for = lambda: False", None, None),
    ],
)
def test_a_program_starts_anew(started_anew, how, before, tunables, expected):
    started, pid, arguments, found = started_anew(how, before, tunables)
    assert (pid, arguments[1:], found) == (started, ["--flag", "a b", ""], expected)


@pytest.mark.parametrize(
    "library, mode, can",
    [
        ("glibc 2.35.1", "always [madvise] never", True),
        ("glibc 2.34", "always [madvise] never", False),
        ("glibc 2.36", "[always] madvise never", False),  # they come unasked
        ("glibc 2.36", None, False),  # another kernel
        (None, "always [madvise] never", False),
    ],
)
def test_where_they_can_be_asked_for(monkeypatch, tmp_path, library, mode, can):
    if mode:
        (tmp_path / "enabled").write_text(mode + "\n")
    monkeypatch.setattr(os, "confstr", lambda name: library)
    monkeypatch.setattr(memory, "_MODE", tmp_path / "enabled")
    assert memory._can_be_asked_for() is can


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def shown_lines(capsys) -> list[str]:
    """What was printed, without the time of day that every line begins with."""
    lines = capsys.readouterr().err.splitlines()
    return [re.fullmatch(r"\d\d:\d\d:\d\d (.*)", line).group(1) for line in lines]


def test_lines_of_a_resumed_run(capsys):
    clock = Clock()
    with Progress("supernet", total=1200, start=300, clock=clock) as progress:
        for seconds, count in ((10, 142), (5, 8), (5, 50), (1, 1)):
            clock.now += seconds
            progress.update(count, loss=0.531234, epoch=3)
        clock.now += 79
        progress.update(699)
    lines = shown_lines(capsys)
    assert lines == [
        "supernet  442/1200 steps  36 %  loss 0.5312  epoch 3",  # it may have compiled so far
        # 15 s: too early for a line
        "supernet  500/1200 steps  41 %  5.8 steps/s  2:01 left  loss 0.5312  epoch 3",
        "supernet  1200/1200 steps  100 %  8.4 steps/s  0:00 left  loss 0.5312  epoch 3",
        "supernet  1200/1200 steps  done in 1:40  8.4 steps/s  loss 0.5312  epoch 3",
    ]


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("supernet", total=10, start=4) as progress:
        progress.update(5, loss=0.25)
        progress._bar.refresh()
        progress.update()
    *bars, summary = re.split(r"[\r\n]+", terminal.getvalue().strip())
    assert bars[0].startswith("supernet:  40%")
    assert any(bar.startswith("supernet:  90%") and "loss 0.25" in bar for bar in bars)
    assert "supernet  10/10 steps  done in 0:00" in summary


def test_values_must_be_on_the_host():
    class DeviceArray:
        def __float__(self):
            raise AssertionError("the device was asked for a value")

        __repr__ = __format__ = __float__

    with (
        pytest.raises(TypeError, match="loss must be a Python number, got a DeviceArray"),
        Progress("supernet", total=2) as progress,
    ):
        progress.update(loss=DeviceArray())


@pytest.fixture
def run_raises(monkeypatch):
    """A function: the exception that the run raises, what `--traceback` is -> exit status."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(main, "_configure_jax", lambda: None)
    monkeypatch.setattr(main, "_show_log", lambda: None)

    def run(error: Exception, traceback: bool) -> int:
        def fail(*arguments):
            raise error

        monkeypatch.setattr(start, "run", fail)
        with flagsaver.flagsaver(traceback=traceback), pytest.raises(SystemExit) as caught:
            main.main(["flora_jax"])
        return caught.value.code

    return run


KINDS = {
    InputError: ValueError,
    MissingFileError: FileNotFoundError,
    RunError: RuntimeError,
    StorageError: OSError,
    NonFiniteLossError: FloatingPointError,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_error_is_one_line_and_what_programs_expect(run_raises, capsys, kind):
    assert run_raises(kind("wrong value"), traceback=False) == 1
    assert capsys.readouterr().err == "error: wrong value\n"
    assert issubclass(kind, KINDS[kind])
    assert issubclass(kind, UserError)


@pytest.mark.parametrize("error", [OSError("oops"), InputError("oops")])
def test_our_own_fault_keeps_its_traceback_and_a_users_on_request(run_raises, capsys, error):
    assert run_raises(error, traceback=isinstance(error, InputError)) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "in fail" in shown


@pytest.mark.parametrize("reason", ["Unable to initialize backend\nmore", ""])
def test_a_device_that_is_not_there_is_one_line(monkeypatch, reason):
    def fail():
        raise RuntimeError(reason)

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cdua")
    with pytest.raises(InputError, match=r"^JAX_PLATFORMS=cdua is .*; JAX_PLATFORMS=cpu .*$"):
        check_devices()
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(RuntimeError):
        check_devices()


READ_NO_MORE = """
import os
from flora_jax.cluster import interrupts
with interrupts.ended_with_its_reader():
    while True:
        {what}
"""


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("print('a line')", 128 + signal.SIGPIPE, ""),
        ("print('a line', flush=True); raise BrokenPipeError('of a socket')", 1, "of a socket"),
    ],
)
def test_a_program_ends_with_what_reads_its_output(what, status, said):
    command = [sys.executable, "-c", READ_NO_MORE.format(what=what)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "a line\n"
        if not said:
            process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == status
    assert errors.strip().endswith(said)
    assert bool(errors) == bool(said)


def test_warnings_are_lines_of_ours(monkeypatch, capsys):
    log = logging.getLogger("flora_jax")
    for name, value in (("handlers", []), ("propagate", True), ("level", logging.NOTSET)):
        monkeypatch.setattr(log, name, value)
    monkeypatch.setattr(warnings, "showwarning", None)
    verbosity = absl.logging.get_verbosity()
    main._show_log()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show = main.warnings.showwarning
        show(UserWarning("the weights have\n no classifier"), UserWarning, "file.py", 3)
    absl.logging.set_verbosity(verbosity)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d the weights have no classifier", line)


def test_hints():
    assert did_you_mean("serach", ["search", "report"]) == " (did you mean 'search'?)"
    assert did_you_mean("x", ["search"]) == ""
    assert unknown("stage", "x", ["a", "b"]) == "unknown stage 'x'; choose one of a, b"
    assert few({"b", "a"}) == "a, b"
    assert few([]) == "none"
    assert few([f"{i}" for i in range(9)], 3) == "0, 1, 2 and 6 more"


VALUES = st.recursive(
    st.integers(0, 3) | st.text(max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, VALUES)
def test_differences_are_all_there_is_between_two(there, here):
    found = list(differences(there, here))
    assert bool(found) == (there != here)
    assert len({name for name, _, _ in found}) == len(found)


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 4))
def test_a_batch_is_shared_equally_or_the_nearest_that_can_be_is_named(size, devices, parts):
    if size % (devices * parts) == 0:
        share = equal_share("batch_size", size, devices, parts)
        assert share * devices == size
        assert share % parts == 0
        return
    with pytest.raises(InputError, match=rf"batch_size {size} cannot be shared") as caught:
        equal_share("batch_size", size, devices, parts)
    nearest = int(str(caught.value).split()[-1])
    assert equal_share("batch_size", nearest, devices, parts) >= 1
    legal = range(devices * parts, 2 * size + devices * parts + 1, devices * parts)
    assert abs(nearest - size) == min(abs(other - size) for other in legal)


def test_help_fits_a_screen_and_lists_stages_and_configs():
    lines = help.text().splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    listed = [line.strip().partition("  ")[0] for line in lines if line.startswith("  ")]
    assert set(stages()) <= set(listed)
    named = set()
    for first, *others in (names.split(", ") for names in listed):  # "deit_b, _s, _t"
        named |= {first, *(first.rpartition("_")[0] + other for other in others)}
    assert set(configs.names()) <= named
    assert all(configs.first_line(name) for name in configs.names())


def test_a_config_is_found_by_its_name_after_a_file_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "swin_t.py").touch()
    for config, file in (
        ("deit_b", "deit_b.py"),
        ("deit_b:runlocal", "deit_b.py:runlocal"),
        ("configs/digits.py", "digits.py"),
    ):
        assert configs.file_of(config) == str(pathlib.Path(configs.__file__).parent / file)
    assert configs.file_of("swin_t.py:runlocal") == "swin_t.py:runlocal"
    for missing in ("digit", "configs/digit.py", "folder/digits.py", "common"):
        with pytest.raises(InputError, match=r"unknown config .*clip_art, deit_b, .*path of a fil"):
            configs.file_of(missing)
    for theirs, ours in (("deit_base", "deit_b"), ("swin_tiny_patch4_window7_224", "swin_t")):
        with pytest.raises(InputError, match=f"did you mean '{ours}'"):
            configs.file_of(theirs)


@pytest.mark.slow
def test_a_start_reads_nothing_that_few_need():
    few_need = {"matplotlib", "onnx", "sklearn", "scipy.stats", "tensorflow_datasets", "torch"}
    program = f"import sys, flora_jax.main; assert not {few_need} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_folder(finished_run, tmp_path):
    source, site, empty = (tmp_path / name for name in ("source", "site", "empty"))
    source.mkdir()
    empty.mkdir()
    for name in ("flora_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    python = [sys.executable, "-m"]
    build = ["build", "--wheel", "--no-isolation", f"--outdir={tmp_path}", str(source)]
    subprocess.run([*python, *build], check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    install = ["pip", "install", "--quiet", "--no-deps", f"--target={site}", str(wheel)]
    subprocess.run([*python, *install], check=True, capture_output=True)

    def command(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(site / "bin/flora_jax"), *arguments],
            cwd=empty,
            env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            check=False,
        )

    assert command("--help").stdout.rstrip() == help.text()
    misspelt = command("--config=digit", "--workdir=run")
    assert misspelt.returncode == 1
    assert "did you mean 'digits'" in misspelt.stderr
    (empty / "configs").mkdir()  # a package of the user's own, and a config in it
    (empty / "configs/__init__.py").touch()
    shutil.copy(ROOT / "configs/deit_t.py", empty / "configs/mine.py")
    refused = command("--config=configs/mine.py:runlocal", "--workdir=run", "--stage=bake")
    assert refused.stderr.startswith("error: unknown stage 'bake'; choose one of pretrain, ")
    assert not (empty / "run").exists()
    stages = "--config.stages=('pretrain','evaluate','report')"
    finished = command("--config=deit_t:runlocal", stages, "--workdir=run")
    assert finished.returncode == 0, finished.stderr
    results = [
        json.loads((run / "result.json").read_text()) for run in (empty / "run", finished_run)
    ]
    assert results[0]["dense"] == results[1]["dense"]  # as from the checkout
    dense = flora.load(empty / "run/dense")
    assert np.isfinite(dense(np.zeros((1, *dense.spec.image_shape), np.float32))).all()
    assert (site / "flora_jax/py.typed").exists()
