"""Start of the factors, before any training: a real network at low rank beside its dense self.

    python benchmarks/dinov2.py --out runs/material/dinov2_vits14
    python benchmarks/start.py --folder runs/material/dinov2_vits14 --splits 3

Splits the photographs at random; factors and ranks see crops of two thirds of them, and what is
printed is the mean cosine between the class tokens of the dense network and of the low-rank one on
crops of the others: for the plain SVD and for activation-aware factors at uniform ranks, and for
ranks that `flora.allocate` found at the same MACs. Shrinkages and numbers of calibration crops can
be compared with --shrinkages and --crops.
"""

import argparse
import dataclasses
import pathlib
import sys

import numpy as np
from common import describe_machine, parser_of, write_json
from dinov2 import cosines, crops, load, normalise, photographs

import flora_jax as flora
from flora_jax.closed_form.calibrate import SHRINKAGE

EIGHTHS = tuple(eighth / 8 for eighth in range(1, 9))
HELDOUT_CROPS = 8  # of each photograph


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--crops", type=int, default=6, help="of each photograph, to calibrate")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1 / 4, 1 / 2])
    parser.add_argument("--allocate", type=float, nargs="*", default=[1 / 4], help="as --ratios")
    parser.add_argument("--shrinkages", type=float, nargs="+", default=[SHRINKAGE])
    arguments = parser.parse_args()

    model = load(arguments.folder, arguments.image_size)
    splits = []
    for seed in range(arguments.splits):
        splits.append(measure_split(model, seed, arguments))
        print_cosines(f"split {seed}", splits[-1])
    mean = {name: float(np.mean([split[name] for split in splits])) for name in splits[0]}
    print_cosines("mean", mean)
    size = f"{arguments.image_size} px"
    write_json(arguments.json, describe_machine("float32", size), mean)


def measure_split(model, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Mean cosines by name, on crops of photographs that neither factors nor ranks have seen."""
    rng, photos = np.random.default_rng(seed), photographs()
    order = rng.permutation(sorted(photos)).tolist()
    seen, unseen = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]

    def some_crops(names: list[str], number: int) -> np.ndarray:
        found = [crops(photos[name], arguments.image_size, number, rng) for name in names]
        return normalise(np.concatenate(found))

    to_calibrate, to_allocate = (some_crops(seen, arguments.crops) for _ in range(2))
    images = some_crops(unseen, HELDOUT_CROPS)
    dense = np.asarray(model(images))
    space = flora.RankSpace.regular(model.spec, EIGHTHS)
    calibration = flora.calibrate(model, to_calibrate)
    starts = {"plain": flora.factorize(model, space)}
    for shrinkage in arguments.shrinkages:
        weighed = dataclasses.replace(calibration, shrinkage=shrinkage)
        starts[f"aware, shrinkage {shrinkage:g}"] = flora.factorize(
            model, space, calibration=weighed
        )

    def same_everywhere(ratio: float) -> np.ndarray:
        return np.full(space.num_layers, EIGHTHS.index(ratio))

    def agreement(supernet: flora.Supernet, genes: np.ndarray) -> float:
        return float(cosines(np.asarray(supernet(images, genes)), dense).mean())

    found = {}
    for start, supernet in starts.items():
        for ratio in arguments.ratios:
            found[f"uniform {ratio:g}, {start}"] = agreement(supernet, same_everywhere(ratio))
        if arguments.allocate and start != "plain":
            budgets = [int(space.macs(same_everywhere(ratio))) for ratio in arguments.allocate]
            every = flora.allocate(supernet, to_allocate, macs=budgets, measure="squared_error")
            for ratio, genes in zip(arguments.allocate, every, strict=True):
                logits = np.asarray(supernet(images, genes))
                found[f"allocated at the MACs of {ratio:g}, {start}"] = float(
                    cosines(logits, dense).mean()
                )
    return found


def print_cosines(title: str, found: dict[str, float]) -> None:
    print(title)
    for name, value in found.items():
        print(f"  {value:.3f}  {name}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
