"""A network and its closed-form compressions in every engine: milliseconds, and what is lost.

    python benchmarks/dinov2.py --out runs/material/dinov2_vits14
    python benchmarks/clip_art.py --out runs/material/clip_art
    python benchmarks/engines.py --model runs/material/dinov2_vits14 \
        --pictures runs/material/clip_art

The network is DINOv2 ViT-S/14, compressed on pictures of train/ by `flora.compress`. Every engine
that is installed takes pictures of val/ one by one, as it is timed: each output, as the engine
computes it, is compared with that of the dense network in JAX in float32. A row has the median
milliseconds of one picture, the share of the dense network's in the same engine with its
quartiles, the share of the multiply-adds, the mean cosine of the outputs, and the error, the sum
of |f - f_dense|^2 as a share of that of |f_dense|^2. So the rows of the dense network show what an
engine's number format costs, the others that and the compression.
"""

import dataclasses
import functools
import pathlib

import dinov2
import numpy as np
from common import describe_machine, parser_of, write_json

import flora_jax as flora
from flora_jax.models.network import Network
from flora_jax.timing import other_work
from flora_jax.weights.export.checks import cosines, exactly
from flora_jax.weights.export.engines import Engine, installed_engines
from flora_jax.weights.export.speed import measure

BATCH_SIZE = 30  # of the network that all are compared with


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder of dinov2.py")
    parser.add_argument("--pictures", type=pathlib.Path, required=True, help="of clip_art.py")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--calibration", type=int, default=512, help="pictures")
    parser.add_argument("--pictures_to_judge", type=int, default=300)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35], help="of MACs")
    parser.add_argument("--only", nargs="+", default=[""], help="engines whose names begin so")
    arguments = parser.parse_args()

    engines, hints = installed_engines()
    engines = [engine for engine in engines if engine.name.startswith(tuple(arguments.only))]
    machine = describe_machine(*(str(engine) for engine in engines if engine.name != "JAX"))
    print(machine, *hints, sep="\n")
    dense, size = dinov2.load(arguments.model, arguments.image_size), arguments.image_size
    calibration = dinov2.drawings(arguments.pictures / "train", arguments.calibration, size)
    images = dinov2.drawings(arguments.pictures / "val", arguments.pictures_to_judge, size)
    budgets = [round(share * dense.spec.macs()) for share in arguments.budgets]
    compressed = flora.compress(dense, calibration, macs=budgets)
    names = [f"{share:g}" for share in arguments.budgets]
    models = {"dense": dense} | dict(zip(names, compressed, strict=True))
    parts = np.array_split(images, -(-len(images) // BATCH_SIZE))
    expected = np.concatenate([exactly(dense)(part) for part in parts])
    print(f"{len(calibration)} pictures to calibrate, {len(images)} to judge")

    facts = ("ms", "share", "low", "high", "MACs", "cosine", "error")
    print(f"{'engine':20}{'model':>7}" + "".join(f"{fact:>9}" for fact in facts))
    found, cores_elsewhere = {}, other_work()
    for engine in engines:
        for name, values in rows_of(engine, models, images, expected).items():
            print(f"{engine.name:20}{name:>7}" + "".join(f"{v:>9.4f}" for v in values), flush=True)
            found[f"{engine.name}, {name}"] = dict(zip(facts, values, strict=True))
    busy = f"{cores_elsewhere():.1f} cores busy elsewhere"
    print(busy)
    write_json(arguments.json, f"{machine}, {busy}", found)


def rows_of(
    engine: Engine, models: dict[str, Network], images: np.ndarray, expected: np.ndarray
) -> dict[str, tuple[float, ...]]:
    """The facts of each model in this engine, which opens each once."""
    engine = dataclasses.replace(engine, open=functools.cache(engine.open))
    rows, _ = measure(models, [engine], [1])
    found = {}
    for row in rows:
        prepare = engine.open(models[row.model])
        outputs = np.concatenate([prepare(image[None])() for image in images])
        error = ((outputs - expected) ** 2).sum() / (expected**2).sum()
        quality = cosines(outputs, expected).mean(), error
        times = row.ms, row.ratio, row.low, row.high
        found[row.model] = tuple(map(float, (*times, row.macs_share, *quality)))
    return found


if __name__ == "__main__":
    main()
