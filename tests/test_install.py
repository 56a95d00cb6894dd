"""flora_jax outside its checkout: the wheel, its command, its help."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

import flora_jax as flora
from flora_jax import configs, help
from flora_jax.errors import InputError
from flora_jax.methods.listing import stages
from tests.helpers.commands import ROOT


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


@pytest.mark.parametrize(
    ("config", "file"),
    [
        ("deit_b", "deit_b.py"),
        ("deit_b:runlocal", "deit_b.py:runlocal"),
        ("configs/digits.py", "digits.py"),
        ("digits.py", "digits.py"),
    ],
)
def test_a_config_is_found_by_its_name(config, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.file_of(config) == str(pathlib.Path(configs.__file__).parent / file)


def test_a_file_of_ones_own_comes_first_and_none_is_answered_with_the_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.py").touch()
    assert configs.file_of("digits.py:runlocal") == "digits.py:runlocal"
    for missing in ("digit", "configs/digit.py", "folder/digits.py", "common"):
        with pytest.raises(InputError, match=r"unknown config .*clip_art, deit_b, .*path of a fil"):
            configs.file_of(missing)


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
