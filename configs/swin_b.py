"""FLORA on Swin-B, ImageNet.

Published: 42 % fewer than the dense network's 15.44 G multiply-adds, almost no accuracy lost. The
ratios were not published: eighths here, and the training recipe of FLORA-DeiT-B.

    python -m flora_jax.main --config=configs/swin_b.py --workdir=runs/swin_b \
        --config.pretrained=swin_base_patch4_window7_224.pth

On a laptop, in seconds, with a tiny model and the bundled digits:

    python -m flora_jax.main --config=configs/swin_b.py:runlocal --workdir=runs/tiny
"""

import flora_jax as flora
from flora_jax.configs import common


def get_config(argument: str = ""):
    if argument not in ("", "runlocal"):
        raise ValueError(f"unknown config argument {argument!r}; accepted: runlocal")
    config = common.published(flora.swin("base"))
    config.space.ratios = tuple(i / 8 for i in range(1, 9))
    config.budget.macs = (0.55, 0.58)
    return common.run_local(config) if argument == "runlocal" else config
