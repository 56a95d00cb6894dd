"""The stages of FLORA but for the search: filter, supernet, allocate, extract, finetune."""

import jax.numpy as jnp
import numpy as np
from etils import epath

from flora_jax.closed_form.allocate import allocate_by, full_rank_drops, multiplier_path
from flora_jax.closed_form.sensitivity import Sensitivity
from flora_jax.cluster.processes import wait_for_all
from flora_jax.flora.block_scorer import local_supernet, score_block
from flora_jax.flora.filter import filter_space
from flora_jax.flora.sampling import Draw, nested_law, sandwich_law, space_law
from flora_jax.flora.supernet import Supernet, extract_ranks
from flora_jax.io.files import read_json, write_json_once
from flora_jax.models.network import Network
from flora_jax.progress import Progress
from flora_jax.runs.images import Images
from flora_jax.stages.budget import (
    ALLOCATION_FILE,
    budget_cost,
    extracted_kinds,
    load_budgets,
    load_ranks,
    load_uniform_ranks,
    macs_budgets,
    winners_file,
)
from flora_jax.stages.measured import evaluators, heldout
from flora_jax.stages.run import (
    Run,
    load_base,
    load_inherited,
    load_regular_space,
    load_shared,
    load_space,
)
from flora_jax.stages.training import train_stage, train_supernet
from flora_jax.training.settings import Recipe
from flora_jax.weights import folder


def filter_candidates(run: Run, images: Images) -> None:
    """A local supernet per block scores its triples; the priced best are kept."""
    settings, base, part = run.settings.filter, load_base(run), images.filter_part()
    space = run.settings.space.of(base.spec)
    inherited = Supernet(load_inherited(run).network, space)
    heldout_set, scores = heldout(run, images), []
    metric, shown = heldout_set.quality.metric(run.settings.metric), heldout_set.quality.shown.name
    with Progress("filter", total=space.num_blocks, unit="block") as progress:
        for block in range(space.num_blocks):
            name = f"filter/block_{block:02d}"
            scores_file = run.folder / name / "scores.json"
            if not scores_file.exists():
                local = local_supernet(inherited, block)
                draw_genes = space_law(
                    local.space, "uniform", run.settings.seed_of(f"{name}/genes")
                )
                local = train_supernet(
                    run, local, settings.train, name, part, draw_genes=draw_genes, teacher=base
                )
                metrics = score_block(local, block, heldout_set)
                write_json_once(scores_file, {name: m.tolist() for name, m in metrics.items()})
            metrics = read_json(scores_file)
            scores.append(metric.score(np.asarray(metrics[metric.name])))
            progress.update(1, **{f"best_{shown}": max(metrics[shown])})
    budgets = [budget.window[1] for budget in macs_budgets(run.settings, run.spec)]
    kept, prices = filter_space(space, scores, budgets, settings.drop)
    write_json_once(
        run.folder / "filter/space.json",
        kept.to_json() | {"prices": prices, "kept_macs_range": kept.macs_range()},
    )


def train_whole_supernet(run: Run, images: Images) -> None:
    """Trains every subnet of the kept triples at once."""
    supernet = Supernet(load_inherited(run).network, load_space(run))
    folder.save_description_once(supernet, run.folder / "supernet")
    draw_genes = _law(run, images, supernet)
    recipe, base = run.settings.supernet, load_base(run)
    supernet = train_supernet(
        run,
        supernet,
        recipe,
        "supernet",
        images.train,
        draw_genes=draw_genes,
        teacher=base,
        evaluators=evaluators(run, images, supernet.space),
    )
    folder.save_trained_once(supernet, run.folder / "supernet")


def _law(run: Run, images: Images, supernet: Supernet) -> Draw:
    """Which subnet each step trains."""
    law, space = run.settings.supernet_law, supernet.space
    seed = run.settings.seed_of("supernet/genes")
    if law == "sandwich":
        return sandwich_law(space, seed)
    if law == "nested":
        sensitivity = _sensitivity(run, images, supernet)
        drops = _load_drops(sensitivity, run.folder / "supernet/drops.json")
        return nested_law(space, multiplier_path(drops, space.macs_cost), seed)
    return space_law(space, law, seed)


