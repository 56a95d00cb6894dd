"""FLORA on a small Swin and the digits.

python -m flora_jax.main --config=configs/digits_swin.py --workdir=runs/digits_swin
"""

import flora_jax as flora
from flora_jax.configs import common, digits


def get_config():
    config = digits.get_config()
    config.model = common.published(
        flora.SwinSpec(
            image_size=8,
            patch_size=1,
            embed_dim=32,
            depths=(2, 4),
            num_heads=(2, 4),
            window_size=4,
            absolute_pos_embed=True,
            num_classes=10,
            in_channels=1,
        )
    ).model
    config.budget.macs = (0.53, 0.56)
    return config
