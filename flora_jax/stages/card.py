"""What the card of a model says, out of the settings and the results of its run."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from flora_jax.evaluation.quality import quality_of
from flora_jax.io.files import read_json
from flora_jax.io.paths import absolute, as_text
from flora_jax.models.spec import Spec
from flora_jax.report.card import Card, card_text
from flora_jax.report.table import named_entries
from flora_jax.runs.budgets import (
    ALLOCATED,
    WINNERS_FILE,
    Budget,
    Finished,
    load_budgets,
    load_found,
)
from flora_jax.runs.model_files import EVALUATION_FILE
from flora_jax.runs.workdir import Run
from flora_jax.training.settings import Recipe
from flora_jax.weights.hub import is_repository, repository_name

_WEIGHTS = re.compile(r"\.(safetensors|pth|pt|bin)$")


def card_of(
    run: Run,
    found: Finished,
    spec: Spec,
    class_names: Sequence[str],
    coarse: Mapping[str, float] | None = None,
) -> str:
    """The card of a finished model of the run, as Markdown.

    Args:
      coarse: top-1 in 0..1 of the files of lower precision, by the kind of export.
    """
    settings, path = run.settings, run.folder / "result.json"
    entries = named_entries(read_json(path)) if path.exists() else {}
    evaluation = run.folder / found.folder / EVALUATION_FILE
    against_dense = entries.get(found.name, {}).get("against", {}).get("dense", {})
    is_compressed = found.kind in ("slim", "subnet")
    card = Card(
        title=f"{as_text(absolute(run.folder).name)}: {found.name}",
        spec=spec,
        dense=run.spec if is_compressed else None,
        base_model=base_model(settings.pretrained),
        dataset=dataset_name(settings.data.name),
        preprocessing=settings.data.preprocessing(spec.image_size),
        class_names=[as_text(name) for name in class_names],
        exports=settings.export,
        tags=_tags(run, found),
        steps=list(_steps(run, found)),
        tested=read_json(evaluation) if evaluation.exists() else entries.get(found.name, {}),
        dense_tested=entries.get("dense", {}),
        coarse_top1=coarse or {},
        difference=against_dense.get(quality_of(spec).shown.name),
    )
    return card_text(card)


def base_model(pretrained: str) -> str:
    """The name of the weights that a run began with: a repository's, a folder's or a file's."""
    if is_repository(pretrained):
        return repository_name(pretrained)
    name = _WEIGHTS.sub("", os.path.basename(os.path.abspath(pretrained))) if pretrained else ""
    return re.sub(r"[^\w.-]+", "-", as_text(name))


def dataset_name(name: str) -> str:
    """What a dataset is called elsewhere: folder:/home/me/birds is "birds" there."""
    kind, _, place = name.partition(":")
    if not place:
        return name
    return place if kind == "tfds" else as_text(os.path.basename(os.path.abspath(place)))


def _tags(run: Run, found: Finished) -> list[str]:
    tags = ["vit-slim"] if found.kind == "slim" or "slim" in run.settings.stages else []
    return [*tags, "flora", "low-rank"] if found.kind == "subnet" else tags


def _steps(run: Run, found: Finished) -> Iterator[str]:
    """The stages that this model went through, with what decided it."""
    settings, stages = run.settings, run.settings.stages
    weights = base_model(settings.pretrained)
    data = dataset_name(settings.data.name)
    if found.kind == "transfer":
        yield f"The model {weights} took on the classes of {data}: {_recipe(settings.finetune)}."
        return
    start = f"The dense model has the weights {weights}" if weights else "The dense model"
    if settings.trains_dense:
        word = ", trained on" if weights else " was trained on"
        start += f"{word} {data}: {_recipe(settings.pretrain)}"
    yield f"{start}."
    if "slim" in stages and found.kind != "dense":
        slim = settings.slim
        yield (
            f"ViT-Slim learned what attention, MLPs and tokens can spare (gates: "
            f"{_recipe(slim.gates)}), cut it out, and retrained: {_recipe(slim.retrain)}."
        )
    if found.budget is None:
        return
    low, high = found.budget.shares
    images = settings.calibration.images if "calibrate" in stages else 0
    start = f"weighed by up to {images:,} images" if images else "of the plain SVD"
    yield (
        f"FLORA split every large layer into low-rank factors, {start}; the budget is {low:g} to "
        f"{high:g} of the dense model's {'latency' if settings.spends_latency else 'MACs'}."
    )
    if "supernet" in stages:
        ratios = ", ".join(f"{ratio:.3g}" for ratio in settings.space.ratios)
        yield (
            f"One supernet of all ranks (ratios {ratios}; {settings.supernet_sampling} draws) was "
            f"trained: {_recipe(settings.supernet)}."
        )
    if "search" in stages:
        search = settings.search
        yield (
            f"Ranks were searched by evolution, {search.generations} generations of "
            f"{search.population}, scored by {settings.metric} on held-out images."
        )
        if _chosen(run, found.budget) == ALLOCATED:
            yield (
                "None of them was surely better than ranks allocated by measured sensitivity on "
                f"{settings.allocation.images} images, which the subnet has."
            )
    else:
        yield (
            f"Ranks were allocated by measured sensitivity on {settings.allocation.images} images."
        )
    if "finetune" in stages:
        yield f"The subnet was fine-tuned: {_recipe(settings.finetune)}."


def _chosen(run: Run, budget: Budget) -> str:
    """Whose ranks the subnet of a budget has."""
    return load_found(run, WINNERS_FILE)[load_budgets(run).index(budget)].chosen


def _recipe(recipe: Recipe) -> str:
    taught = ", taught by the model before" if recipe.distill else ""
    return (
        f"{recipe.epochs:g} epochs in batches of {recipe.batch_size}, learning rate "
        f"{recipe.learning_rate:g} for 512 images{taught}"
    )
