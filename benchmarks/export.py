"""Exported to ONNX: the published FLORA subnet beside the dense network, in ONNX Runtime.

    python benchmarks/export.py --model deit_s --batches 1 8
    python benchmarks/export.py --model deit_s --dtypes float32 int8

Both have random weights and are written by `flora.export_onnx`, which also compares each file with
its model. They are timed in turn, round after round; the table has medians, and their share of the
dense network's in the first dtype. `realised` is the share of the MAC saving that is seen in
milliseconds of that dtype, in the JSON as "realised_saving at batch N".
`--profile` adds which operations the time goes to, by ONNX Runtime's own profiler.
"""

import collections
import functools
import json
import pathlib
import tempfile

import numpy as np
import onnxruntime
from common import PAUSE, describe_machine, parser_of, write_json
from subnet import full_size

import flora_jax as flora
from flora_jax.models.factory import create
from flora_jax.timing import median_ratio, time_in_turn
from flora_jax.weights.export.onnx import TOLERANCES

NAMES = ("dense", "FLORA, published")


def main() -> None:
    parser = parser_of(__doc__, "deit_s", ("deit_s", "deit_b"), rounds=15)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--dtypes", choices=tuple(TOLERANCES), nargs="+", default=("float32",))
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()

    first = arguments.dtypes[0]
    machine = describe_machine(first, f"ONNX Runtime {onnxruntime.__version__}")
    print(machine)
    specs = full_size(arguments.model)
    dense, subnet = (specs[name] for name in NAMES)
    saving = 1 - subnet.macs() / dense.macs()
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            (name, dtype): pathlib.Path(folder, f"{name}, {dtype}.onnx")
            for dtype in arguments.dtypes
            for name in NAMES
        }
        for (name, dtype), path in paths.items():
            flora.export_onnx(create(specs[name]), path, dtype)
            share = path.stat().st_size / (4 * flora.num_params(specs[name]))
            print(f"{path.stem}: {share:.4f} of the bytes of its parameters in float32")
        print(f"{'batch':>5}  {'network':28}{'ms':>8}{'share':>8}{'realised':>10}")
        for batch in arguments.batches:
            forwards = {key: _forward(path, dense, batch) for key, path in paths.items()}
            times = time_in_turn(forwards, arguments.rounds, PAUSE)
            for (name, dtype), ms in times.items():
                share = median_ratio(ms, times[NAMES[0], first])
                line = f"{batch:>5}  {f'{name}, {dtype}':28}{np.median(ms):>8.2f}{share:>8.3f}"
                if name == NAMES[1]:
                    realised = (1 - median_ratio(ms, times[NAMES[0], dtype])) / saving
                    line += f"{100 * realised:>8.0f} %"
                    if dtype == first:
                        ratios[f"realised_saving at batch {batch}"] = realised
                print(line)
        if arguments.profile:
            for path in paths.values():
                _print_profile(path.stem, path, dense, arguments.batches[-1])
    print(f"MACs {subnet.macs() / dense.macs():.3f} of the dense network's")
    write_json(arguments.json, machine, ratios)


def _forward(path: pathlib.Path, spec, batch: int, options=None):
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    height, width, channels = spec.image_shape
    images = np.random.default_rng(0).normal(size=(batch, channels, height, width))
    return functools.partial(session.run, None, {"images": np.float32(images)})


def _print_profile(name: str, path: pathlib.Path, spec, batch: int) -> None:
    """Milliseconds a call of each kind of operation, after ONNX Runtime's own fusions."""
    options, calls = onnxruntime.SessionOptions(), 5
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    forward = _forward(path, spec, batch, options)
    for _ in range(calls):
        forward()
    events = json.loads(pathlib.Path(forward.func.__self__.end_profiling()).read_text())
    totals: collections.Counter[str] = collections.Counter()
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            totals[event["args"]["op_name"]] += event["dur"] / 1000 / calls
    print(name + "".join(f"\n  {kind:24}{ms:>8.2f} ms" for kind, ms in totals.most_common(9)))


if __name__ == "__main__":
    main()
