"""Your own weights and pictures; all else follows from them.

    flora_jax --config=yours --config.pretrained=FOLDER --config.data.name=folder:PATH \
        --config.budget.macs="(0.45,0.5)" --workdir=runs/mine

FOLDER is a model of Hugging Face or timm (config.json beside the weights), or hf:owner/name. PATH
holds train/CLASS/ and val/CLASS/, or class folders that are split for you; pictures without classes
are images:PATH. What is None here follows from them by the rules of docs/how_to/yours.md; the log
says what it comes to, and any of it can be set. --config.image_size=98 is quicker and coarser;
--dry_run says what would be done and how long it takes.
"""

from ml_collections.config_dict import placeholder

import flora_jax as flora
from flora_jax.configs import common


def get_config():
    config = common.published(flora.deit("base"))
    config = common.improved(config)
    with config.ignore_type(), config.unlocked():
        config.model = placeholder(str)  # timm's name, where nothing beside the weights says it
        config.image_size = placeholder(int)
        for name in ("stages", "pretrained", "train_pretrained", "metric"):
            config[name] = placeholder(type(config[name]))
        for name in ("name", "heldout_fraction", "heldout_by", "mean", "std", "crop_pct"):
            config.data[name] = placeholder(type(config.data[name]))
        for name in ("crop_mode", "interpolation", "num_threads"):
            config.data[name] = placeholder(type(config.data[name]))
        for recipe in (config.pretrain, config.supernet, config.finetune):
            for name in ("epochs", "batch_size", "learning_rate"):
                recipe[name] = placeholder(type(recipe[name]))
    config.data.eval_batch_size = 128
    config.data.augmentation = {"name": "inception", "scale": (0.5, 1.0)}

    config.space.ratios = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
    config.budget.macs = (0.45, 0.5)
    config.supernet_sampling = "nested"
    config.allocation.images = 192
    config.search.update({"generations": 4, "population": 24, "mutants": 10, "crossovers": 6})
    shared = {"warmup_epochs": 0.5, "warmup_learning_rate": 1e-5, "min_learning_rate": 1e-5}
    for recipe in (config.pretrain, config.supernet, config.finetune):
        recipe.update(shared | common.NO_MIXING | {"checkpoint_every": 200})
    for recipe in (config.pretrain, config.finetune):
        recipe.relative_steps = True  # equal ones spoil good weights, and what was fitted
    config.supernet.distill_features = config.finetune.distill_features = 5.0
    return config
