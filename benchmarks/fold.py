"""Accuracy right after the cut: with the gates folded into the weights, and with hard 0/1 gates.

    python benchmarks/fold.py runs/seeds_slim/seed_0 runs/seeds_slim/seed_1

Each argument is the folder of a finished run with a slim stage, made with
--config.keep_checkpoints=True. Held-out top-1, before retraining.
"""

import argparse
import pathlib
import sys

import flora_jax as flora
from flora_jax.runs.images import Images
from flora_jax.stages.run import Run, load_dense
from flora_jax.stages.slim import choose_masks, train_gates
from flora_jax.weights.folder import CHECKPOINTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    arguments = parser.parse_args()
    print("| run | gated, nothing cut | cut, folded | cut, 0/1 | retrained |")
    print("|---|---|---|---|---|")
    for folder in arguments.runs:
        run = Run.open(folder)
        if not (folder / "slim/gates" / CHECKPOINTS).exists():
            sys.exit(f"{folder} kept no gates: run it with --config.keep_checkpoints=True")
        images, dense = Images(run.settings), load_dense(run)
        gated = train_gates(run, images, dense)  # done already: read from its last checkpoint
        masks = choose_masks(run.settings.slim, dense.spec, gated)
        models = [
            gated.network,
            flora.slim.extract(gated, masks, fold=True),
            flora.slim.extract(gated, masks, fold=False),
            flora.load(folder / "slim"),
        ]
        shares = [100 * flora.top1(model, images.heldout_set) for model in models]
        print(f"| {folder.name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")


if __name__ == "__main__":
    main()
