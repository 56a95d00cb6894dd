"""Damages files, and finds those that were left behind."""

import pathlib
import subprocess

from etils import epath

from tests.helpers.commands import ROOT


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(file: epath.Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def untracked_files() -> set[str]:
    """What git does not know in the tree, but for the caches of tools; nothing outside git."""
    command = ["git", "status", "--porcelain", "--ignored"]
    status = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = {line[3:] for line in status.stdout.splitlines() if line[:2] in ("??", "!!")}
    caches = ("_cache/", "__pycache__/", ".hypothesis/", ".egg-info/", ".venv/", ".venv")
    return {name for name in names if not name.endswith(caches)}
