"""The stages of FLORA in order: filter, supernet, search, extract, finetune."""

import logging

import numpy as np

from flora_jax.data.sources import Source
from flora_jax.data.splits import hold_out
from flora_jax.evaluation import evaluate as evaluate_metrics
from flora_jax.io import folder
from flora_jax.io.files import read_json, write_json
from flora_jax.lowrank.cost import Cost
from flora_jax.lowrank.space import RankSpace
from flora_jax.lowrank.supernet import Supernet, extract, extract_ranks, factorize
from flora_jax.models.spec import Spec
from flora_jax.processes import Stopped, StopRequest, wait_for_all
from flora_jax.report.progress import Progress
from flora_jax.run import LATENCY_FILE, Run
from flora_jax.search.block_scores import score_block
from flora_jax.search.evolution import evolve
from flora_jax.search.filter import filter_space
from flora_jax.search.history import Candidate
from flora_jax.search.latency import measure, measure_networks, median_ratio

log = logging.getLogger(__name__)


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
    """Evolution inside the window of the budget, scored on held-out images."""
    supernet, settings = folder.load(run.folder / "supernet"), run.evolution_settings
    space = supernet.space
    cost, window = _budget(run, space)
    history = run.folder / "search/history.jsonl"
    # A header line and one for each generation; the progress display needs no more than this.
    start = max(0, history.read_bytes().count(b"\n") - 1) if history.exists() else 0

    def score(genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        metrics = evaluate_metrics(supernet, run.heldout_set, genes)
        return metrics[run.config.metric], metrics["top1"]

    total = settings.generations
    with (
        StopRequest() as stop_request,
        Progress("search", total=total, start=start, unit="generation") as progress,
    ):

        def on_generation(generation: int, members: list[Candidate]) -> None:
            progress.update(best_top1=max(member.top1 for member in members))
            if stop_request.is_set():
                raise Stopped(f"search is saved at generation {generation + 1} of {total}")

        seed = run.seed("search")
        best = evolve(space, score, cost, window, settings, seed, history, on_generation)
    found = {
        "generation": best.generation,
        "genes": best.genes,
        "macs": int(space.macs(best.genes)),
        "score": best.score,
        "top1": best.top1,
        "ranks": space.ranks(best.genes).tolist(),
    }
    if run.spends_latency:
        found["latency"] = _check_prediction(run, space.extracted_spec(best.genes), best.cost)
    write_json(run.folder / "search/best.json", found)


def _budget(run: Run, space: RankSpace) -> tuple[Cost, tuple[int, int]]:
    """What the search spends and the window for it; measures the latency table if need be."""
    if not run.spends_latency:
        return space.macs_cost, run.macs_window
    wait_for_all("latency.json is looked for")
    if not (run.folder / LATENCY_FILE).exists():  # a search that goes on keeps its table
        batch_size, dtype = run.config.search.latency_batch, run.config.finetune.compute_dtype
        table = measure(space, batch_size, dtype, dense=run.spec)
        write_json(run.folder / LATENCY_FILE, table.to_json())
    cost, window = run.latency_table.cost, run.latency_window
    least, most = cost.range_over(space.kept)
    if window[1] < least or window[0] > most:
        dense = 1e6 * run.latency_table.dense_ms
        raise ValueError(
            f"budget.latency {tuple(run.config.budget.latency)} cannot be reached: the space spans "
            f"{least / dense:.3f}..{most / dense:.3f} of the dense model's "
            f"{run.latency_table.dense_ms:.2f} ms on {run.latency_table.device}"
        )
    return cost, window


def _check_prediction(run: Run, subnet: Spec, predicted_ns: int) -> dict[str, float]:
    """The subnet as a whole, beside the dense model."""
    table, specs = run.latency_table, {"dense": run.spec, "subnet": subnet}
    ms = measure_networks(specs, table.batch_size, table.dtype)
    predicted = predicted_ns / 1e6 / table.dense_ms
    measured = median_ratio(ms["subnet"], ms["dense"])
    found = {
        "dense_ms": float(np.median(ms["dense"])),
        "subnet_ms": float(np.median(ms["subnet"])),
        "predicted_share": predicted,
        "measured_share": measured,
        "error": predicted / measured - 1,
    }
    log.info(
        "latency of the subnet: predicted %.3f of the dense model's, measured %.3f (%+.1f %%)",
        *(predicted, measured, 100 * found["error"]),
    )
    return found


def extract_subnets(run: Run) -> None:
    """The winner, and the uniform-rank baseline out of the same supernet or one of its own."""
    supernet = folder.load(run.folder / "supernet")
    best = read_json(run.folder / "search/best.json")
    folder.save(extract(supernet, best["genes"]), run.folder / "extract/subnet")
    if run.config.uniform_baseline == "none":
        return
    if run.config.uniform_baseline == "alone":
        supernet = factorize(run.base, run.regular_space)
    folder.save(extract_ranks(supernet, run.uniform_ranks), run.folder / "extract/uniform")


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
