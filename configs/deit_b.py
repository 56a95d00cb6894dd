"""FLORA on DeiT-B, ImageNet.

Published: 8.04 G of 17.57 G multiply-adds, 38.2 M of 86.6 M parameters, 81.85 % top-1.

    python -m flora_jax.main --config=configs/deit_b.py --workdir=runs/deit_b \
        --config.pretrained=deit_base_patch16_224.safetensors

On a laptop, in seconds, with a tiny model and the bundled digits:

    python -m flora_jax.main --config=configs/deit_b.py:runlocal --workdir=runs/tiny
"""

import flora_jax as flora
from flora_jax.configs import common


def get_config(argument: str = ""):
    if argument not in ("", "runlocal"):
        raise ValueError(f"unknown config argument {argument!r}; accepted: runlocal")
    config = common.published(flora.deit("base"))
    return common.run_local(config) if argument == "runlocal" else config
