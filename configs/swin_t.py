"""FLORA on Swin-T, ImageNet.

No result was published for this size; the recipe is the one of Swin-B.

    python -m flora_jax.main --config=configs/swin_t.py --workdir=runs/swin_t \
        --config.pretrained=swin_tiny_patch4_window7_224.pth

On a laptop, in seconds, with a tiny model and the bundled digits:

    python -m flora_jax.main --config=configs/swin_t.py:runlocal --workdir=runs/tiny
"""

import flora_jax as flora
from flora_jax.configs import common


def get_config(argument: str = ""):
    if argument not in ("", "runlocal"):
        raise ValueError(f"unknown config argument {argument!r}; accepted: runlocal")
    config = common.published(flora.swin("tiny"))
    config.space.ratios = tuple(i / 8 for i in range(1, 9))
    config.budget.macs = (0.55, 0.58)
    return common.run_local(config) if argument == "runlocal" else config
