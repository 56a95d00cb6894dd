"""Pretrained weights at full size: how long do loading and factorising take, in what memory?

    python benchmarks/load.py --model base

A child process writes random weights under timm's names into a temporary folder; this one loads
them and makes the supernet. It prints the seconds and the peak memory of the process after each.
"""

import argparse
import multiprocessing
import os
import pathlib
import platform
import resource
import tempfile
import time

import flora_jax as flora
from flora_jax.weights.export.timm import export_timm

LIMIT_SECONDS, LIMIT_GIB = 60, 3


def write_weights(model: str, path: pathlib.Path) -> None:
    export_timm(flora.create(flora.deit(model)), path)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "small", "base"), default="base")
    arguments = parser.parse_args()
    spec = flora.deit(arguments.model)

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "weights.safetensors"
        writer = multiprocessing.get_context("spawn").Process(
            target=write_weights, args=(arguments.model, path)
        )
        writer.start()
        writer.join()
        print(
            f"DeiT-{arguments.model}, a file of {path.stat().st_size / 1e6:.0f} MB; "
            f"{platform.machine()}, {os.cpu_count()} cores"
        )
        print(f"{'':<16}{'seconds':>8}{'peak GiB':>10}")
        print(f"{'start':<16}{'':>8}{peak_gib():>10.2f}")
        started = time.perf_counter()
        model = flora.from_pretrained(path, spec)
        loaded = time.perf_counter()
        print(f"{'from_pretrained':<16}{loaded - started:>8.1f}{peak_gib():>10.2f}")
        flora.factorize(model, flora.RankSpace.regular(spec))
        finished = time.perf_counter()
        print(f"{'factorize':<16}{finished - loaded:>8.1f}{peak_gib():>10.2f}")

    within = finished - started <= LIMIT_SECONDS and peak_gib() <= LIMIT_GIB
    verdict = "within" if within else "ABOVE"
    print(f"{verdict} the limits of {LIMIT_SECONDS} s and {LIMIT_GIB} GiB")


if __name__ == "__main__":
    main()