def allocate(run: Run, images: Images) -> None:
    """Finds the ranks of least measured drop for each budget, without training."""
    supernet = Supernet(load_shared(run).network, load_space(run))
    space = supernet.space
    cost = budget_cost(run, space)
    sensitivity = _sensitivity(run, images, supernet)
    drops = _load_drops(sensitivity, run.folder / "allocate/drops.json")
    most = [budget.window[1] for budget in load_budgets(run)]
    found = [
        {
            "genes": genes.tolist(),
            "macs": int(space.macs(genes)),
            "ranks": space.ranks(genes).tolist(),
        }
        for genes in allocate_by(sensitivity, drops, cost, most)
    ]
    write_json_once(run.folder / ALLOCATION_FILE, found)


def _sensitivity(run: Run, images: Images, supernet: Supernet) -> Sensitivity:
    number, normalization = run.settings.allocation.images, run.settings.data.normalization
    batches = images.unseen(number, "allocate")
    normalized = (np.asarray(normalization(jnp.asarray(batch))) for batch in batches)
    return Sensitivity(supernet, normalized, reference=load_base(run))


def _load_drops(sensitivity: Sensitivity, file: epath.Path) -> list[np.ndarray]:
    """What each choice of each layer spoils alone, measured once and kept in a file."""
    wait_for_all("drops are looked for")
    if not file.exists():
        write_json_once(file, [drops.tolist() for drops in full_rank_drops(sensitivity)])
    return [np.array(drops) for drops in read_json(file)]


def extract_subnets(run: Run, images: Images) -> None:
    """Cuts out the subnet and the baselines of each budget."""
    supernet, kinds = load_shared(run), extracted_kinds(run.settings)
    ranks = {"subnet": load_ranks(run, winners_file(run.settings))}
    if "allocated" in kinds:
        ranks["allocated"] = load_ranks(run, ALLOCATION_FILE)
    if "uniform" in kinds:
        ranks["uniform"] = load_uniform_ranks(run, load_regular_space(run))
    for kind in kinds:
        is_alone = kind == "uniform" and run.settings.uniform_baseline == "alone"
        source = load_inherited(run) if is_alone else supernet
        for budget, own_ranks in zip(load_budgets(run), ranks[kind], strict=True):
            model = extract_ranks(source, own_ranks)
            folder.save_once(model, run.folder / "extract" / budget.folder(kind))


def finetune(run: Run, images: Images) -> None:
    """Fine-tunes the subnet of each budget and its baselines, in the same way.

    A uniform baseline of its own is first trained alone by the supernet's recipe. Allocated ranks
    that the subnet has, too, are not trained a second time.
    """
    settings, teacher = run.settings, load_base(run)

    def train(model: Network, recipe: Recipe, name: str) -> Network:
        if not recipe.epochs:
            return model
        folder.save_description_once(model, run.folder / name)
        looks = evaluators(run, images)
        return train_stage(
            run, model, recipe, name, images.train, teacher=teacher, evaluators=looks
        )

    for budget in load_budgets(run):
        for kind in extracted_kinds(settings):
            name = budget.folder(kind)
            if (run.folder / name / folder.SPEC_FILE).exists():
                continue
            model, twin = folder.load_model(run.folder / "extract" / name), budget.folder("subnet")
            if kind == "allocated" and model.spec == folder.load_spec(run.folder / twin):
                folder.save_once(folder.load_model(run.folder / twin), run.folder / name)
                continue
            if kind == "uniform" and settings.uniform_baseline == "alone":
                model = train(model, settings.supernet, f"finetune/{name}_alone")
            model = train(model, settings.finetune, f"finetune/{name}")
            folder.save_once(model, run.folder / name)
