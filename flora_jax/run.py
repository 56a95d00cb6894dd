"""A run: a config, the folder it runs in, and what its stages share.

Folder of a run:
  dense/            the uncompressed model
  pretrain/         its training run, unless the weights were given
  slim/             the slimmed model, from which FLORA goes on where the run slims; in it gates/,
                    cut/ and retrain/: training of the gates, the model after the cut, retraining
  transfer/         a finished model fine-tuned on this dataset
  filter/block_00/  local supernets with their scores; filter/space.json: the kept triples
  supernet/         the supernet's training run: open it with `flora_jax.load`
  search/           history.jsonl and best.json; latency.json where that is the budget
  extract/          the subnet, and the baseline at the largest common ratio inside the budget,
                    with the weights that they inherit
  finetune/         their training runs
  subnet/ uniform/  the finished models
  result.json, report.png
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from flora_jax.data.augment import eval_transform, train_transform
from flora_jax.data.batches import Batch, eval_batches, train_batches
from flora_jax.data.normalize import Normalization
from flora_jax.data.sources import Source
from flora_jax.data.splits import Splits, load_splits
from flora_jax.distillation import StoredTeacher
from flora_jax.evaluation import EvaluationSet
from flora_jax.io import folder
from flora_jax.io.files import read_json
from flora_jax.lowrank.space import RankSpace
from flora_jax.lowrank.supernet import Supernet
from flora_jax.mesh import make_mesh
from flora_jax.models import Spec, spec_from_json
from flora_jax.models.functional import Parameters
from flora_jax.search.evolution import EvolutionSettings
from flora_jax.search.latency import LatencyTable
from flora_jax.train.loop import train
from flora_jax.train.settings import TrainSettings
from flora_jax.train.teacher import Teacher, describe

LATENCY_FILE = "search/latency.json"


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
        """Of the dense model; of a finished one where the run transfers that to other classes."""
        spec = spec_from_json(self.config.model.to_dict())
        if "transfer" not in self.config.stages:
            return spec
        finished = folder.load_spec(self.config.pretrained)
        return dataclasses.replace(finished, num_classes=spec.num_classes)

    @functools.cached_property
    def base(self) -> nnx.Module:
        """The model that FLORA compresses."""
        return folder.load(self.folder / "slim") if self._slims else self.dense

    @property
    def _slims(self) -> bool:
        return "slim" in self.config.stages

    @functools.cached_property
    def regular_space(self) -> RankSpace:
        spec = self.base.spec if self._slims else self.spec
        return self._regular_space_of(spec)

    def _regular_space_of(self, spec: Spec) -> RankSpace:
        return RankSpace.regular(spec, tuple(self.config.space.ratios), self.config.space.tile)

    @property
    def space(self) -> RankSpace:
        """The filtered space where the run filters, otherwise every rank triple."""
        if "filter" not in self.config.stages:
            return self.regular_space
        kept = read_json(self.folder / "filter/space.json")
        return RankSpace.from_json(self.regular_space.spec, kept)

    @functools.cached_property
    def macs_window(self) -> tuple[int, int]:
        """Of the subnet; the config gives it as shares of the dense model's."""
        low, high = self.config.budget.macs
        return round(low * self.spec.macs()), round(high * self.spec.macs())

    @property
    def spends_latency(self) -> bool:
        """Whether the search's budget is time on this device, not MACs."""
        return "search" in self.config.stages and self.config.search.budget == "latency"

    @functools.cached_property
    def latency_table(self) -> LatencyTable:
        """Measured when the search began."""
        return LatencyTable.from_json(read_json(self.folder / LATENCY_FILE))

    @property
    def latency_window(self) -> tuple[int, int]:
        """Of the subnet, in nanoseconds; the config gives it as shares of the dense model's."""
        low, high = self.config.budget.latency
        dense = 1e6 * self.latency_table.dense_ms
        return round(low * dense), round(high * dense)

    @property
    def uniform_ranks(self) -> tuple[int, ...]:
        """Of the baseline: of the MAC window, or as many MACs as the subnet found by latency."""
        most = self.macs_window[1]
        if self.spends_latency:
            most = read_json(self.folder / "search/best.json")["macs"]
        return self.regular_space.uniform_ranks_within(most)

    def check_budget(self, spec: Spec) -> None:
        """Whether FLORA can reach its MAC window from a model of this spec, where it will try.

        Raises:
          ValueError: it cannot; names the window and what can be reached.
        """
        if "search" not in self.config.stages:
            return
        least, most = self._regular_space_of(spec).macs_range()
        if self.macs_window[1] < least or self.macs_window[0] > most:
            dense = self.spec.macs()
            raise ValueError(
                f"budget.macs {tuple(self.config.budget.macs)} cannot be reached: the space spans "
                f"{least / dense:.3f}..{most / dense:.3f} of the dense model's MACs"
            )

    @functools.cached_property
    def splits(self) -> Splits:
        data = self.config.data
        return load_splits(
            data.name,
            heldout_fraction=data.heldout_fraction,
            seed=self.config.seed,
            data_dir=data.data_dir or None,
            test_split=data.test_split or None,
            on_bad_image=data.on_bad_image,
            classes=tuple(data.classes),
            least_side=train_transform(**self.augmentation).least_side,
        )

    @functools.cached_property
    def normalization(self) -> Normalization:
        return Normalization(tuple(self.config.data.mean), tuple(self.config.data.std))

    @functools.cached_property
    def augmentation(self) -> dict:
        return {"image_shape": self.spec.image_shape, **self.config.data.augmentation}

    @property
    def evolution_settings(self) -> EvolutionSettings:
        fields = self.config.search.to_dict()
        del fields["budget"], fields["latency_batch"]
        return EvolutionSettings(**fields)

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
        penalty: Callable[[Parameters], jax.Array] | None = None,
        teacher: nnx.Module | None = None,
    ) -> nnx.Module:
        """Trains in the folder `name` by a recipe of the config.

        Where the recipe distils, it is from `teacher`, or from the model that FLORA compresses.
        """
        source = source or self.splits.train
        teacher = (teacher or self.base) if recipe.distill else None
        batches = self._batches(recipe, name, source)
        if teacher is not None and recipe.stored_predictions:
            stored = self.stored_teacher(teacher, recipe, name, source)
            stored.write()
            teacher, batches = None, stored.taught_batches
        return train(
            model,
            batches,
            train_settings(recipe, len(source), self.config.seed),
            directory=self.folder / name,
            name=name,
            normalization=self.normalization,
            draw_genes=draw_genes,
            teacher=teacher,
            penalty=penalty,
            mesh=make_mesh(self.config.fsdp),
        )

    def _batches(self, recipe: ConfigDict, name: str, source: Source):
        """step -> this process' batches of the training `name` from that step on."""
        transform = train_transform(**self.augmentation)

        def batches(start_step: int) -> Iterator[Batch]:
            return train_batches(
                source,
                transform,
                recipe.batch_size,
                self.seed(f"{name}/batches"),
                start_step,
                jax.process_index(),
                jax.process_count(),
                self.config.data.num_threads,
                self.config.data.num_workers,
                recipe.repeats,
            )

        return batches

    def stored_teacher(
        self, model: nnx.Module, recipe: ConfigDict, name: str, source: Source
    ) -> StoredTeacher:
        """The model as the teacher of the training `name`, its predictions kept on disk."""
        teacher = Teacher(model, self.normalization, recipe.compute_dtype)
        description = describe(
            self.config.data.name,
            source,
            teacher,
            batch_size=recipe.batch_size,
            steps=train_settings(recipe, len(source)).steps,
            seed=self.seed(f"{name}/batches"),
            augmentation={**self.augmentation, "repeats": recipe.repeats},
        )
        folder = self.folder / name / "predictions"
        return StoredTeacher(folder, teacher, description, self._batches(recipe, name, source))

    def train_supernet(
        self, supernet: Supernet, recipe: ConfigDict, name: str, law: str, source=None
    ) -> Supernet:
        """Trains a subnet a step, drawn from the supernet's space by a law."""
        seed, space = self.seed(f"{name}/genes"), supernet.space

        def draw_genes(step: int) -> np.ndarray:
            return space.sample(np.random.default_rng([seed, step]), 1, law)[0]

        network = self.train(supernet.network, recipe, name, source=source, draw_genes=draw_genes)
        return Supernet(network, space)


def train_settings(recipe: ConfigDict, num_images: int, seed: int = 0) -> TrainSettings:
    """A recipe in epochs and per-512-images learning rates, as steps and rates of this run.

    Blocks are in a loop where programs are large and slow to compile.
    """
    fields = recipe.to_dict()
    for name in ("distill", "stored_predictions", "repeats"):
        del fields[name]
    steps_per_epoch, scale = num_images / recipe.batch_size, recipe.batch_size / 512
    fields["steps"] = max(1, round(fields.pop("epochs") * steps_per_epoch))
    fields["warmup_steps"] = round(fields.pop("warmup_epochs") * steps_per_epoch)
    for rate in ("learning_rate", "warmup_learning_rate", "min_learning_rate"):
        fields[rate] *= scale
    return TrainSettings(**fields, seed=seed, loop_over_blocks=jax.default_backend() == "tpu")
