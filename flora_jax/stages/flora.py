"""The stages of FLORA in order: filter, supernet, search, extract, finetune."""

import dataclasses

import numpy as np

from flora_jax.data.sources import Source
from flora_jax.data.splits import hold_out
from flora_jax.evaluation import evaluate as evaluate_metrics
from flora_jax.io import folder
from flora_jax.io.files import read_json, write_json
from flora_jax.lowrank.supernet import Supernet, extract, extract_ranks, factorize
from flora_jax.report.progress import Progress
from flora_jax.run import Run
from flora_jax.search.block_scores import score_block
from flora_jax.search.evolution import evolve
from flora_jax.search.filter import filter_space


def filter_candidates(run: Run) -> None:
    """A local supernet per block scores its triples; the priced best are kept."""
    settings = run.config.filter
    space, full_rank = run.regular_space, run.regular_space.full_rank_genes.reshape(-1, 3)
    part = filter_part(run)
    inherited = factorize(run.base, space)
    scores = []
    with Progress("filter", total=space.num_blocks, unit="block") as progress:
        for block, triples in enumerate(space.kept):
            name = f"filter/block_{block:02d}"
            scores_file = run.folder / name / "scores.json"
            if not scores_file.exists():
                only_this_block = [full_rank[b : b + 1] for b in range(space.num_blocks)]
                only_this_block[block] = triples
                local = Supernet(inherited.network, space.keep(only_this_block))
                local = run.train_supernet(local, settings.train, name, "uniform", source=part)
                metrics = score_block(local, block, run.heldout_set)
                write_json(scores_file, {name: m.tolist() for name, m in metrics.items()})
            metrics = read_json(scores_file)
            scores.append(np.asarray(metrics[run.config.metric]))
            progress.update(best_top1=max(metrics["top1"]))
    kept, price = filter_space(space, scores, run.macs_window[1], settings.drop)
    write_json(
        run.folder / "filter/space.json",
        kept.to_json() | {"price": price, "kept_macs_range": kept.macs_range()},
    )


def filter_part(run: Run) -> Source:
    """The training images that local supernets see."""
    fraction = run.config.filter.train_fraction
    return hold_out(run.splits.train, fraction, run.seed("filter/part"))[1]


def train_supernet(run: Run) -> None:
    supernet = factorize(run.base, run.space)
    folder.save_description(supernet, run.folder / "supernet")
    run.train_supernet(supernet, run.config.supernet, "supernet", "low_rank_aware")


def search(run: Run) -> None:
    """Evolution inside the MAC window, scored on held-out images."""
    supernet, settings = folder.load(run.folder / "supernet"), run.evolution_settings
    history = run.folder / "search/history.jsonl"
    # A header line and one for each generation; the progress display needs no more than this.
    start = max(0, history.read_bytes().count(b"\n") - 1) if history.exists() else 0

    def score(genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        metrics = evaluate_metrics(supernet, run.heldout_set, genes)
        return metrics[run.config.metric], metrics["top1"]

    with Progress("search", total=settings.generations, start=start, unit="generation") as progress:
        best = evolve(
            supernet.space,
            score,
            run.macs_window,
            settings,
            run.seed("search"),
            history,
            lambda _, members: progress.update(best_top1=max(m.top1 for m in members)),
        )
    ranks = supernet.space.ranks(best.genes).tolist()
    write_json(run.folder / "search/best.json", dataclasses.asdict(best) | {"ranks": ranks})


def extract_subnets(run: Run) -> None:
    """The winner, and the uniform-rank baseline out of the same supernet or one of its own."""
    supernet = folder.load(run.folder / "supernet")
    best = read_json(run.folder / "search/best.json")
    folder.save(extract(supernet, best["genes"]), run.folder / "extract/subnet")
    if run.config.uniform_baseline == "none":
        return
    if run.config.uniform_baseline == "alone":
        supernet = factorize(run.base, run.regular_space)
    uniform_ranks = supernet.space.uniform_ranks_within(run.macs_window[1])
    folder.save(extract_ranks(supernet, uniform_ranks), run.folder / "extract/uniform")


def finetune(run: Run) -> None:
    """The subnet and the uniform-rank baseline, in the same way.

    A baseline of its own is first trained alone by the supernet's recipe.
    """
    models = {"subnet": folder.load(run.folder / "extract/subnet")}
    if run.config.uniform_baseline != "none":
        models["uniform"] = folder.load(run.folder / "extract/uniform")
    if run.config.uniform_baseline == "alone":
        folder.save_description(models["uniform"], run.folder / "finetune/uniform_alone")
        models["uniform"] = run.train(
            models["uniform"], run.config.supernet, "finetune/uniform_alone"
        )
    for name, model in models.items():
        folder.save_description(model, run.folder / "finetune" / name)
        model = run.train(model, run.config.finetune, f"finetune/{name}")
        folder.save(model, run.folder / name)
