"""Successive halving measured: searches of finished runs, done anew with it and without.

    python benchmarks/halving.py runs/seeds/seed_0 runs/seeds/seed_1 --seeds 0 1 2

Each search once with all candidates scored on all held-out images, then with those stopped that are
a number of standard errors behind. The winners are compared on all held-out images, and, where the
run allocates, on the test images beside the allocated ranks; an interval is one of 95 %. The lead
that the best candidate has by luck, if none were better than the allocated ranks, comes from images
drawn anew, with each candidate's own mean lead taken away.
"""

import dataclasses
import pathlib
import tempfile
import time

import numpy as np
from common import parser_of, write_json

import flora_jax as flora
from flora_jax.data.subsets import shuffled, subset
from flora_jax.evaluation.comparison import paired_interval
from flora_jax.evaluation.evaluate import evaluate_images
from flora_jax.flora.evolution import image_scores, search
from flora_jax.flora.extras.halving import DEVIATIONS, ImageScores, rungs_of
from flora_jax.flora.extras.warm_start import first_population
from flora_jax.runs.budgets import ALLOCATION_FILE, load_budgets, load_found
from flora_jax.runs.images import Images
from flora_jax.runs.workdir import Run
from flora_jax.timing import describe_device


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="folders of finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the search")
    parser.add_argument("--deviations", type=float, nargs="+", default=[DEVIATIONS])
    parser.add_argument(
        "--more_images", action="store_true", help="score on test images, too (runs on the digits)"
    )
    arguments = parser.parse_args()

    print("run     seed  errors  images seen  of the time  winner's score, minus without stopping")
    found = []
    for folder in arguments.runs:
        compared = Comparison(folder, arguments.more_images)
        for seed in arguments.seeds:
            found += [compared.search(seed, errors) for errors in arguments.deviations]
    for errors in arguments.deviations:
        own = [row for row in found if row["errors"] == errors]
        same = sum(row["is_same"] for row in own)
        level = sum(row["high"] >= 0 for row in own)
        shares = [np.mean([row[name] for row in own]) for name in ("images", "time")]
        lead = np.mean([row["lead"] for row in own])
        print(
            f"{errors:g} errors: {100 * shares[0]:.0f} % of the images, {100 * shares[1]:.0f} % of "
            f"the time, the same winner in {same} and a level one in {level} of {len(own)}, mean "
            f"difference {lead:+.5f}"
        )
    default = [row for row in found if row["errors"] == arguments.deviations[0]]
    ratios = {name: float(np.mean([row[name] for row in default])) for name in ("images", "time")}
    write_json(arguments.json, describe_device(), ratios)


