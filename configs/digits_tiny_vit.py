"""FLORA on a small TinyViT and the digits, enlarged to 32 pixels.

python -m flora_jax.main --config=configs/digits_tiny_vit.py --workdir=runs/digits_tiny_vit
"""

import flora_jax as flora
from flora_jax.configs import common, digits


def get_config():
    config = digits.get_config()
    config.model = common.published(
        flora.TinyViTSpec(
            image_size=32,
            embed_dims=(16, 48, 96),
            depths=(1, 2, 4),
            num_heads=(1, 2, 4),
            window_sizes=(4, 4, 2),
            num_classes=10,
            in_channels=1,
        )
    ).model
    config.budget.macs = (0.64, 0.68)
    config.supernet.epochs, config.finetune.epochs = 40.0, 16.0
    return config
