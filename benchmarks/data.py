"""Images per second and core of the input pipeline, beside a plain Pillow loop.

    python benchmarks/data.py --json data.json

Reads photograph-like JPEGs of 500x375 pixels, about as large as ImageNet's, from class folders in
a temporary folder and makes batches of 224 px, with DeiT's augmentation to train and with the
resize and crop to evaluate. The floor is a loop over the files that decodes with Pillow, does the
same transform and stacks, and the limit two such loops at once, in processes that hand nothing
over. Against them: the pipeline with no worker (one thread), 1 and 2 workers. They take turns,
round after round; the table has medians. Two workers need two free cores. What all cores of a
host would feed supposes that each is as fast as those in use here.
"""

import argparse
import contextlib
import functools
import io
import itertools
import multiprocessing
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from common import describe_machine, parser_of, write_json
from PIL import Image

from flora_jax.data import augment, batches, subsets
from flora_jax.data.image_folder import image_folder
from flora_jax.data.sources import Source
from flora_jax.timing import median_ratio

SHAPE = (224, 224, 3)
WORKERS = {"0 workers": 0, "1 worker": 1, "2 workers": 2}
FLOOR, TWO_FLOORS = "plain loop", "2 plain loops"
UNTIMED = 8  # batches at the start, while workers come up one by one and fill their buffers

Pipelines = dict[str, Callable[[], Iterator]]


def main() -> None:
    parser = parser_of(__doc__, batch=32, rounds=5)
    parser.add_argument("--images", type=int, default=256, help="different images")
    parser.add_argument("--batches", type=int, default=16, help="of each pipeline in a round")
    parser.add_argument(
        "--appetite",
        type=float,
        default=3000,
        help="images/s that an accelerator trains on. The default is no measurement: it is "
        "assumed for a supernet step of DeiT-B in bfloat16 on one H200",
    )
    parser.add_argument("--cores", type=int, default=16, help="of the host of the accelerator")
    arguments = parser.parse_args()
    if not 1 <= arguments.batch <= arguments.images:
        parser.error(f"--batch must lie in 1..{arguments.images}, got {arguments.batch}")

    with tempfile.TemporaryDirectory() as folder:
        size = write_images(pathlib.Path(folder), arguments.images)
        pictures = f"JPEGs of 500x375 pixels and {size / 1000:.0f} kB"
        machine = describe_machine(pictures, f"batch {arguments.batch}")
        print(machine)
        source = image_folder(folder, "train", cache_dir=folder)
        paths = [pathlib.Path(folder) / source.key(index) for index in range(len(source))]
        train, evaluation = pipelines(source, paths, arguments.batch)
        train_times = measure(train, arguments)
        eval_times = measure(evaluation, arguments)
    print(
        f"{'':24}{'ms/image':>10}{'time':>8}{'images/s/core':>15}"
        f"{f'{arguments.cores} cores feed':>16} of {arguments.appetite:.0f} images/s"
    )
    ratios = {
        f"eval_{name}": ratio for name, ratio in print_table("eval", eval_times, arguments).items()
    }
    ratios |= print_table("train", train_times, arguments)
    write_json(arguments.json, machine, ratios)


