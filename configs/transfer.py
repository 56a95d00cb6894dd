"""Any model on other classes: finished, slimmed, low-rank, or as published.

    python -m flora_jax.main --config=configs/transfer.py --workdir=runs/transfer \
        --config.pretrained=runs/deit_b/subnet --config.data.name=tfds:oxford_flowers102 \
        --config.model.num_classes=102

The weights give the shape, whoever wrote their folder: --config.pretrained=hf:facebook/dinov2-base
takes it from the hub (pip install 'flora_jax[hub]'). A file that stands alone takes the shape of
the config's `model`, a DeiT-B.

On a laptop, in seconds, from a model of configs/digits_slim.py that was trained on the digits 0 to
4 (--config.data.classes="(0,1,2,3,4)" --config.model.num_classes=5) to the digits 5 to 9:

    python -m flora_jax.main --config=configs/transfer.py:digits --workdir=runs/digits_transfer \
        --config.pretrained=runs/digits_slim/slim
"""

import flora_jax as flora
from flora_jax.configs import common, digits


def get_config(argument: str = ""):
    if argument not in ("", "digits"):
        raise ValueError(f"unknown config argument {argument!r}; accepted: digits")
    if argument == "digits":
        config = digits.get_config()
        config.data.classes = (5, 6, 7, 8, 9)
        config.model.num_classes = 5
    else:
        config = common.published(flora.deit("base"))
        config.finetune.update({"epochs": 100.0, "learning_rate": 5e-5, "warmup_epochs": 5.0})
    config.stages = common.TRANSFER_STAGES
    config.finetune.distill = False
    return config
