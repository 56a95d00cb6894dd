"""All settings of a run as one frozen value, made of a config and as good as one."""

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from flora_jax.errors import InputError, check_at_least, check_known, unknown
from flora_jax.evaluation.quality import METRICS, quality_of
from flora_jax.flora.sampling import SUPERNET_LAWS
from flora_jax.models.spec import Spec
from flora_jax.models.vit_spec import deit
from flora_jax.runs.config_tree import from_mapping, to_mapping
from flora_jax.runs.data_section import DataSettings
from flora_jax.runs.sections import (
    DEIT_TRAINING,
    AllocationSettings,
    BudgetSettings,
    CalibrationSettings,
    FilterSettings,
    SearchSettings,
    SlimSettings,
    SpaceSettings,
)
from flora_jax.stages.names import FLORA_STAGES, STAGES
from flora_jax.training.settings import Recipe
from flora_jax.training.watch import PACKAGES
from flora_jax.weights.export import EXPORTS

UNIFORM_BASELINES = ("supernet", "alone", "none")
_MODEL_STAGES = {"pretrain", "transfer", "slim", "extract"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run does; the defaults are FLORA's on DeiT-B and ImageNet (WACV 2024).

    Attributes:
      seed: of everything random.
      stages: what is done, in order; `export` is one of them exactly where something is exported.
      export: as what finished models are handed out: "onnx", "onnx_float16", "onnx_int8",
        "torch", "stablehlo", "timm"; empty: nothing is.
      keep_checkpoints: whether checkpoints and stored predictions stay when a stage is done.
      watch: who else gets the metrics that every training writes as JSON lines: "tensorboard",
        "wandb" (Weights & Biases), or both.
      profile_step: each training writes a JAX profile of this step to its folder; 0 for none.
      fsdp: devices that share one copy of the parameters and the optimiser's state.
      model: the dense network.
      pretrained: weights in any layout that `flora_jax.from_pretrained` reads, on disk or as
        `hf:owner/name` of the Hugging Face hub; empty: train from scratch.
      train_pretrained: whether `pretrain` goes on to train the given weights by its recipe.
      probe_images: training images that the classifier of new classes is fitted to, a linear probe
        of the pretrained features, before any training; 0: it starts with zeros.
      refuse_near_chance: whether a run ends before it compresses a dense model that only guesses.
      supernet_law: which subnet a step of the supernet trains (`flora_jax.flora.sampling`).
      uniform_baseline: the uniform-rank network of the same MACs: "supernet" cuts it out of the
        supernet like the subnet; "alone" trains it from the dense model's SVD for as many steps as
        supernet and fine-tuning together; "none" leaves it out.
      metric: what filter and search rank by on the held-out images: top1 or log_likelihood; of a
        network without classes cosine or relative_error. Empty: the first of these.

    Raises:
      InputError: a value that makes no sense; names it, and what would be accepted.
    """

    seed: int = 0
    stages: tuple[str, ...] = FLORA_STAGES
    export: tuple[str, ...] = ()
    keep_checkpoints: bool = False
    watch: tuple[str, ...] = ()
    profile_step: int = 0
    fsdp: int = 1
    model: Spec = deit("base")
    data: DataSettings = DataSettings()
    pretrained: str = ""
    train_pretrained: bool = False
    probe_images: int = 10_000
    refuse_near_chance: bool = True
    pretrain: Recipe = Recipe(**DEIT_TRAINING, label_smoothing=0.1, distill=False)
    slim: SlimSettings = SlimSettings()
    space: SpaceSettings = SpaceSettings()
    budget: BudgetSettings = BudgetSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    allocation: AllocationSettings = AllocationSettings()
    supernet_law: str = "low_rank_aware"
    uniform_baseline: str = "supernet"
    metric: str = ""
    filter: FilterSettings = FilterSettings()
    supernet: Recipe = Recipe()
    search: SearchSettings = SearchSettings()
    finetune: Recipe = Recipe(epochs=30.0, warmup_epochs=0.0)

    def __post_init__(self):
        _check_exports(self.export, self.stages)
        object.__setattr__(self, "stages", _with_export(self.stages, bool(self.export)))
        _check_stages(self.stages)
        object.__setattr__(self, "watch", _watchers(self.watch))
        check_at_least(self, 0, "profile_step")
        check_known(self, "uniform_baseline", UNIFORM_BASELINES)
        check_known(self, "supernet_law", SUPERNET_LAWS)
        object.__setattr__(self, "metric", self.metric or quality_of(self.model).shown.name)
        check_known(self, "metric", tuple(metric.name for metric in METRICS))
        if self.pretrain.distill:
            raise InputError("pretrain.distill must be False: the dense model has no teacher")
        if "transfer" in self.stages and self.finetune.distill:
            raise InputError("finetune.distill must be False: nobody teaches the new classes")
        share, high = self.slim.budget.macs, self.budget.windows("macs")[-1][1]
        if "slim" in self.stages and self.finds_ranks and 0 < share < high:
            raise InputError(
                f"slim.budget.macs {share} is below the subnet's, {high}: the slimmed model must "
                f"leave something to save"
            )

    @classmethod
    def from_config(cls, config: Mapping) -> Self:
        """Reads the settings of a config: nested dicts, a ConfigDict or a run's config.json.

        Raises:
          InputError: a field that does not exist or a value that makes no sense; names it.
        """
        return from_mapping(cls, config)

    def to_config(self) -> dict[str, Any]:
        """Writes nested dicts, of which `from_config` makes the same settings."""
        return to_mapping(self)

    @property
    def trains_dense(self) -> bool:
        """Whether `pretrain` trains, and does not only read weights."""
        return "pretrain" in self.stages and (self.train_pretrained or not self.pretrained)

    @property
    def finds_ranks(self) -> bool:
        """Whether a stage chooses ranks for a budget."""
        return bool({"allocate", "search"} & set(self.stages))

    @property
    def spends_latency(self) -> bool:
        """Whether the budget is time on this device, not MACs."""
        return self.finds_ranks and self.search.budget == "latency"

    def trainings(self, num_images: int) -> Iterator[tuple[str, Recipe, int]]:
        """Name, recipe and images of each training of a run with so many training images."""
        part = round(num_images * self.filter.train_fraction)
        for stage, name, recipe, images in (
            ("pretrain", "pretrain", self.pretrain, num_images),
            ("transfer", "finetune", self.finetune, num_images),
            ("slim", "slim.gates", self.slim.gates, num_images),
            ("slim", "slim.retrain", self.slim.retrain, num_images),
            ("filter", "filter.train", self.filter.train, part),
            ("supernet", "supernet", self.supernet, num_images),
            ("finetune", "finetune", self.finetune, num_images),
        ):
            is_used = self.trains_dense if stage == "pretrain" else recipe.epochs
            if stage in self.stages and is_used:
                yield name, recipe, images

    def seed_of(self, purpose: str) -> int:
        """A seed of its own for everything random, 31 bits."""
        words = np.random.SeedSequence([self.seed, zlib.crc32(purpose.encode())])
        return int(words.generate_state(1)[0] >> 1)


def _check_exports(kinds: tuple[str, ...], stages: tuple[str, ...]) -> None:
    if not isinstance(kinds, tuple):
        raise InputError(f"export must be a row of names, such as ('onnx', 'torch'), got {kinds!r}")
    for kind in kinds:
        if kind not in EXPORTS:
            raise InputError(unknown("export", kind, EXPORTS))
    if kinds and not _MODEL_STAGES & set(stages):
        raise InputError(
            f"export needs a stage that leaves a model, {', '.join(sorted(_MODEL_STAGES))}, got "
            f"{', '.join(stages) or 'none'}"
        )


def _with_export(stages: tuple[str, ...], is_exported: bool) -> tuple[str, ...]:
    """Configs need not name the stage `export`, and runs made before it was there do not."""
    others = tuple(stage for stage in stages if stage != "export")
    if not is_exported:
        return others
    place = others.index("report") if "report" in others else len(others)
    return (*others[:place], "export", *others[place:])


def _watchers(names: tuple[str, ...] | str) -> tuple[str, ...]:
    """Each of the names once; as a text, such as the command line gives, with commas."""
    texts = (names,) if isinstance(names, str) else names
    given = [name for text in texts for name in str(text).split(",") if name]
    for name in given:
        if name not in PACKAGES:
            raise InputError(f"watch: {unknown('writer', name, PACKAGES)}")
    return tuple(dict.fromkeys(given))


def _check_stages(stages: tuple[str, ...]) -> None:
    for name in stages:
        if name not in STAGES:
            raise InputError(unknown("stage", name, STAGES))
    order = [name for name in STAGES if name in stages]
    if list(stages) != order:
        raise InputError(f"stages {list(stages)} must come once each, in the order {order}")
    others = set(stages) - {"transfer", "evaluate", "export", "report"}
    if "transfer" in stages and others:
        raise InputError(f"transfer stands alone, without {', '.join(sorted(others))}")
