"""FLORA on Swin-S, ImageNet.

No result was published for this size; the recipe is the one of Swin-B.

    python -m flora_jax.main --config=configs/swin_s.py --workdir=runs/swin_s \
        --config.pretrained=swin_small_patch4_window7_224.pth

What this library adds to the published method (docs/how_to/budgets.md) comes with the argument
`improved`; `runlocal` takes a tiny model and the bundled digits, in seconds on a laptop:

    python -m flora_jax.main --config=configs/swin_s.py:runlocal --workdir=runs/tiny
"""

from flora_jax.configs import imagenet

get_config = imagenet.config("swin_s")
