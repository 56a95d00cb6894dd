"""What all configs share: the published FLORA recipe (WACV 2024), and how to shrink it."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flora_jax.models import Spec, spec_to_json

STAGES = (
    "pretrain",
    "filter",
    "supernet",
    "search",
    "extract",
    "finetune",
    "evaluate",
    "report",
)

SLIM_STAGES = ("pretrain", "slim", "evaluate", "report")
FLORA_ON_SLIM_STAGES = ("pretrain", "slim", *STAGES[1:])
TRANSFER_STAGES = ("transfer", "evaluate", "report")

DEIT_MIXING = {"mixup": 0.8, "cutmix": 1.0, "repeats": 3}
NO_MIXING = {"mixup": 0.0, "cutmix": 0.0, "repeats": 1}  # for few epochs of small images


def recipe(**changes) -> ConfigDict:
    """One training stage. Learning rates are per 512 images of a batch."""
    fields = ConfigDict(
        {
            "epochs": 150.0,
            "batch_size": 1024,
            "learning_rate": 2.5e-5,
            "warmup_learning_rate": 5e-7,
            "min_learning_rate": 5e-7,
            "warmup_epochs": 5.0,
            "weight_decay": 0.01,
            "clip_norm": 5.0,
            "accumulate": 1,
            "compute_dtype": "float32",
            "ema_decay": 0.0,  # 0: no moving average
            "label_smoothing": 0.0,
            # Parameters of the Beta distributions that images of a batch are mixed by; 0: none.
            "mixup": 0.0,
            "cutmix": 0.0,
            "repeats": 1,  # times that an image comes in a row, each time augmented anew
            "rematerialize": False,  # less memory for a third more multiply-adds
            "distill": True,  # soft targets from the model before; False: the labels
            # The teacher runs once, before training, and its top 100 classes of every augmented
            # image are kept on disk (ImageNet: 0.5 GB an epoch); False: it runs in every step.
            "stored_predictions": False,
            "log_every": 20,
            "checkpoint_every": 1000,
            "keep_every": 0,  # steps; checkpoints at its multiples stay beside the two newest
        }
    )
    fields.update(changes)
    return fields


def model(spec: Spec) -> dict:
    """The config's `model` section: a dense network of equal blocks."""
    fields = spec_to_json(spec)
    del fields["blocks"]
    return fields


def imagenet(spec: Spec) -> ConfigDict:
    """FLORA on a published network, ImageNet, global batch 1024; recipe and budget of DeiT-B."""
    return ConfigDict(
        {
            "seed": 0,
            "stages": STAGES,
            "fsdp": 1,  # devices that share one copy of the parameters and the optimiser's state
            "model": model(spec),
            "data": {
                "name": "tfds:imagenet2012",
                "data_dir": "",  # of TFDS; empty: its default
                "test_split": "",  # empty: "validation" of TFDS, "val" of a folder
                "on_bad_image": "raise",  # or "skip": the next good one takes its place
                "classes": (),  # some of the dataset's, numbered anew; empty: all
                "heldout_fraction": 0.02,
                "augmentation": {
                    "name": "deit",
                    "scale": (0.08, 1.0),
                    "ratio": (3 / 4, 4 / 3),
                    "rand_augment": True,
                    "magnitude": 9.0,
                    "magnitude_std": 0.5,
                    "num_operations": 2,
                    "color_jitter": 0.0,  # the published code has 0.4 but RandAugment turns it off
                    "erase_probability": 0.25,
                },
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
                "eval_batch_size": 256,
                "num_threads": 16,
                "num_workers": 0,  # processes that prepare training batches in place of threads
            },
            # Weights in any layout that flora_jax.from_pretrained reads; empty: train from scratch.
            "pretrained": "",
            "pretrain": recipe(
                epochs=300.0,
                learning_rate=5e-4,
                warmup_learning_rate=1e-6,
                min_learning_rate=1e-5,
                weight_decay=0.05,
                label_smoothing=0.1,
                **DEIT_MIXING,
                distill=False,
            ),
            # ViT-Slim (CVPR 2022), where the stages name it. Budgets: the share of each kind of
            # gate to keep, or one share of the dense MACs that sets them all (0: not used).
            "slim": {
                "attention": "dim",
                "tokens": placeholder(bool),  # None: where the network's tokens can leave
                "penalty": {"attn": 2e-4, "mlp": 5e-5, "patch": 1e-4},
                "gates": recipe(
                    epochs=50.0,
                    learning_rate=5e-4,
                    min_learning_rate=5e-4,
                    warmup_epochs=0.0,
                    weight_decay=1e-3,
                    distill=False,
                ),
                "budget": {"attn": 0.7, "mlp": 0.7, "patch": 0.7, "macs": 0.0},
                "fold": True,
                "tile": 1,
                "retrain": recipe(
                    epochs=300.0,
                    learning_rate=5e-4,
                    warmup_learning_rate=1e-6,
                    min_learning_rate=1e-5,
                    weight_decay=0.05,
                    **DEIT_MIXING,
                ),
            },
            # Ranks are multiples of a tile, apart from full rank.
            "space": {"ratios": (1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 1.0), "tile": 1},
            # What the subnet may cost, at least and at most, as shares of the dense model's
            # multiply-adds or, where search.budget is "latency", of its time on this device. The
            # filter's price is in multiply-adds in either case.
            "budget": {"macs": (0.43, 0.46), "latency": (0.55, 0.6)},
            # The uniform-rank network of the same MACs: "supernet" cuts it out of the supernet
            # like the subnet; "alone" trains it from the dense model's SVD for as many steps as
            # supernet and fine-tuning together; "none" leaves it out.
            "uniform_baseline": "supernet",
            # What filter and search maximise on the held-out images: top1 or log_likelihood.
            "metric": "top1",
            "filter": {
                "drop": 0.7,
                "train_fraction": 0.1,
                "train": recipe(epochs=20.0, warmup_epochs=3.0, learning_rate=7.5e-6),
            },
            "supernet": recipe(),
            "search": {
                "generations": 20,
                "population": 50,
                "parents": 10,
                "mutants": 25,
                "crossovers": 25,
                "mutation_probability": 0.2,
                "budget": "macs",
                "latency_batch": 16,  # images that the device runs at once
            },
            "finetune": recipe(epochs=30.0, warmup_epochs=0.0),
        }
    )


_RUN_LOCAL_MODELS = {
    "vit": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "swin": {
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (2, 1),
        "num_heads": (2, 4),
        "window_size": 4,
    },
}


def run_local(config: ConfigDict) -> ConfigDict:
    """The same stages on the bundled digits with a tiny model: seconds on a laptop."""
    config.model.update(_RUN_LOCAL_MODELS[config.model.family])
    config.model.update({"image_size": 16, "num_classes": 10})
    config.data.update({"name": "digits", "heldout_fraction": 0.2, "num_threads": 1})
    config.data.augmentation = {"name": "digits"}
    config.budget.macs = (0.4, 0.6)
    config.filter.train_fraction = 0.5
    config.metric = "log_likelihood"
    config.search.update({"generations": 3, "population": 8, "parents": 4})
    config.search.update({"mutants": 3, "crossovers": 3})
    short = {"epochs": 6.0, "warmup_epochs": 0.0, "batch_size": 32, "learning_rate": 6e-2}
    short |= NO_MIXING
    for stage in (
        *(config.pretrain, config.slim.gates, config.slim.retrain),
        *(config.filter.train, config.supernet, config.finetune),
    ):
        stage.update(short)
    return config
