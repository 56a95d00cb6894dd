"""A smaller model in minutes, out of weights and unlabelled pictures.

    flora_jax --config=minutes --config.pretrained=FOLDER --config.data.name=images:PATH \
        --workdir=runs/minutes

FOLDER and PATH, and all that follows from them, are those of configs/yours.py. Head dimensions and
MLP widths are chosen together and all layers are fitted to the dense model's activations, in closed
form. One epoch of distillation from the dense model follows; --config.finetune.epochs=0 leaves it
out, more make it better. Nothing is trained before: for classes that the weights do not know
(folder:PATH) a linear probe of their features is the classifier, which configs/yours.py trains on.
--config.budget.macs="((0.4,0.45),(0.6,0.65))" makes a model for each of several budgets.

On a laptop, in seconds, with a tiny model and the bundled digits:

    flora_jax --config=minutes:runlocal --workdir=runs/tiny
"""

import flora_jax as flora
from flora_jax.configs import common, imagenet, yours


def get_config(argument: str = ""):
    config = common.published(flora.deit("base")) if argument else yours.get_config()
    with config.ignore_type():
        config.stages = common.MINUTES_STAGES
        config.train_pretrained = False
        config.budget.macs = (0.55, 0.6)
        config.finetune.update({"epochs": 1.0, "relative_steps": True, "weight_decay": 0.0})
        config.finetune.warmup_epochs = 0.1
    return imagenet.with_argument(config, argument, ("runlocal",))
