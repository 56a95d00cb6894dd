"""FLORA on DeiT-T, ImageNet.

No result was published for this size; the recipe is the one of DeiT-S.

    python -m flora_jax.main --config=configs/deit_t.py --workdir=runs/deit_t \
        --config.pretrained=deit_tiny_patch16_224.safetensors

What this library adds to the published method (docs/how_to/budgets.md) comes with the argument
`improved`; `runlocal` takes a tiny model and the bundled digits, in seconds on a laptop:

    python -m flora_jax.main --config=configs/deit_t.py:runlocal --workdir=runs/tiny
"""

from flora_jax.configs import imagenet

get_config = imagenet.config("deit_t")
