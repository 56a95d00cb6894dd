"""The stages of FLORA in order: filter, supernet, search, extract, finetune."""

import logging

import numpy as np

from flora_jax.cluster.processes import Stopped, StopRequest, wait_for_all
from flora_jax.evaluation import evaluate as evaluate_metrics
from flora_jax.io.files import read_json, write_json_once
from flora_jax.io.json_lines import read_lines
from flora_jax.lowrank.space import RankSpace
from flora_jax.lowrank.supernet import Supernet, extract, extract_ranks, factorize
from flora_jax.models.spec import Spec
from flora_jax.progress import Progress
from flora_jax.search.block_scores import score_block
from flora_jax.search.evolution import evolve
from flora_jax.search.filter import filter_space
from flora_jax.search.history import Candidate
from flora_jax.search.latency import LatencyTable, measure, measure_networks
from flora_jax.stages.budget import (
    LATENCY_FILE,
    check_latency_budget,
    latency_window,
    load_latency_table,
    load_uniform_ranks,
    macs_window,
)
from flora_jax.stages.images import Images
from flora_jax.stages.run import Run, load_base, load_regular_space, load_space
from flora_jax.stages.training import train_stage, train_supernet
from flora_jax.timing import median_ratio
from flora_jax.weights import folder

log = logging.getLogger(__name__)


def filter_candidates(run: Run, images: Images) -> None:
    """A local supernet per block scores its triples; the priced best are kept."""
    settings, base, part = run.settings.filter, load_base(run), images.filter_part()
    space = run.settings.space.of(base.spec)
    full_rank = space.full_rank_triples
    inherited = factorize(base, space)
    scores = []
    with Progress("filter", total=space.num_blocks, unit="block") as progress:
        for block, triples in enumerate(space.kept):
            name = f"filter/block_{block:02d}"
            scores_file = run.folder / name / "scores.json"
            if not scores_file.exists():
                only_this_block = [full_rank[b : b + 1] for b in range(space.num_blocks)]
                only_this_block[block] = triples
                local = Supernet(inherited.network, space.keep(only_this_block))
                local = train_supernet(
                    run, local, settings.train, name, part, law="uniform", teacher=base
                )
                metrics = score_block(local, block, images.heldout_set)
                write_json_once(scores_file, {name: m.tolist() for name, m in metrics.items()})
            metrics = read_json(scores_file)
            scores.append(np.asarray(metrics[run.settings.metric]))
            progress.update(best_top1=max(metrics["top1"]))
    budget = macs_window(run.settings, run.spec)[1]
    kept, price = filter_space(space, scores, budget, settings.drop)
    write_json_once(
        run.folder / "filter/space.json",
        kept.to_json() | {"price": price, "kept_macs_range": kept.macs_range()},
    )


def train_whole_supernet(run: Run, images: Images) -> None:
    """Trains every subnet of the kept triples at once."""
    base = load_base(run)
    supernet, recipe = factorize(base, load_space(run)), run.settings.supernet
    folder.save_description_once(supernet, run.folder / "supernet")
    train_supernet(
        run, supernet, recipe, "supernet", images.train, law="low_rank_aware", teacher=base
    )


def search(run: Run, images: Images) -> None:
    """Evolves subnets inside the window of the budget, scored on held-out images."""
    supernet, settings = folder.load_supernet(run.folder / "supernet"), run.settings.search
    space, table = supernet.space, None
    cost, window = space.macs_cost, macs_window(run.settings, run.spec)
    if run.settings.searches_by_latency:
        table = _latency_table(run, space)
        cost, window = table.cost, latency_window(run.settings, table)
    history = run.folder / "search/history.jsonl"
    total, start = settings.generations, max(0, len(read_lines(history)) - 1)  # behind the header

    def score(genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        metrics = evaluate_metrics(supernet, images.heldout_set, genes)
        return metrics[run.settings.metric], metrics["top1"]

    with (
        StopRequest() as stop_request,
        Progress("search", total=total, start=start, unit="generation") as progress,
    ):

        def on_generation(generation: int, members: list[Candidate]) -> None:
            progress.update(best_top1=max(member.top1 for member in members))
            if stop_request.is_set():
                raise Stopped(f"search is saved at generation {generation + 1} of {total}")

        seed = run.settings.seed_of("search")
        [best] = evolve(
            space, score, cost, [window], settings.evolution, seed, history, on_generation
        )
    found = {
        "generation": best.generation,
        "genes": best.genes,
        "macs": int(space.macs(best.genes)),
        "score": best.score,
        "top1": best.top1,
        "ranks": space.ranks(best.genes).tolist(),
    }
    if table is not None:
        subnet = space.extracted_spec(best.genes)
        found["latency"] = _check_prediction(table, run.spec, subnet, best.cost)
    write_json_once(run.folder / "search/best.json", found)


def _latency_table(run: Run, space: RankSpace) -> LatencyTable:
    """Measures the table once: a search that goes on keeps it."""
    wait_for_all("latency.json is looked for")
    if not (run.folder / LATENCY_FILE).exists():
        batch_size, dtype = run.settings.search.latency_batch, run.settings.finetune.compute_dtype
        table = measure(space, batch_size, dtype, dense=run.spec)
        write_json_once(run.folder / LATENCY_FILE, table.to_json())
    table = load_latency_table(run)
    check_latency_budget(run.settings, table, space)
    return table


def _check_prediction(
    table: LatencyTable, dense: Spec, subnet: Spec, predicted_ns: int
) -> dict[str, float]:
    """Times the subnet as a whole beside the dense model, and compares with the table."""
    specs = {"dense": dense, "subnet": subnet}
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


def extract_subnets(run: Run, images: Images) -> None:
    """Cuts out the winner, and the uniform-rank baseline out of the same supernet or its own."""
    supernet = folder.load_supernet(run.folder / "supernet")
    best = read_json(run.folder / "search/best.json")
    folder.save_once(extract(supernet, best["genes"]), run.folder / "extract/subnet")
    if run.settings.uniform_baseline == "none":
        return
    space = load_regular_space(run)
    if run.settings.uniform_baseline == "alone":
        supernet = factorize(load_base(run), space)
    uniform = extract_ranks(supernet, load_uniform_ranks(run, space))
    folder.save_once(uniform, run.folder / "extract/uniform")


def finetune(run: Run, images: Images) -> None:
    """Fine-tunes the subnet and the uniform-rank baseline, in the same way.

    A baseline of its own is first trained alone by the supernet's recipe.
    """
    settings, teacher = run.settings, load_base(run)
    models = {"subnet": folder.load_model(run.folder / "extract/subnet")}
    if settings.uniform_baseline != "none":
        models["uniform"] = folder.load_model(run.folder / "extract/uniform")

    def train(model, recipe, name):
        folder.save_description_once(model, run.folder / name)
        return train_stage(run, model, recipe, name, images.train, teacher=teacher)

    if settings.uniform_baseline == "alone":
        alone = "finetune/uniform_alone"
        models["uniform"] = train(models["uniform"], settings.supernet, alone)
    for name, model in models.items():
        model = train(model, settings.finetune, f"finetune/{name}")
        folder.save_once(model, run.folder / name)
