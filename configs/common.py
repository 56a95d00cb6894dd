"""The published FLORA recipe (WACV 2024), what is ours beside it, and both shrunk to a laptop.

The defaults of every field, and its meaning, are in flora_jax/runs/settings.py.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flora_jax.evaluation.outputs import quality_of
from flora_jax.models.spec import Spec
from flora_jax.runs.settings import ENDING, PUBLISHED_STAGES, Settings

SLIM_STAGES = ("pretrain", "slim", "evaluate", "report")
FLORA_ON_SLIM_STAGES = ("pretrain", "slim", *PUBLISHED_STAGES[1:])
IMPROVED_STAGES = ("pretrain", "calibrate", "filter", "supernet", "allocate", "search", *ENDING)
MINUTES_STAGES = ("pretrain", "compress", "finetune", "evaluate", "report")
TRANSFER_STAGES = ("transfer", "evaluate", "report")

NO_MIXING = {"mixup": 0.0, "cutmix": 0.0, "repeats": 1}  # for few epochs of small images


def published(spec: Spec) -> ConfigDict:
    """FLORA as published on a network, ImageNet, global batch 1024; recipe and budget of DeiT-B."""
    return as_config(Settings(model=spec))


def improved(config: ConfigDict) -> ConfigDict:
    """The same with all that is ours: weighed factors, and a search that has to beat an allocation.

    What each of them gives is in docs/decisions.md.
    """
    slims = ("slim",) if "slim" in config.stages else ()
    config.stages = ("pretrain", *slims, *IMPROVED_STAGES[1:])  # calibrate and allocate
    config.search.halving = True  # a candidate that is behind is not scored on every image
    return config


def as_config(settings: Settings) -> ConfigDict:
    """The settings as a config, any field of which the command line can set."""
    config = ConfigDict(settings.to_config())
    if config.slim.tokens is None:  # where the network's tokens can leave
        config.slim.tokens = placeholder(bool)
    if config.metric == quality_of(settings.model).shown.name:
        config.metric = ""  # the first one that the network, in the end, is measured by
    return config


_RUN_LOCAL_MODELS = {
    "vit": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "swin": {
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (2, 1),
        "num_heads": (2, 4),
        "window_size": 4,
    },
    "tiny_vit": {
        "embed_dims": (4, 32, 48),
        "depths": (1, 2, 2),
        "num_heads": (1, 2, 3),
        "window_sizes": (4, 2, 1),
    },
}


def run_local(config: ConfigDict) -> ConfigDict:
    """The same stages on the bundled digits with a tiny model: seconds on a laptop."""
    config.note = "runlocal: a tiny model on the bundled digits; it shows how a run goes, no more"
    config.model.update(_RUN_LOCAL_MODELS[config.model.family])
    config.model.update({"image_size": 16, "num_classes": 10})
    config.data.update({"name": "digits", "heldout_fraction": 0.2, "num_threads": 1})
    config.data.augmentation = {"name": "digits"}
    config.space.ratios = (1 / 8, 1 / 4, 1 / 2, 1.0)  # fewer to compile and to score
    config.budget.macs = (0.4, 0.6)
    config.filter.train_fraction = 0.5
    config.metric = "log_likelihood"
    config.refuse_near_chance = False  # seconds of training teach little
    config.search.update({"generations": 3, "population": 8, "parents": 4})
    config.search.update({"mutants": 3, "crossovers": 3})
    short = {"epochs": 3.0, "warmup_epochs": 0.0, "batch_size": 32, "learning_rate": 6e-2}
    short |= NO_MIXING
    for stage in (
        *(config.pretrain, config.slim.gates, config.slim.retrain),
        *(config.filter.train, config.supernet, config.finetune),
    ):
        stage.update(short)
    return config
