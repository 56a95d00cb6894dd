"""A smaller model in minutes, out of weights and a few unlabelled images.

    python -m flora_jax.main --config=configs/minutes.py --workdir=runs/minutes \
        --config.pretrained=deit_base_patch16_224.safetensors --config.data.name=images:PATH

PATH is any folder of images like those that the model will see. Head dimensions and MLP widths are
chosen together and all layers are fitted to the dense model's activations, in closed form. One
epoch of distillation from the dense model follows; --config.finetune.epochs=0 leaves it out, more
make it better. --config.budget.macs="((0.4,0.45),(0.6,0.65))" makes a model for each of several
budgets.

On a laptop, in seconds, with a tiny model and the bundled digits:

    python -m flora_jax.main --config=configs/minutes.py:runlocal --workdir=runs/tiny
"""

import flora_jax as flora
from flora_jax.configs import common, imagenet


def get_config(argument: str = ""):
    config = common.published(flora.deit("base"))
    config.stages = common.MINUTES_STAGES
    config.budget.macs = (0.55, 0.6)
    config.data.update({"name": "images:photographs", "heldout_fraction": 0.02})
    config.finetune.update({"epochs": 1.0, "batch_size": 32, "learning_rate": 4e-3})
    config.finetune.update({"relative_steps": True, "warmup_epochs": 0.1, "weight_decay": 0.0})
    return imagenet.with_argument(config, argument, ("runlocal",))
