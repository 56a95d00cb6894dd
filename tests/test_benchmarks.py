"""The benchmarks run and print what their documentation says, on the smallest case."""

import pytest

from benchmarks.seeds import summary
from tests.helpers.commands import run_benchmark


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, last_line",
    [
        ("full_size.py --model tiny --batch 1 --steps 1", "within the limit of 16 GiB"),
        ("data.py --images 4 --batch 2 --batches 1 --rounds 1", "train, 2 workers"),
        ("load.py --model tiny", "within the limits of 60 s and 3 GiB"),
        ("subnet.py --model two_blocks --batch 1 --rounds 1 --subnets 1", "FLORA on ViT-Slim"),
        ("step.py --model two_blocks --batch 1 --rounds 1 --fitted 2 --without torch dense", "R2"),
        ("scoring.py --model two_blocks --batch 1 --rounds 1 --triples 2", "as whole networks"),
        ("compile.py --model two_blocks --batch 1", "peak of sliced over masked"),
        ("checkpoints.py --every 2 --intervals 2 --rounds 1", "cost of checkpoints"),
        ("space.py --model tiny --population 1000 --draws 10", "10 draws in the window"),
    ],
)
def test_benchmark_runs(program, last_line):
    done = run_benchmark(*program.split())
    assert done.returncode == 0, done.stderr
    assert last_line in done.stdout.splitlines()[-1]


def test_summary_of_seeds():
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
