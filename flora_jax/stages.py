"""The stages of a FLORA run, each a function of the run that reads and writes its folder.

Folder of a run:
  dense/            the uncompressed model
  pretrain/         its training run, unless the weights were given
  filter/block_00/  local supernets with their scores; filter/space.json: the kept triples
  supernet/         the supernet's training run: open it with `flora_jax.load`
  search/           history.jsonl and best.json
  extract/          subnet and uniform as they inherit their weights: from the supernet and, at
                    the largest common ratio inside the budget, from the dense model
  finetune/         their training runs
  subnet/ uniform/  the finished models
  result.json, report.png
"""

import dataclasses
import functools
import json
import logging
import zlib
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from flora_jax.data.augment import eval_transform, train_transform
from flora_jax.data.batches import eval_batches, train_batches
from flora_jax.data.normalize import Normalization
from flora_jax.data.sources import Source
from flora_jax.data.splits import Splits, hold_out, load_splits
from flora_jax.evaluate import EvaluationSet, top1
from flora_jax.io import folder
from flora_jax.io.files import read_json, write_json
from flora_jax.lowrank.space import RankSpace
from flora_jax.lowrank.supernet import Supernet, extract, extract_ranks, factorize
from flora_jax.models import Spec, create
from flora_jax.models.spec import ViTSpec
from flora_jax.models.timm import from_pretrained
from flora_jax.report import plots, table
from flora_jax.report.progress import Progress
from flora_jax.search.block_scores import score_block
from flora_jax.search.evolution import EvolutionSettings, evolve, read_history
from flora_jax.search.filter import filter_space
from flora_jax.train.loop import train
from flora_jax.train.settings import TrainSettings

log = logging.getLogger(__name__)

COMPRESSED = ("subnet", "uniform")


