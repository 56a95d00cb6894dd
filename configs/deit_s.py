"""FLORA on DeiT-S, ImageNet.

Published: 2.73 G of 4.60 G multiply-adds, 12.6 M of 22.05 M parameters, 79.63 % top-1.

    python -m flora_jax.main --config=configs/deit_s.py --workdir=runs/deit_s \
        --config.pretrained=deit_small_patch16_224.safetensors

On a laptop, in seconds, with a tiny model and the bundled digits:

    python -m flora_jax.main --config=configs/deit_s.py:runlocal --workdir=runs/tiny
"""

import flora_jax as flora
from flora_jax.configs import common


def get_config(argument: str = ""):
    if argument not in ("", "runlocal"):
        raise ValueError(f"unknown config argument {argument!r}; accepted: runlocal")
    config = common.published(flora.deit("small"))
    config.space.ratios = tuple(i / 6 for i in range(1, 7))
    config.budget.macs = (0.57, 0.60)
    config.supernet.update({"epochs": 300.0, "learning_rate": 7.5e-5})
    config.filter.train.learning_rate = 7.5e-5
    return common.run_local(config) if argument == "runlocal" else config
