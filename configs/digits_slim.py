"""ViT-Slim on the digits: minutes on a CPU.

python -m flora_jax.main --config=configs/digits_slim.py --workdir=runs/digits_slim
"""

from flora_jax.configs import common, digits


def get_config():
    config = digits.get_config()
    config.stages = common.SLIM_STAGES
    config.slim.penalty = {"attn": 1e-3, "mlp": 2.5e-4, "patch": 1e-3}
    config.slim.gates.update(
        {
            "epochs": 60.0,
            "batch_size": 64,
            "learning_rate": 8e-3,
            "min_learning_rate": 8e-3,
            "checkpoint_every": 500,
        }
    )
    config.slim.budget.update({"attn": 0.5, "mlp": 0.55, "patch": 0.85})
    config.slim.retrain.update(
        common.NO_MIXING
        | {
            "epochs": 60.0,
            "batch_size": 64,
            "learning_rate": 6e-3,
            "warmup_learning_rate": 8e-5,
            "min_learning_rate": 8e-5,
            "warmup_epochs": 2.0,
            "weight_decay": 0.01,
            "checkpoint_every": 500,
        }
    )
    return config
