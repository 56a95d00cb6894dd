"""All settings of a run as one frozen value: every section and every default, once."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from flora_jax.closed_form.calibrate import SHRINKAGE
from flora_jax.closed_form.regression import RIDGE
from flora_jax.data.augment import Augmentation
from flora_jax.data.decoding import MAX_MEGAPIXELS
from flora_jax.data.normalize import Normalization
from flora_jax.data.preprocessing import Preprocessing
from flora_jax.errors import InputError, check_at_least, check_between, check_known, unknown
from flora_jax.evaluation.outputs import quality_of
from flora_jax.evaluation.quality import METRICS
from flora_jax.flora.evolution import EvolutionSettings
from flora_jax.flora.extras.sampling import EXTRA_SAMPLINGS
from flora_jax.flora.filter import LOCAL_TRAINING
from flora_jax.flora.sampling import SAMPLINGS
from flora_jax.flora.space import RankSpace
from flora_jax.models.spec import Spec
from flora_jax.models.vit_spec import deit
from flora_jax.runs.config_tree import from_mapping, to_mapping
from flora_jax.slim.gates import ATTENTION_GATES, SparsityPenalty
from flora_jax.training.settings import Recipe, seed_of, without_effect
from flora_jax.training.watch import PACKAGES
from flora_jax.weights.export import EXPORTS
from flora_jax.weights.export.engines import ENGINES
from flora_jax.weights.metadata.spec import describes_itself, read_spec

ENDING = ("extract", "finetune", "evaluate", "report")
PUBLISHED_STAGES = ("pretrain", "filter", "supernet", "search", *ENDING)
BUDGETS = ("macs", "latency")
Window = tuple[float, float]

# DeiT's own training, for the dense model and after slimming.
DEIT_TRAINING: dict[str, Any] = {
    "epochs": 300.0,
    "learning_rate": 5e-4,
    "warmup_learning_rate": 1e-6,
    "min_learning_rate": 1e-5,
    "weight_decay": 0.05,
    "mixup": 0.8,
    "cutmix": 1.0,
    "repeats": 3,
}


@dataclasses.dataclass(frozen=True)
class SlimBudget:
    """Shares of each kind of gate to keep, or one share of the dense MACs that sets them all.

    Attributes:
      macs: 0 where the other three count.
    """

    attn: float = 0.7
    mlp: float = 0.7
    patch: float = 0.7
    macs: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            share = getattr(self, field.name)
            if not (0 < share <= 1 or (field.name == "macs" and share == 0)):
                raise InputError(f"{field.name} must lie in (0, 1], got {share}")


@dataclasses.dataclass(frozen=True)
class SlimSettings:
    """ViT-Slim (CVPR 2022), where the stages name it.

    Attributes:
      attention: kind of the attention gates, as in `flora_jax.slim.add_gates`.
      tokens: whether tokens get gates; None: where the network's tokens can leave.
      gates, retrain: trainings of the gates, and of what is left after the cut.
      fold: as in `flora_jax.slim.cut`.
      tile: widths are rounded up to a multiple of it.
      rotate_images: ours, of the training split: their second moments put the dimensions of each
        head in order of importance before there are gates, the same function otherwise. 0: as
        published, dimensions stay as they are.
    """

    attention: str = "dim"
    tokens: bool | None = None
    penalty: SparsityPenalty = SparsityPenalty()
    gates: Recipe = Recipe(
        epochs=50.0,
        learning_rate=5e-4,
        min_learning_rate=5e-4,
        warmup_epochs=0.0,
        weight_decay=1e-3,
        distill=False,
    )
    budget: SlimBudget = SlimBudget()
    fold: bool = True
    tile: int = 1
    rotate_images: int = 0
    retrain: Recipe = Recipe(**DEIT_TRAINING)

    def __post_init__(self):
        check_at_least(self, 1, "tile")
        check_at_least(self, 0, "rotate_images")
        check_known(self, "attention", ATTENTION_GATES)


@dataclasses.dataclass(frozen=True)
class SpaceSettings:
    """Rank choices: ratios of full rank, rounded to multiples of a tile apart from full rank."""

    ratios: tuple[float, ...] = (1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 1.0)
    tile: int = 1

    def of(self, spec: Spec) -> RankSpace:
        """Every rank triple of this network. Raises as `RankSpace.regular`."""
        return RankSpace.regular(spec, self.ratios, self.tile)


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """The images that weigh the supernet's factors (`flora_jax.calibrate`).

    Attributes:
      images: of the training split, without augmentation; fewer where there are fewer. 0: the plain
        SVD, as published.
      shrinkage: as in `Calibration`.
    """

    images: int = 1024
    shrinkage: float = SHRINKAGE

    def __post_init__(self):
        check_at_least(self, 0, "images")
        if not 0 < self.shrinkage <= 1:
            raise InputError(f"shrinkage must lie in (0, 1], got {self.shrinkage}")


@dataclasses.dataclass(frozen=True)
class AllocationSettings:
    """The images on which `flora_jax.allocate` measures what each rank spoils.

    Attributes:
      images: of the training split, without augmentation; fewer where there are fewer.
    """

    images: int = 256

    def __post_init__(self):
        check_at_least(self, 1, "images")


@dataclasses.dataclass(frozen=True)
class CompressionSettings:
    """The closed form (`flora_jax.compress`), where the stages name it.

    Attributes:
      images: of the training split, without augmentation, that the smaller network is fitted to;
        fewer where there are fewer.
      ridge: as in `flora_jax.refit`.
    """

    images: int = 1024
    ridge: float = RIDGE

    def __post_init__(self):
        check_at_least(self, 1, "images")
        if not self.ridge > 0:
            raise InputError(f"ridge must be above 0, got {self.ridge}")


@dataclasses.dataclass(frozen=True)
class BudgetSettings:
    """The cost of a subnet, at least and at most, as shares of the dense model's.

    Either is one window (low, high), or several, from each of which comes a subnet.

    Attributes:
      macs: multiply-adds. The filter's price is in them, whatever the search spends.
      latency: milliseconds of the engine that `LatencySettings` names.
    """

    macs: Window | tuple[Window, ...] = (0.43, 0.46)
    latency: Window | tuple[Window, ...] = (0.55, 0.6)

    def __post_init__(self):
        for name in BUDGETS:
            _check_windows(name, getattr(self, name))

    def windows(self, name: str) -> tuple[Window, ...]:
        """The windows of "macs" or "latency", ascending."""
        return tuple(sorted(_windows(getattr(self, name))))


def _windows(value) -> list[tuple]:
    """One window or several, as several."""
    value = value if isinstance(value, Sequence) else (value,)
    listed = value if any(isinstance(part, tuple | list) for part in value) else [value]
    return [tuple(each) if isinstance(each, tuple | list) else (each,) for each in listed]


def _check_windows(name: str, value) -> None:
    windows = _windows(value)
    for window in windows:
        if len(window) != 2 or any(isinstance(end, str) for end in window):
            hint = ""
            if len(window) == 1 and isinstance(window[0], int | float) and 0 < window[0] <= 1:
                hint = f"; for at most {window[0]:g} give ({0.9 * window[0]:.3g}, {window[0]:g})"
            raise InputError(
                f"{name} must be one window (low, high) of shares, such as (0.45, 0.5), or several "
                f"of them, got {value}{hint}"
            )
        low, high = window
        if not 0 < low < high <= 1:
            raise InputError(
                f"{name} {window} must be two shares of the dense model's, 0 < low < high <= 1"
            )
    for lower, upper in itertools.pairwise(sorted(windows)):
        if lower == upper:
            raise InputError(f"{name} {lower} is given twice")
        if upper[0] < lower[1]:
            raise InputError(
                f"{name} {lower} and {upper} overlap: windows must be apart, so that every subnet "
                f"belongs to one"
            )


@dataclasses.dataclass(frozen=True)
class Spending:
    """The budgets of a run.

    Attributes:
      unit: "macs", or "latency" in an engine.
      ranges: (least, most) as shares of the dense model's, ascending.
    """

    unit: str
    ranges: tuple[Window, ...]


@dataclasses.dataclass(frozen=True)
class LatencySettings:
    """What a budget of milliseconds is measured in, on the machine that runs flora_jax.

    Attributes:
      engine: "jax" (in finetune.compute_dtype), "pytorch", "onnxruntime" or "openvino" in float32,
        or "onnxruntime_int8", "openvino_float16" or "openvino_int8".
    """

    engine: str = "jax"

    def __post_init__(self):
        check_known(self, "engine", tuple(ENGINES))


@dataclasses.dataclass(frozen=True)
class FilterSettings:
    """Candidate filtering: the share of triples to drop, and the training of local supernets.

    Attributes:
      train_fraction: of the training images.
    """

    drop: float = 0.7
    train_fraction: float = 0.1
    train: Recipe = LOCAL_TRAINING

    def __post_init__(self):
        if not 0 <= self.drop < 1:
            raise InputError(f"drop must lie in [0, 1), got {self.drop}")
        check_between(self, 0, 1, "train_fraction")


@dataclasses.dataclass(frozen=True)
class SearchSettings(EvolutionSettings):
    """The evolution, and what it spends.

    Attributes:
      budget: "macs", or "latency": milliseconds; the closed form spends it, too.
      latency_batch: images that the engine runs at once.
      halving: whether a candidate that is behind on a part of the held-out images is not scored on
        the others.
    """

    budget: str = "macs"
    latency_batch: int = 16
    halving: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_known(self, "budget", BUDGETS)
        check_at_least(self, 1, "latency_batch")

    @property
    def evolution(self) -> EvolutionSettings:
        names = [field.name for field in dataclasses.fields(EvolutionSettings)]
        return EvolutionSettings(**{name: getattr(self, name) for name in names})


_PREPROCESSING = tuple(
    field.name for field in dataclasses.fields(Preprocessing) if field.name != "image_size"
)

# timm turns the published colour jitter of 0.4 off where RandAugment is on.
_DEIT_AUGMENTATION = {
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "rand_augment": True,
    "magnitude": 9.0,
    "magnitude_std": 0.5,
    "num_operations": 2,
    "color_jitter": 0.0,
    "erase_probability": 0.25,
}


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The images of a run, and their preparation.

    Attributes:
      name, data_dir, test_split, heldout_split, heldout_by, on_bad_image, heldout_fraction: as in
        `load_splits`; an empty data_dir or split stands for the default.
      max_megapixels: that an image may have after a large JPEG is decoded smaller; above it, it is
        a bad image.
      classes: some of the dataset's, numbered anew; empty: all.
      mean, std, crop_pct, crop_mode, interpolation, background, exif_orientation: as in
        `Preprocessing`; what is not random is done to an image with them. The augmentations of
        small pictures, "digits" and "shift", have a crop mode of their own.
      num_threads: that prepare training batches.
      num_workers: processes that prepare training batches in place of threads.
    """

    name: str = "tfds:imagenet2012"
    data_dir: str = ""
    test_split: str = ""
    heldout_split: str = ""
    heldout_by: str = "name"
    on_bad_image: str = "raise"
    max_megapixels: float = MAX_MEGAPIXELS
    classes: tuple[int, ...] = ()
    heldout_fraction: float = 0.02
    augmentation: Augmentation = Augmentation("deit", _DEIT_AUGMENTATION)
    mean: tuple[float, ...] = Preprocessing.mean
    std: tuple[float, ...] = Preprocessing.std
    crop_pct: float = Preprocessing.crop_pct
    crop_mode: str = Preprocessing.crop_mode
    interpolation: str = Preprocessing.interpolation
    background: tuple[int, ...] = Preprocessing.background
    exif_orientation: bool = Preprocessing.exif_orientation
    eval_batch_size: int = without_effect(256)
    num_threads: int = without_effect(16)
    num_workers: int = without_effect(0)

    def __post_init__(self):
        check_between(self, 0, 1, "heldout_fraction")
        check_between(self, 0, math.inf, "max_megapixels")
        check_at_least(self, 1, "eval_batch_size")
        check_at_least(self, 0, "num_threads", "num_workers")
        self.preprocessing(1)  # checks what it takes

    def preprocessing(self, image_size: int) -> Preprocessing:
        """The preprocessing for a network that takes images of this size."""
        shared = {name: getattr(self, name) for name in _PREPROCESSING}
        if self.augmentation.crop_mode:
            shared["crop_mode"] = self.augmentation.crop_mode
        return Preprocessing(image_size, **shared)

    @property
    def normalization(self) -> Normalization:
        return Normalization(self.mean, self.std)


