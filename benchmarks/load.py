"""Pretrained weights at full size: seconds and memory of loading and of factorising.

    python benchmarks/load.py --model deit_b

A child process writes random weights under timm's names into a temporary folder; this one loads
them and makes the supernet. The peak memory is that of the process so far.
"""

import multiprocessing
import pathlib
import tempfile
import time

from common import DEITS, describe_machine, parser_of, peak_gib, write_json

import flora_jax as flora
from flora_jax.weights.export.timm import export_timm


def write_weights(model: str, path: pathlib.Path) -> None:
    export_timm(flora.create(DEITS[model]), path)


def main() -> None:
    arguments = parser_of(__doc__, "deit_b", tuple(DEITS)).parse_args()
    spec = DEITS[arguments.model]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "weights.safetensors"
        writer = multiprocessing.get_context("spawn").Process(
            target=write_weights, args=(arguments.model, path)
        )
        writer.start()
        writer.join()
        machine = describe_machine(f"a file of {path.stat().st_size / 1e6:.0f} MB")
        print(machine)
        print(f"{'start':16}{'':8}   {peak_gib():5.2f} GiB")
        started = time.perf_counter()
        model = flora.from_pretrained(path, spec)
        loaded = time.perf_counter()
        print(f"{'from_pretrained':16}{loaded - started:8.1f} s {peak_gib():5.2f} GiB")
        flora.factorize(model, flora.RankSpace.regular(spec))
        finished = time.perf_counter()
        print(f"{'factorize':16}{finished - loaded:8.1f} s {peak_gib():5.2f} GiB")
    write_json(arguments.json, machine, {"seconds": finished - started, "peak_gib": peak_gib()})


if __name__ == "__main__":
    main()