def write_images(folder: pathlib.Path, count: int) -> float:
    """Smooth pictures with grain, in two classes. Returns their mean size in bytes."""
    rng = np.random.default_rng(0)
    sizes = []
    for index in range(count):
        smooth = rng.integers(256, size=(12, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(smooth).resize((500, 375), Image.Resampling.BICUBIC)
        grain = 24 * rng.standard_normal((375, 500, 1), np.float32)
        pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
        path = folder / "train" / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
        sizes.append(path.stat().st_size)
    return statistics.mean(sizes)


def pipelines(source: Source, paths: list[pathlib.Path], batch: int) -> tuple[Pipelines, Pipelines]:
    """To train and to evaluate: by name, what starts an endless iterator of batches."""
    train_transform = augment.Augmentation("deit", {"color_jitter": 0.0}).train(SHAPE)
    eval_transform = augment.Augmentation("deit").evaluation(SHAPE)
    # As many as ImageNet has, which also makes the shuffle of Grain, slow on few, as fast as there.
    source = subsets.subset(source, np.arange(1_281_167) % len(source))
    augmented = functools.partial(train_transform, rng=np.random.default_rng(0))
    train: Pipelines = {
        FLOOR: lambda: plain_loop(paths, augmented, batch),
        TWO_FLOORS: lambda: plain_loops(paths, augmented, batch, count=2),
    }
    evaluation: Pipelines = {
        FLOOR: lambda: plain_loop(paths, eval_transform, batch),
        TWO_FLOORS: lambda: plain_loops(paths, eval_transform, batch, count=2),
    }
    for name, n in WORKERS.items():
        train[name] = lambda n=n: batches.train_batches(
            source, train_transform, batch, seed=0, num_workers=n
        )
        evaluation[name] = lambda n=n: batches.eval_batches(
            source, eval_transform, batch, num_workers=n
        )
    return train, evaluation


def plain_loop(paths: list[pathlib.Path], transform: Callable, batch: int) -> Iterator:
    endless = itertools.cycle(paths)
    while True:
        images = []
        for path in itertools.islice(endless, batch):
            with Image.open(io.BytesIO(path.read_bytes())) as picture:
                images.append(transform(np.array(picture.convert("RGB"))))
        yield np.stack(images)


def plain_loops(
    paths: list[pathlib.Path], transform: Callable, batch: int, count: int
) -> Iterator[None]:
    """One item for every batch that one of `count` processes has made and thrown away."""
    context = multiprocessing.get_context("spawn")
    made = context.Queue(maxsize=count)
    processes = [
        context.Process(target=_count_batches, args=(made, paths, transform, batch), daemon=True)
        for _ in range(count)
    ]
    for process in processes:
        process.start()
    try:
        while True:
            yield made.get()
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _count_batches(
    made: multiprocessing.Queue, paths: list[pathlib.Path], transform: Callable, batch: int
) -> None:
    for _ in plain_loop(paths, transform, batch):
        made.put(None)


def measure(pipelines: Pipelines, arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """Milliseconds an image of every pipeline in every round. Each starts anew in every round."""
    times = {name: [] for name in pipelines}
    for _ in range(arguments.rounds):
        for name, start in pipelines.items():
            with contextlib.closing(start()) as iterator:
                for _ in range(UNTIMED):
                    next(iterator)
                started = time.perf_counter()
                for _ in range(arguments.batches):
                    next(iterator)
                elapsed = time.perf_counter() - started
            times[name].append(1000 * elapsed / (arguments.batches * arguments.batch))
    return {name: np.array(own) for name, own in times.items()}


def print_table(
    kind: str, times: dict[str, np.ndarray], arguments: argparse.Namespace
) -> dict[str, float]:
    """Returns the overhead over the floor without workers, how much faster two make it, and how
    much faster two loops are than one."""
    for name, own in times.items():
        milliseconds = np.median(own)
        cores = 2 if name == TWO_FLOORS else max(1, WORKERS.get(name, 1))
        per_core = 1000 / milliseconds / cores
        fed = arguments.cores * per_core / arguments.appetite
        print(
            f"{f'{kind}, {name}':24}{milliseconds:>10.2f}{median_ratio(own, times[FLOOR]):>8.2f}"
            f"{per_core:>15.0f}{f'{100 * fed:.0f} %':>16}"
        )
    return {
        "overhead_0_workers": median_ratio(times["0 workers"], times[FLOOR]) - 1,
        "speedup_2_workers": median_ratio(times["0 workers"], times["2 workers"]),
        "speedup_2_plain_loops": median_ratio(times[FLOOR], times[TWO_FLOORS]),
    }


if __name__ == "__main__":
    main()
