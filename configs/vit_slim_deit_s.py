"""ViT-Slim on DeiT-S, ImageNet: gates, cut, retraining.

No row of the published table is reproduced here: 40 % fewer multiply-adds are asked for.

    python -m flora_jax.main --config=configs/vit_slim_deit_s.py --workdir=runs/vit_slim_deit_s \
        --config.pretrained=deit_small_patch16_224.safetensors

On a laptop, in seconds, with a tiny model and the bundled digits:

    python -m flora_jax.main --config=configs/vit_slim_deit_s.py:runlocal --workdir=runs/tiny
"""

import flora_jax as flora
from flora_jax.configs import common


def get_config(argument: str = ""):
    if argument not in ("", "runlocal"):
        raise ValueError(f"unknown config argument {argument!r}; accepted: runlocal")
    config = common.published(flora.deit("small"))
    config.stages = common.SLIM_STAGES
    config.slim.budget.macs = 0.6
    return common.run_local(config) if argument == "runlocal" else config
