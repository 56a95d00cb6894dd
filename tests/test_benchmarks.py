"""The benchmarks run and print what their documentation says, on the smallest case."""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.seeds import comparison, mean_over_seeds, summary
from tests.helpers.commands import run_benchmark


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, last_line",
    [
        ("load.py --model deit_t", "GiB"),
        ("step.py --model two_blocks --batch 1 --rounds 1 --fitted 2 --without torch dense", "R2"),
        ("step_profile.py --model two_blocks --batch 1 --steps 1", "page faults"),
        *(
            pytest.param(*case, marks=pytest.mark.faults)
            for case in (
                ("data.py --images 4 --batch 2 --batches 1 --rounds 1", "train, 2 workers"),
                (
                    "scoring.py --model two_blocks --batch 1 --rounds 1 --triples 2",
                    "time of one by one",
                ),
                (
                    "subnet.py --model two_blocks --batch 1 --rounds 1 --subnets 1",
                    "FLORA on ViT-Slim",
                ),
                ("compile.py --model two_blocks --batch 1", "peak of sliced over masked"),
                ("checkpoints.py --every 2 --intervals 2 --rounds 1", "cost of checkpoints"),
            )
        ),
    ],
)
def test_benchmark_runs(program, last_line):
    done = run_benchmark(*program.split())
    assert done.returncode == 0, done.stderr
    assert last_line in done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, line",
    [
        ("halving.py RUN --seeds 0", r"^1 errors: \d+ % of the images.* a level one in [01] of 1"),
        ("trials.py search_metric RUN --subnets 4 --splits 2", r"^ +\d+ +[-\d.n]"),
        ("trials.py supernets RUN --subnets 1", r"^random, .*: 1 subnets\n +[\d.]+ %"),
    ],
)
def test_trials_on_a_finished_run(finished_run, program, line):
    done = run_benchmark(*program.replace("RUN", str(finished_run)).split())
    assert done.returncode == 0, done.stderr
    assert re.search(line, done.stdout, re.MULTILINE)


def test_summary_of_seeds_and_of_several_budgets():
    runs = [
        {
            "dense": {"top1": dense, "macs": 100, "params": 50},
            "subnet": {"top1": subnet, "macs": 40, "params": 20},
        }
        for dense, subnet in ((0.99, 0.98), (0.97, 0.98))
    ]
    dense, subnet = summary(runs).splitlines()[2:]
    assert dense == "| dense | 99.00, 97.00 | 98.00 ± 1.41 | +0.00 | 0.0 % | 0.0 % |"
    assert subnet == "| subnet | 98.00, 98.00 | 98.00 ± 0.00 | +0.00 | 60.0 % | 60.0 % |"
    budgets = [runs[0]["subnet"] | {"budget": [high - 0.05, high]} for high in (0.4, 0.55)]
    rows = summary([runs[0] | {"subnet": budgets}]).splitlines()[3:]
    assert [row.split("|")[1] for row in rows] == [" subnet 0.4 ", " subnet 0.55 "]


def test_comparison_over_seeds(tmp_path):
    """Two seeds that err on other images, each on one in ten more than uniform does."""
    labels, wrong = np.zeros(100, np.int32), np.arange(100) % 10
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(paths):
        tensors = {"label": labels + seed // 2}
        for name, is_correct in (("uniform 0.55", wrong >= 0), ("subnet 0.55", wrong != seed)):
            tensors[f"{name}/is_correct"] = is_correct.astype(np.uint8)
            tensors[f"{name}/log_likelihood"] = -np.ones(100, np.float32) / (1 + is_correct)
            tensors[f"{name}/predicted"] = labels
        save_file(tensors, path)
    found = mean_over_seeds(paths[:2])
    np.testing.assert_array_equal(found["subnet 0.55"]["is_correct"], 1 - 0.5 * (wrong < 2))
    (row,) = comparison(paths[:2]).splitlines()[2:]
    assert row.startswith("| subnet 0.55 | uniform 0.55 | -10.00 (-1")
    assert "| -0.0500 (-0.0" in row
    with pytest.raises(SystemExit, match=r"2\.safetensors is of other test images than .*0\.saf"):
        comparison(paths)
    with pytest.raises(SystemExit, match=r"9\.safetensors is missing"):
        comparison([*paths, tmp_path / "9.safetensors"])
