"""FLORA on Swin-T, ImageNet.

No result was published for this size; the recipe is the one of Swin-B.

    python -m flora_jax.main --config=configs/swin_t.py --workdir=runs/swin_t \
        --config.pretrained=swin_tiny_patch4_window7_224.pth

What this library adds to the published method (docs/how_to/budgets.md) comes with the argument
`improved`; `runlocal` takes a tiny model and the bundled digits, in seconds on a laptop:

    python -m flora_jax.main --config=configs/swin_t.py:runlocal --workdir=runs/tiny
"""

from flora_jax.configs import imagenet

get_config = imagenet.config("swin_t")
