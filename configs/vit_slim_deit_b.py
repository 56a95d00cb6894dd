"""ViT-Slim on DeiT-B, ImageNet: gates, cut, retraining.

Published: 10.6 G of 17.57 G multiply-adds, 52.6 M of 86.6 M parameters, 82.4 % top-1.

    python -m flora_jax.main --config=configs/vit_slim_deit_b.py --workdir=runs/vit_slim_deit_b \
        --config.pretrained=deit_base_patch16_224.safetensors

On a laptop, in seconds, with a tiny model and the bundled digits:

    python -m flora_jax.main --config=configs/vit_slim_deit_b.py:runlocal --workdir=runs/tiny
"""

from flora_jax.configs import imagenet

get_config = imagenet.config("vit_slim_deit_b")