UNIFORM_BASELINES = ("supernet", "alone", "none")
_MODEL_STAGES = {"pretrain", "transfer", "slim", "extract", "compress"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run; the defaults are FLORA as published, on DeiT-B and ImageNet.

    That is: factors of the plain SVD, low-rank-aware sampling, filtered candidates, a uniform first
    population, every candidate scored on every held-out image, and the search's own winner.

    Attributes:
      seed: of everything random.
      stages: the steps of the method's script (`flora_jax/methods`) that are done.
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
      given: the fields that a command line has set, each as "name = value".
      note: what whoever reads log, report or card should know of the run.
      train_pretrained: whether `pretrain` goes on to train the given weights by its recipe.
      probe_images: training images that the classifier of new classes is fitted to, a linear probe
        of the pretrained features, before any training; 0: it starts with zeros.
      refuse_near_chance: whether a run ends before it compresses a dense model that only guesses.
      supernet_sampling: of the subnets that the supernet is trained by: "low_rank_aware" as
        published, "uniform", or of ours "sandwich" and "nested".
      uniform_baseline: the uniform-rank network of the same MACs: "supernet" cuts it out of the
        supernet like the subnet; "alone" trains it from the dense model's SVD for as many steps as
        supernet and fine-tuning together; "none" leaves it out.
      metric: what filter and search rank by on the held-out images: top1 or log_likelihood; of a
        network without classes cosine or relative_error, of labels same_labels or log_likelihood,
        of numbers absolute_error or squared_error. Empty: the first of these.

    Raises:
      InputError: a value that makes no sense; names it, and what would be accepted.
    """

    seed: int = 0
    stages: tuple[str, ...] = PUBLISHED_STAGES
    export: tuple[str, ...] = ()
    keep_checkpoints: bool = without_effect(False)
    watch: tuple[str, ...] = without_effect(())
    profile_step: int = without_effect(0)
    fsdp: int = without_effect(1)
    model: Spec = deit("base")
    data: DataSettings = DataSettings()
    pretrained: str = ""
    note: str = without_effect("")
    given: tuple[str, ...] = without_effect(())
    train_pretrained: bool = False
    probe_images: int = 10_000
    refuse_near_chance: bool = True
    pretrain: Recipe = Recipe(**DEIT_TRAINING, label_smoothing=0.1, distill=False)
    slim: SlimSettings = SlimSettings()
    space: SpaceSettings = SpaceSettings()
    budget: BudgetSettings = BudgetSettings()
    latency: LatencySettings = LatencySettings()
    calibration: CalibrationSettings = CalibrationSettings()
    allocation: AllocationSettings = AllocationSettings()
    compression: CompressionSettings = CompressionSettings()
    supernet_sampling: str = "low_rank_aware"
    uniform_baseline: str = "supernet"
    metric: str = ""
    filter: FilterSettings = FilterSettings()
    supernet: Recipe = Recipe()
    search: SearchSettings = SearchSettings()
    finetune: Recipe = Recipe(epochs=30.0, warmup_epochs=0.0)

    def __post_init__(self):
        _check_exports(self.export, self.stages)
        object.__setattr__(self, "watch", _watchers(self.watch))
        check_at_least(self, 0, "profile_step")
        check_known(self, "uniform_baseline", UNIFORM_BASELINES)
        check_known(self, "supernet_sampling", (*SAMPLINGS, *EXTRA_SAMPLINGS))
        object.__setattr__(self, "metric", self.metric or quality_of(self.model).shown.name)
        check_known(self, "metric", tuple(metric.name for metric in METRICS))
        if self.pretrain.distill:
            raise InputError("pretrain.distill must be False: the dense model has no teacher")
        if "transfer" in self.stages and self.finetune.distill:
            raise InputError("finetune.distill must be False: nobody teaches the new classes")
        share, high = self.slim.budget.macs, self.budget.windows("macs")[-1][1]
        if "slim" in self.stages and self.cuts_by and 0 < share < high:
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
    def trains_supernet(self) -> bool:
        return "supernet" in self.stages

    @property
    def finds_ranks(self) -> bool:
        """Whether a stage chooses ranks for a budget."""
        return bool({"allocate", "search"} & set(self.stages))

    @property
    def cuts_by(self) -> str:
        """The stage that cuts subnets out, and the folder that it leaves them in; "" for none."""
        return next((stage for stage in ("extract", "compress") if stage in self.stages), "")

    @property
    def has_uniform_baseline(self) -> bool:
        return "extract" in self.stages and self.uniform_baseline != "none"

    @property
    def spending(self) -> "Spending":
        """The unit of the budgets, and their ranges."""
        unit = "latency" if self.spends_latency else "macs"
        return Spending(unit, self.budget.windows(unit))

    @property
    def spends_latency(self) -> bool:
        """Whether the budget is milliseconds, not MACs."""
        chooses = self.finds_ranks or "compress" in self.stages
        return chooses and self.search.budget == "latency"

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
        return seed_of(self.seed, purpose)


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


def _watchers(names: tuple[str, ...] | str) -> tuple[str, ...]:
    """Each of the names once; as a text, such as the command line gives, with commas."""
    texts = (names,) if isinstance(names, str) else names
    given = [name for text in texts for name in str(text).split(",") if name]
    for name in given:
        if name not in PACKAGES:
            raise InputError(f"watch: {unknown('writer', name, PACKAGES)}")
    return tuple(dict.fromkeys(given))


def network_spec(settings: Settings) -> Spec:
    """The spec of the dense model; of a transfer that of the weights, with the other classes.

    A file that stands alone does not say its own: it is the config's.
    """
    if "transfer" not in settings.stages or not describes_itself(settings.pretrained):
        return settings.model
    given = read_spec(settings.pretrained)
    return given.with_classes(settings.model.num_classes)
