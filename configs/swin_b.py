"""FLORA on Swin-B, ImageNet.

Published: 42 % fewer than the dense network's 15.44 G multiply-adds, almost no accuracy lost. The
ratios were not published: eighths here, and the training recipe of FLORA-DeiT-B.

    python -m flora_jax.main --config=configs/swin_b.py --workdir=runs/swin_b \
        --config.pretrained=swin_base_patch4_window7_224.pth

What this library adds to the published method (docs/how_to/budgets.md) comes with the argument
`improved`; `runlocal` takes a tiny model and the bundled digits, in seconds on a laptop:

    python -m flora_jax.main --config=configs/swin_b.py:runlocal --workdir=runs/tiny
"""

from flora_jax.configs import imagenet

get_config = imagenet.config("swin_b")
