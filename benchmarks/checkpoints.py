"""Cost of checkpoints: a supernet's training with them and without, in turn.

    python benchmarks/checkpoints.py --config digits

Both trainings save their last step; one also saves every so many, by default as its config says.
Batches, the teacher and the loop are the command line's; the weights are random. The cost is
the share of the time between two checkpoints that saving one adds: the copy of the state, for which
training waits, and what the writing thread takes of the cores.
"""

import dataclasses
import importlib
import itertools
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np
from common import describe_machine, parser_of, write_json

import flora_jax as flora
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings, network_spec
from flora_jax.timing import median_ratio, time_in_turn


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--config", default="digits", help="a module of configs/")
    parser.add_argument("--every", type=int, help="steps between checkpoints; or the config's")
    parser.add_argument("--intervals", type=int, default=3, help="between saves in a training")
    arguments = parser.parse_args()
    if arguments.intervals < 2:
        parser.error(f"--intervals must be at least 2, got {arguments.intervals}")

    config = importlib.import_module(f"flora_jax.configs.{arguments.config}").get_config()
    settings = Settings.from_config(config)
    every = arguments.every or settings.supernet.checkpoint_every
    steps = arguments.intervals * every
    machine = describe_machine(f"{arguments.config}, a checkpoint every {every} steps")
    print(machine)
    with tempfile.TemporaryDirectory() as directory:
        train = make_training(settings, pathlib.Path(directory), steps)
        work = {"with": lambda: train(every), "without": lambda: train(steps)}
        times = time_in_turn(work, arguments.rounds)
    for name, milliseconds in times.items():
        print(f"{name}: {np.median(milliseconds) / steps:.2f} ms a step")
    saves = arguments.intervals - 1  # the last one is in both
    added = median_ratio(times["with"], times["without"]) - 1
    print(f"a checkpoint adds {added * np.median(times['without']) / saves:.0f} ms")
    cost = added * arguments.intervals / saves
    print(f"cost of checkpoints {100 * cost:.2f} %")
    write_json(arguments.json, machine, {"checkpoint_cost": cost})


def make_training(settings: Settings, folder: pathlib.Path, steps: int) -> Callable[[int], None]:
    """Trains `steps` steps anew, with a checkpoint every so many."""
    spec, images = network_spec(settings), Images(settings).train_set
    dense = flora.create(spec)
    supernet = flora.factorize(dense, settings.space.of(spec))
    epochs = steps * settings.supernet.batch_size / len(images)
    numbers = itertools.count()

    def train(every: int) -> None:
        recipe = dataclasses.replace(settings.supernet, epochs=epochs, checkpoint_every=every)
        directory = folder / f"training_{next(numbers)}"
        flora.train(supernet, images, recipe, directory=directory, teacher=dense)

    return train


if __name__ == "__main__":
    main()
