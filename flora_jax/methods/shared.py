"""Steps that methods share: the dense model at the start; cutting, fine-tuning, evaluation, export
and report at the end."""

import dataclasses
import logging
from collections.abc import Sequence

import jax.numpy as jnp
from etils import epath

from flora_jax.closed_form.compress import variants
from flora_jax.evaluation.evaluate import evaluate_images, top1
from flora_jax.evaluation.quality import commonest_share
from flora_jax.flora.space import RankSpace
from flora_jax.flora.supernet import Supernet, extract_ranks
from flora_jax.flora.svd import factorize
from flora_jax.io.files import read_json, write_json_once
from flora_jax.methods.evaluate import evaluate
from flora_jax.methods.export import export
from flora_jax.models.factory import create
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.runs.budgets import (
    LATENCY_FILE,
    PROBE,
    budgets_of,
    extracted_kinds,
    read_found,
    uniform_ranks,
)
from flora_jax.runs.checks import check_budget, check_not_chance
from flora_jax.runs.settings import SpaceSettings, Spending
from flora_jax.runs.workdir import TEST_IMAGES_FILE, After, Result, Run, SavedModel, Step
from flora_jax.training.probe import fit_classifier, has_no_classifier, with_classes_in_order
from flora_jax.training.settings import Recipe
from flora_jax.training.train import train
from flora_jax.weights import folder
from flora_jax.weights.export.engines import ENGINES, engine_of
from flora_jax.weights.export.latency import LatencyTable, measure
from flora_jax.weights.metadata.class_names import positions, read_class_names
from flora_jax.weights.pretrained import from_pretrained

log = logging.getLogger(__name__)


def start(run: Run) -> Result:
    """The dense model, read, trained, or both."""
    settings = run.settings
    recipe = settings.pretrain if settings.trains_dense else None
    return run.step(
        "pretrain",
        make_dense,
        *(run.spec, settings.pretrained, settings.probe_images, recipe),
        run.metric_of(settings.pretrain),
        saved=SavedModel("dense"),
    )


def make_dense(
    step: Step,
    spec: Spec,
    pretrained: str,
    probe_images: int,
    recipe: Recipe | None,
    metric: str,
) -> Network:
    """reads the dense model's weights, or trains it"""
    if pretrained:
        kept = None if recipe is None else step.run.folder / PROBE
        model = read_weights(step, spec, pretrained, probe_images, kept)
    else:
        model = create(spec, step.seed_of("create"))
    if recipe is not None:
        folder.save_description_once(model, step.directory)
        images, looks = step.images.train_set, step.images.looked_at()
        model = train(model, images, recipe, **step.training(), heldout=looks, metric=metric)
    if step.images.are_labelled:
        heldout = step.images.heldout_set
        predicted = evaluate_images(model, heldout)["predicted"]
        shares = (predicted == heldout.labels).mean(), commonest_share(heldout.labels)
        text = "dense model: %.2f %% top-1 held-out; the commonest class alone: %.2f %%"
        log.info(text, *(100 * share for share in shares))
        check_not_chance(step.run.settings, heldout.labels, predicted)
    return model


def read_weights(
    step: Step,
    spec: Spec,
    pretrained: str,
    probe_images: int,
    kept: epath.Path | None = None,
) -> Network:
    """The pretrained model, its classes in the order of the images' where both name the same.

    A classifier that has no weights yet is fitted to some training images; the model with this
    probe is kept, for a training that goes on from it.
    """
    if kept is not None and (kept / folder.SPEC_FILE).exists():
        return folder.load_model(kept)
    model, images = from_pretrained(pretrained, spec), step.images
    known, names = read_class_names(pretrained), images.class_names
    if len(known) == len(names) and not has_no_classifier(model):
        order = positions(names, known)
        if order is None:
            differing = next(pair for pair in zip(known, names, strict=True) if len({*pair}) > 1)
            log.warning(
                "%s and the images have other names of classes, such as %s for %s: taken to be in "
                "the same order",
                *(pretrained, *differing),
            )
        elif order != (*range(len(names)),):
            log.info("%s: its classes are put in the order of the images'", pretrained)
            model = with_classes_in_order(model, order)
    if not probe_images or not images.are_labelled or not has_no_classifier(model):
        return model
    normalization = images.train_set.normalization
    batches = images.labelled(probe_images, "probe")
    model = fit_classifier(model, ((normalization(jnp.asarray(i)), y) for i, y in batches))
    share = 100 * top1(model, images.heldout_set)
    log.info("new classifier, a linear probe: %.2f %% top-1 held-out", share)
    if kept is not None:
        folder.save_once(model, kept)
    return model


def inherited(run: Run, base: Result) -> Result:
    """The supernet of the plain SVD, as published."""
    return run.derived(inherit, base, run.settings.space)


def inherit(base: Network, space: SpaceSettings) -> Supernet:
    """Factors of the plain SVD."""
    return factorize(base, space.of(base.spec))


def latency_table(run: Run, choices: Result) -> Result | None:
    """The latencies of all choices in an engine; None where the budget is not latency.

    Args:
      choices: of a `RankSpace`, or of a network that the closed form cuts.
    """
    settings = run.settings
    return run.step(
        "latency",
        measure_latency,
        *(choices, run.spec, settings.spending, settings.latency.engine),
        *(settings.search.latency_batch, settings.finetune.compute_dtype),
        saved=SavedLatency(),
        when=settings.spends_latency,
    )


