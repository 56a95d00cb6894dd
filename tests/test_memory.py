"""Large pages: a program starts anew with them once, as it was started, and only where it can."""

import json
import os
import subprocess
import sys

import pytest

from flora_jax.cluster import memory
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
def start(tmp_path):
    """start(how, what the program does first, tunables) -> its pid and what it printed."""

    def start(how: list[str], before: str, tunables: str | None):
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

    return start


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
def test_a_program_starts_anew(start, how, before, tunables, expected):
    started, pid, arguments, found = start(how, before, tunables)
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
