"""FLORA on TinyViT-5M, ImageNet.

FLORA's paper reports 21 to 26 % fewer multiply-adds on compact hybrids and names no network, no
ratios and no recipe for them: those of DeiT-S here.

    python -m flora_jax.main --config=configs/tiny_vit_5m.py --workdir=runs/tiny_vit_5m \
        --config.pretrained=hf:timm/tiny_vit_5m_224.dist_in22k_ft_in1k

What this library adds to the published method (docs/how_to/budgets.md) comes with the argument
`improved`; `runlocal` takes a tiny model and the bundled digits, in seconds on a laptop:

    python -m flora_jax.main --config=configs/tiny_vit_5m.py:runlocal --workdir=runs/tiny
"""

from flora_jax.configs import imagenet

get_config = imagenet.config("tiny_vit_5m")