@dataclasses.dataclass(frozen=True)
class SavedLatency:
    """A `LatencyTable` as JSON."""

    path: str = LATENCY_FILE

    def save(self, folder: epath.Path, value: LatencyTable) -> None:
        write_json_once(folder / self.path, value.to_json())

    def load(self, folder: epath.Path) -> LatencyTable:
        return LatencyTable.from_json(read_json(folder / self.path))


def measure_latency(
    step: Step,
    choices: RankSpace | Network,
    dense: Spec,
    spending: Spending,
    engine: str,
    batch_size: int,
    dtype: str,
) -> LatencyTable:
    """measures the latency of every choice in the engine, where that is the budget"""
    of_all = choices.variants() if isinstance(choices, RankSpace) else variants(choices.spec)
    table = measure(of_all, engine_of(engine, dtype), batch_size, dense=dense)
    cost, whole = table.cost, f"{table.dense_ms:.2f} ms in {ENGINES[engine]} on {table.device}"
    reached = cost.least, int(cost(of_all.largest))
    if isinstance(choices, RankSpace):
        reached = cost.range_over(choices.kept)
    for budget in budgets_of(spending, dense, table):
        check_budget("latency", budget, reached, 1e6 * table.dense_ms, whole)
    return table


def cut_and_finish(
    run: Run,
    base: Result,
    inherited: Result,
    supernet: Result,
    winners: Result | None,
    allocated: Result | None,
    latency: Result | None,
) -> None:
    """Extract the subnets and their baselines, fine-tune, and finish."""
    settings = run.settings
    kinds, uniform = tuple(extracted_kinds(settings)), settings.uniform_baseline
    cut = run.step(
        "extract",
        extract_subnets,
        *(supernet, inherited if uniform == "alone" else None, run.spec, settings.spending),
        *(latency, winners, allocated, kinds),
    )
    alone = settings.supernet if uniform == "alone" else None
    tune_and_finish(run, base, cut, latency, alone)


def tune_and_finish(
    run: Run, base: Result, cut: Result, latency: Result | None = None, alone: Recipe | None = None
) -> None:
    """Fine-tune what was cut out, and finish."""
    settings = run.settings
    kinds = tuple(extracted_kinds(settings))
    tuned = run.step(
        "finetune",
        fine_tune,
        *(After(cut), base, run.spec, settings.spending, latency, kinds),
        *(settings.finetune, alone),
        run.metric_of(settings.finetune),
        leaves=("subnet*", "allocated*", "uniform*"),
        otherwise=cut,
    )
    finish(run, base, tuned, latency=latency)


def extract_subnets(
    step: Step,
    supernet: Supernet,
    inherited: Supernet | None,
    dense: Spec,
    spending: Spending,
    latency: LatencyTable | None,
    winners: list | dict,
    allocated: list | None,
    kinds: Sequence[str],
) -> None:
    """cuts out the subnets and their baselines"""
    budgets, found = budgets_of(spending, dense, latency), read_found(winners)
    ranks = {"subnet": [tuple(each.ranks) for each in found]}
    if "allocated" in kinds:
        ranks["allocated"] = [tuple(each.ranks) for each in read_found(allocated)]
    if "uniform" in kinds:
        ranks["uniform"] = uniform_ranks(budgets, found, supernet.space, latency is not None)
    for kind in kinds:
        source = supernet if kind != "uniform" or inherited is None else inherited
        for budget, own_ranks in zip(budgets, ranks[kind], strict=True):
            model = extract_ranks(source, own_ranks)
            folder.save_once(model, step.directory / budget.folder(kind))


def fine_tune(
    step: Step,
    cut: None,
    base: Network,
    dense: Spec,
    spending: Spending,
    latency: LatencyTable | None,
    kinds: Sequence[str],
    recipe: Recipe,
    alone: Recipe | None,
    metric: str,
) -> None:
    """trains them on, in the same way

    A uniform baseline of its own is first trained `alone` by the supernet's recipe. Allocated ranks
    that the subnet has, too, are not trained a second time.
    """
    workdir = step.run.folder

    def trained(model: Network, own: Recipe, name: str) -> Network:
        if not own.epochs:
            return model
        folder.save_description_once(model, workdir / name)
        looks = step.images.looked_at(folder.load_model(workdir / "dense"))
        return train(
            model,
            step.images.train_set,
            own,
            **step.training(name),
            teacher=base,
            heldout=looks,
            metric=metric,
        )

    for budget in budgets_of(spending, dense, latency):
        twin = budget.folder("subnet")
        for kind in kinds:
            name = budget.folder(kind)
            if (workdir / name / folder.SPEC_FILE).exists():
                continue
            model = folder.load_model(workdir / step.run.settings.cuts_by / name)
            if kind == "allocated" and model.spec == folder.load_spec(workdir / twin):
                folder.save_once(folder.load_model(workdir / twin), workdir / name)
                continue
            if kind == "uniform" and alone is not None:
                model = trained(model, alone, f"finetune/{name}_alone")
            model = trained(model, recipe, f"finetune/{name}")
            folder.save_once(model, workdir / name)


def finish(run: Run, *results: Result, latency: Result | None = None) -> None:
    """Evaluate on the test images, export, report."""
    settings, models = run.settings, After(*results)
    leaves = ("result.json", TEST_IMAGES_FILE, "benchmark.json")
    run.step("evaluate", evaluate, models, latency, bool(settings.pretrained), leaves=leaves)
    run.step("export", export, models, settings.export, when=bool(settings.export))
    leaves = ("report.html", "report.png", "slim.png")
    run.step("report", report, models, leaves=leaves, is_always_done=True)


def report(step: Step, models: None) -> None:
    """prints the table, writes report.html"""
    from flora_jax.report.report import report  # Matplotlib takes 0.4 seconds

    report(step.run, step.images)
