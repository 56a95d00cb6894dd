"""FLORA on DeiT-B, ImageNet.

Published: 8.04 G of 17.57 G multiply-adds, 38.2 M of 86.6 M parameters, 81.85 % top-1.

    python -m flora_jax.main --config=configs/deit_b.py --workdir=runs/deit_b \
        --config.pretrained=deit_base_patch16_224.safetensors

What this library adds to the published method (docs/how_to/budgets.md) comes with the argument
`improved`; `runlocal` takes a tiny model and the bundled digits, in seconds on a laptop:

    python -m flora_jax.main --config=configs/deit_b.py:runlocal --workdir=runs/tiny
"""

from flora_jax.configs import imagenet

get_config = imagenet.config("deit_b")
