"""FLORA on a pretrained DINOv2 ViT-S/14 and clip art; two budgets.

    pip install '.[benchmarks]'
    python benchmarks/dinov2.py --out runs/material/dinov2_vits14
    python benchmarks/clip_art.py --out runs/material/clip_art
    python -m flora_jax.main --config=configs/clip_art.py --workdir=runs/clip_art

Two budgets from one run: fifty minutes on two CPU cores at 70 x 70 pixels.
"""

import flora_jax as flora
from flora_jax.configs import common


def get_config():
    config = common.published(
        flora.ViTSpec(
            image_size=70, patch_size=14, embed_dim=384, depth=12, num_heads=6, num_classes=12
        )
    )
    config = common.improved(config)
    config.stages = tuple(stage for stage in config.stages if stage != "filter")
    config.pretrained = "runs/material/dinov2_vits14"
    config.train_pretrained = True
    config.data.update({"name": "folder:runs/material/clip_art", "heldout_fraction": 0.15})
    config.data.update({"num_threads": 1, "eval_batch_size": 128})
    config.data.augmentation = {"name": "inception", "scale": (0.5, 1.0)}
    config.space.ratios = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
    config.budget.macs = ((0.33, 0.35), (0.53, 0.55))
    config.metric = "log_likelihood"  # the held-out images are few

    shared = {"batch_size": 64, "warmup_learning_rate": 1e-5, "min_learning_rate": 1e-5}
    shared |= common.NO_MIXING | {"checkpoint_every": 200, "warmup_epochs": 0.5}
    config.pretrain.update(shared | {"epochs": 7.0, "learning_rate": 3e-4})
    shared["distill_features"] = 5.0  # 12 classes of 2,000 images say little (docs/decisions.md)
    config.supernet.update(shared | {"epochs": 8.0, "learning_rate": 3e-4})
    config.supernet_sampling = "nested"  # with few steps ahead of the others (docs/decisions.md)
    config.finetune.update(shared | {"epochs": 8.0, "learning_rate": 5e-4})
    config.allocation.images = 128
    config.search.update({"generations": 4, "population": 24, "mutants": 10, "crossovers": 6})
    return config
