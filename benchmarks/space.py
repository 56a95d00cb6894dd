"""Host-side speed of the rank space: costing a population, drawing inside a MAC window.

python benchmarks/space.py --model base
"""

import argparse
import time

import numpy as np

import flora_jax as flora
from flora_jax.report.table import human_count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "small", "base"), default="base")
    parser.add_argument("--population", type=int, default=1_000_000)
    parser.add_argument("--draws", type=int, default=1000)
    arguments = parser.parse_args()

    spec = flora.deit(arguments.model)
    space = flora.RankSpace.regular(spec)
    rng = np.random.default_rng(0)
    window = (0.43 * flora.macs(spec), 0.46 * flora.macs(spec))

    def report(what: str, work) -> None:
        started = time.perf_counter()
        work()
        print(f"{what:48}  {1000 * (time.perf_counter() - started):8.1f} ms")

    print(
        f"DeiT-{arguments.model}, {space.num_layers} layers, {len(space.kept[0])} triples a block"
    )
    genes = space.sample(rng, arguments.population)
    report(f"MACs of {human_count(len(genes))} genes", lambda: space.macs(genes))
    report(f"parameters of {human_count(len(genes))} genes", lambda: space.params(genes))
    report("first draw in a window, with its table", lambda: space.sample_within(rng, 1, window))
    report(
        f"{arguments.draws} draws in the window",
        lambda: space.sample_within(rng, arguments.draws, window),
    )


if __name__ == "__main__":
    main()
