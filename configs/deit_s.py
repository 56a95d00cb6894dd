"""FLORA on DeiT-S, ImageNet.

Published: 2.73 G of 4.60 G multiply-adds, 12.6 M of 22.05 M parameters, 79.63 % top-1.

    python -m flora_jax.main --config=configs/deit_s.py --workdir=runs/deit_s \
        --config.pretrained=deit_small_patch16_224.safetensors

What this library adds to the published method (docs/how_to/budgets.md) comes with the argument
`improved`; `runlocal` takes a tiny model and the bundled digits, in seconds on a laptop:

    python -m flora_jax.main --config=configs/deit_s.py:runlocal --workdir=runs/tiny
"""

from flora_jax.configs import imagenet

get_config = imagenet.config("deit_s")
