"""FLORA on TinyViT-21M, ImageNet.

FLORA's paper reports 21 to 26 % fewer multiply-adds on compact hybrids and names no network, no
ratios and no recipe for them: those of DeiT-S here.

    python -m flora_jax.main --config=configs/tiny_vit_21m.py --workdir=runs/tiny_vit_21m \
        --config.pretrained=hf:timm/tiny_vit_21m_224.dist_in22k_ft_in1k

On a laptop, in seconds, with a tiny model and the bundled digits:

    python -m flora_jax.main --config=configs/tiny_vit_21m.py:runlocal --workdir=runs/tiny
"""

import flora_jax as flora
from flora_jax.configs import common


def get_config(argument: str = ""):
    if argument not in ("", "runlocal"):
        raise ValueError(f"unknown config argument {argument!r}; accepted: runlocal")
    config = common.published(flora.tiny_vit("21m"))
    config.space.ratios = tuple(i / 8 for i in range(1, 9))
    config.budget.macs = (0.74, 0.77)
    config.supernet.update({"epochs": 300.0, "learning_rate": 7.5e-5})
    config.filter.train.learning_rate = 7.5e-5
    return common.run_local(config) if argument == "runlocal" else config
