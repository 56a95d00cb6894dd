"""ViT-Slim on DeiT-S, ImageNet: gates, cut, retraining.

No row of the published table is reproduced here: 40 % fewer multiply-adds are asked for.

    python -m flora_jax.main --config=configs/vit_slim_deit_s.py --workdir=runs/vit_slim_deit_s \
        --config.pretrained=deit_small_patch16_224.safetensors

On a laptop, in seconds, with a tiny model and the bundled digits:

    python -m flora_jax.main --config=configs/vit_slim_deit_s.py:runlocal --workdir=runs/tiny
"""

from flora_jax.configs import imagenet

get_config = imagenet.config("vit_slim_deit_s")