@dataclasses.dataclass(frozen=True)
class Run:
    """A config and the folder it runs in, with what the stages share. Raises as its parts do."""

    config: ConfigDict
    folder: epath.Path

    @classmethod
    def open(cls, folder: epath.PathLike) -> "Run":
        """The run that was made in this folder."""
        folder = epath.Path(folder)
        return cls(ConfigDict(read_json(folder / "config.json")), folder)

    @functools.cached_property
    def spec(self) -> Spec:
        return ViTSpec(**self.config.model)

    @functools.cached_property
    def regular_space(self) -> RankSpace:
        return RankSpace.regular(self.spec, tuple(self.config.space.ratios))

    @property
    def space(self) -> RankSpace:
        """The filtered space where the run filters, otherwise every rank triple."""
        if "filter" not in self.config.stages:
            return self.regular_space
        return RankSpace.from_json(self.spec, read_json(self.folder / "filter/space.json"))

    @functools.cached_property
    def macs_window(self) -> tuple[int, int]:
        low, high = self.config.budget.macs
        return round(low * self.spec.macs()), round(high * self.spec.macs())

    @functools.cached_property
    def splits(self) -> Splits:
        data = self.config.data
        return load_splits(
            data.name,
            heldout_fraction=data.heldout_fraction,
            seed=self.config.seed,
            data_dir=data.data_dir or None,
        )

    @functools.cached_property
    def normalization(self) -> Normalization:
        return Normalization(tuple(self.config.data.mean), tuple(self.config.data.std))

    @functools.cached_property
    def augmentation(self) -> dict:
        return {"image_shape": self.spec.image_shape, **self.config.data.augmentation}

    @property
    def evolution_settings(self) -> EvolutionSettings:
        return EvolutionSettings(**self.config.search)

    @functools.cached_property
    def heldout_set(self) -> EvaluationSet:
        return self.evaluation_set(self.splits.heldout)

    @functools.cached_property
    def dense(self) -> nnx.Module:
        return folder.load(self.folder / "dense")

    def evaluation_set(self, source: Source) -> EvaluationSet:
        size = min(self.config.data.eval_batch_size, len(source))
        size = -(-size // jax.device_count()) * jax.device_count()
        name = self.config.data.augmentation.name
        transform = eval_transform(name, self.spec.image_shape)
        return EvaluationSet(eval_batches(source, transform, size), self.normalization)

    def seed(self, purpose: str) -> int:
        """A seed of its own for everything random, 31 bits."""
        words = np.random.SeedSequence([self.config.seed, zlib.crc32(purpose.encode())])
        return int(words.generate_state(1)[0] >> 1)

    def train(
        self,
        model: nnx.Module,
        recipe: ConfigDict,
        name: str,
        *,
        source: Source | None = None,
        draw_genes: Callable[[int], np.ndarray] | None = None,
    ) -> nnx.Module:
        """Trains in the folder `name` by a recipe of the config; distils from the dense model."""
        source = source or self.splits.train
        transform = train_transform(**self.augmentation)

        def batches(start_step: int):
            return train_batches(
                source,
                transform,
                recipe.batch_size,
                self.seed(f"{name}/batches"),
                start_step,
                jax.process_index(),
                jax.process_count(),
                self.config.data.num_threads,
            )

        return train(
            model,
            batches,
            train_settings(recipe, len(source)),
            directory=self.folder / name,
            name=name,
            normalization=self.normalization,
            draw_genes=draw_genes,
            teacher=self.dense if recipe.distill else None,
        )

    def train_supernet(
        self, supernet: Supernet, recipe: ConfigDict, name: str, law: str, source=None
    ) -> Supernet:
        """Trains a subnet a step, drawn from the supernet's space by a law."""
        seed, space = self.seed(f"{name}/genes"), supernet.space

        def draw_genes(step: int) -> np.ndarray:
            return space.sample(np.random.default_rng([seed, step]), 1, law)[0]

        network = self.train(supernet.network, recipe, name, source=source, draw_genes=draw_genes)
        return Supernet(network, space)


def train_settings(recipe: ConfigDict, num_images: int) -> TrainSettings:
    """A recipe in epochs and per-512-images learning rates, as steps and rates of this run."""
    fields = recipe.to_dict()
    del fields["distill"]
    steps_per_epoch, scale = num_images / recipe.batch_size, recipe.batch_size / 512
    fields["steps"] = max(1, round(fields.pop("epochs") * steps_per_epoch))
    fields["warmup_steps"] = round(fields.pop("warmup_epochs") * steps_per_epoch)
    for rate in ("learning_rate", "warmup_learning_rate", "min_learning_rate"):
        fields[rate] *= scale
    return TrainSettings(**fields)


def pretrain(run: Run) -> None:
    """The dense model: trained from scratch, or read from the weights that the config names."""
    if run.config.pretrained:
        model = from_pretrained(run.config.pretrained, run.spec)
    else:
        model = create(run.spec, run.seed("create"))
        folder.save_description(model, run.folder / "pretrain")
        model = run.train(model, run.config.pretrain, "pretrain")
    folder.save(model, run.folder / "dense")
    log.info("dense model: %.2f %% top-1 held-out", 100 * top1(model, run.heldout_set))


def filter_candidates(run: Run) -> None:
    """A local supernet per block scores its triples; the priced best are kept."""
    settings = run.config.filter
    space, full_rank = run.regular_space, run.regular_space.full_rank_genes.reshape(-1, 3)
    part = hold_out(run.splits.train, settings.train_fraction, run.seed("filter/part"))[1]
    inherited = factorize(run.dense, space)
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
                write_json(scores_file, score_block(local, block, run.heldout_set).tolist())
            scores.append(np.asarray(read_json(scores_file)))
            progress.update(best_top1=float(scores[-1].max()))
    kept, price = filter_space(space, scores, run.macs_window[1], settings.drop)
    write_json(
        run.folder / "filter/space.json",
        kept.to_json() | {"price": price, "kept_macs_range": kept.macs_range()},
    )


def train_supernet(run: Run) -> None:
    supernet = factorize(run.dense, run.space)
    folder.save_description(supernet, run.folder / "supernet")
    run.train_supernet(supernet, run.config.supernet, "supernet", "low_rank_aware")


def search(run: Run) -> None:
    """Evolution inside the MAC window, scored on held-out images."""
    supernet, settings = folder.load(run.folder / "supernet"), run.evolution_settings
    history = run.folder / "search/history.jsonl"
    history.parent.mkdir(parents=True, exist_ok=True)
    done = read_history(history) if history.exists() else []
    start = len({candidate.generation for candidate in done})

    with Progress("search", total=settings.generations, start=start, unit="generation") as progress:
        best = evolve(
            supernet.space,
            lambda genes: top1(supernet, run.heldout_set, genes),
            run.macs_window,
            settings,
            run.seed("search"),
            history,
            lambda _, members: progress.update(best_top1=max(m.top1 for m in members)),
        )
    ranks = supernet.space.ranks(best.genes).tolist()
    write_json(run.folder / "search/best.json", dataclasses.asdict(best) | {"ranks": ranks})


def extract_subnets(run: Run) -> None:
    """The winner, cut out of the supernet; the uniform-rank network, out of the dense model."""
    supernet = folder.load(run.folder / "supernet")
    best = read_json(run.folder / "search/best.json")
    folder.save(extract(supernet, best["genes"]), run.folder / "extract/subnet")
    uniform_ranks = run.regular_space.uniform_ranks_within(run.macs_window[1])
    inherited = factorize(run.dense, run.regular_space)
    folder.save(extract_ranks(inherited, uniform_ranks), run.folder / "extract/uniform")


def finetune(run: Run) -> None:
    """The subnet alone; the uniform-rank network first for as long as the supernet took.

    So the baseline gets every step, recipe and teacher that the subnet got, for its own weights.
    """
    uniform = folder.load(run.folder / "extract/uniform")
    folder.save_description(uniform, run.folder / "finetune/uniform_alone")
    models = {
        "subnet": folder.load(run.folder / "extract/subnet"),
        "uniform": run.train(uniform, run.config.supernet, "finetune/uniform_alone"),
    }
    for name, model in models.items():
        folder.save_description(model, run.folder / "finetune" / name)
        model = run.train(model, run.config.finetune, f"finetune/{name}")
        folder.save(model, run.folder / name)


def evaluate(run: Run) -> None:
    """The only look at the test split."""
    test_set = run.evaluation_set(run.splits.test)
    finished = run.folder if "finetune" in run.config.stages else run.folder / "extract"
    result = {}
    for name in ("dense", *COMPRESSED):
        model = run.dense if name == "dense" else folder.load(finished / name)
        result[name] = {
            "top1": top1(model, test_set),
            "macs": model.spec.macs(),
            "params": model.spec.num_params(),
        }
    write_json(run.folder / "result.json", result)


def report(run: Run) -> None:
    """The table on the terminal and the picture in the folder."""
    result = read_json(run.folder / "result.json")
    candidates = read_history(run.folder / "search/history.jsonl")
    uniform = folder.load(run.folder / "extract/uniform").spec
    subnet = folder.load(run.folder / "extract/subnet").spec
    layers = run.spec.layers
    figure = plots.report_figure(
        candidates={
            field: [getattr(candidate, field) for candidate in candidates]
            for field in ("macs", "top1", "generation")
        },
        points={name: (row["macs"], row["top1"]) for name, row in result.items()},
        window=run.macs_window,
        ranks=subnet.ranks,
        full_ranks=[layer.full_rank for layer in layers],
        curves=_loss_curves(run.folder),
        uniform_ratio=(uniform.ranks[0] or layers[0].full_rank) / layers[0].full_rank,
        title=f"{run.folder.name}: {table.human_count(subnet.macs())} of "
        f"{table.human_count(run.spec.macs())} multiply-adds",
    )
    plots.save_figure(figure, run.folder / "report.png")
    print(f"\n{table.comparison_table(result)}\n\nPicture: {run.folder / 'report.png'}")


def _loss_curves(directory: epath.Path) -> dict[str, tuple[list[int], list[float]]]:
    """Loss by step of the long stages, averaged over about 1 % of the stage."""
    curves = {}
    for name in ("pretrain", "supernet", "finetune/uniform_alone", "finetune/subnet"):
        path = directory / name / "metrics.jsonl"
        if path.exists():
            losses = np.array([json.loads(line)["loss"] for line in path.read_text().splitlines()])
            parts = np.array_split(losses, min(100, len(losses)))
            steps = np.cumsum([len(part) for part in parts])
            curves[name] = (steps.tolist(), [float(part.mean()) for part in parts])
    return curves


STAGES: dict[str, Callable[[Run], None]] = {
    "pretrain": pretrain,
    "filter": filter_candidates,
    "supernet": train_supernet,
    "search": search,
    "extract": extract_subnets,
    "finetune": finetune,
    "evaluate": evaluate,
    "report": report,
}