class Comparison:
    """A finished run, searched again."""

    def __init__(self, folder: pathlib.Path, more_images: bool):
        self.run, self.name = Run.open(folder), folder.name
        self.supernet = flora.load(folder / "supernet")
        self.space = self.supernet.space
        images = Images(self.run.settings)
        self.test = images.evaluation_set(images.splits.test)
        self.window = load_budgets(self.run)[0].window
        parts = images.heldout_parts
        if more_images:
            heldout, test = images.splits.heldout, images.splits.test
            rows = [heldout.source.indices[heldout.indices], test.indices]
            both = subset(test.source, np.concatenate(rows))
            parts = images.evaluation_set(shuffled(both, 0), rungs_of(len(both))[0])
        self.scores = image_scores(self.supernet, parts, self.run.settings.metric)
        self.scores.of(self.space.full_rank_genes[None], 0, 1)  # compiles
        self.allocated: tuple[int, ...] = ()
        if "allocate" in self.run.settings.stages:
            self.allocated = tuple(load_found(self.run, ALLOCATION_FILE)[0].genes)
        self.of_images = np.empty((0, self.scores.num_images))  # of the last search of all images
        self.without: dict[int, tuple[float, int, tuple[int, ...]]] = {}

    def search(self, seed: int, errors: float) -> dict[str, float]:
        if seed not in self.without:
            whole = dataclasses.replace(self.scores, rungs=(self.scores.num_images,))
            self.without[seed] = self.timed(whole, seed)
            if self.allocated:
                self.beside_allocated(seed)
        halved = dataclasses.replace(self.scores, deviations=errors)
        (seconds, images, ours), (all_seconds, all_images, theirs) = (
            self.timed(halved, seed),
            self.without[seed],
        )
        lead, low, high = self.difference(ours, theirs)
        print(
            f"{self.name:8}{seed:4d}{errors:8g}{images / all_images:13.3f}"
            f"{seconds / all_seconds:13.3f}  {lead:+.5f} ({low:+.5f}..{high:+.5f})"
            f"{'  the same' if ours == theirs else ''}",
            flush=True,
        )
        return {
            "errors": errors,
            "images": images / all_images,
            "time": seconds / all_seconds,
            "is_same": ours == theirs,
            "lead": lead,
            "high": high,
        }

    def timed(self, scores: ImageScores, seed: int) -> tuple[float, int, tuple[int, ...]]:
        """Seconds, images scored over all candidates, and the winner's genes."""
        every: list[np.ndarray] = []

        def counted(genes, start, stop):
            found = scores.of(genes, start, stop)
            every.append(found[0])
            return found

        settings, started = self.run.settings.search.evolution, time.perf_counter()
        first = None
        if self.allocated:
            rng = np.random.default_rng(self.run.settings.seed_of("search/first"))
            allocated = [np.array(self.allocated, np.int32)]
            first = first_population(self.space, allocated, settings.population, rng)
        with tempfile.TemporaryDirectory() as folder:
            [best] = search(
                self.space,
                dataclasses.replace(scores, of=counted),
                self.space.macs_cost,
                [self.window],
                settings,
                seed,
                pathlib.Path(folder) / "history.jsonl",
                first=first,
            )
        seconds = time.perf_counter() - started
        if not scores.halves:
            self.of_images = np.concatenate(every)
        return seconds, sum(found.size for found in every), best.genes

    def difference(self, ours, theirs) -> tuple[float, float, float]:
        score, _ = self.scores.checked(
            np.array([ours, theirs], np.int32), 0, self.scores.num_images
        )
        return paired_interval(score[0] - score[1])

    def leads(self, winner) -> tuple[float, np.ndarray]:
        """In standard errors: the winner's, and what the best of equals would have by luck."""
        genes, n = np.array([winner, self.allocated], np.int32), self.scores.num_images
        ours, allocated = self.scores.checked(genes, 0, n)[0]
        differences = self.of_images - allocated
        errors = differences.std(axis=1) / n**0.5
        differences = (differences - differences.mean(axis=1, keepdims=True))[errors > 0]
        rng = np.random.default_rng(0)
        draws = [np.bincount(rng.integers(n, size=n), minlength=n) / n for _ in range(500)]
        best = [(differences @ draw / errors[errors > 0]).max() for draw in draws]
        own = ours - allocated
        return own.mean() / own.std() * n**0.5, np.percentile(best, (50, 90, 95))

    def beside_allocated(self, seed: int) -> None:
        """Prints the lead of the winner without stopping, held out and on the test images."""
        winner = self.without[seed][2]
        own, lucky = self.leads(winner)
        print(
            f"{self.name:8}{seed:4d}  the winner leads the allocated ranks by {own:.2f} standard "
            f"errors, the best of {len(self.of_images)} equals by {lucky[0]:.2f} in half of all "
            f"searches, {lucky[1]:.2f} in 1 of 10, {lucky[2]:.2f} in 1 of 20"
        )
        told = _told(self.difference(winner, self.allocated))
        found = evaluate_images(
            self.supernet, self.test, np.array([winner, self.allocated], np.int32)
        )
        tested = [
            _told(paired_interval(np.subtract(*np.float64(found[name]))))
            for name in ("log_likelihood", "is_correct")
        ]
        print(
            f"{self.name:8}{seed:4d}  winner minus allocated: held out {told}, on test images "
            f"log-likelihood {tested[0]}, top-1 {tested[1]}",
            flush=True,
        )


def _told(interval: tuple[float, float, float]) -> str:
    return "{:+.4f} ({:+.4f}..{:+.4f})".format(*interval)


if __name__ == "__main__":
    main()
