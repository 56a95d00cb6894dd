"""ImageNet configs as a table: network, rank ratios, budget, recipe; one file of configs/ each.

FLORA runs here as published. Arguments, in any combination, behind a colon:

    --config=deit_b:improved           with everything that this library adds
    --config=deit_b:runlocal           a tiny model on the bundled digits, in seconds on a laptop
    --config=deit_b:improved,runlocal  both
"""

from collections.abc import Callable

from ml_collections import ConfigDict

import flora_jax as flora
from flora_jax.configs import common

SIXTHS = tuple(i / 6 for i in range(1, 7))
EIGHTHS = tuple(i / 8 for i in range(1, 9))
NOT_SEVEN_EIGHTHS = (*EIGHTHS[:6], 1.0)

# Epochs and base learning rate of the supernet, and base learning rate of the local supernets.
RECIPE_B, RECIPE_S = (150.0, 2.5e-5, 7.5e-6), (300.0, 7.5e-5, 7.5e-5)

# No ratios or recipe were published for the Swins and the hybrids, nor any result for a network
# without a comment. A budget is a range of shares of the dense model's multiply-adds.
FLORA = {
    # 8.04 G of 17.57 G multiply-adds, 38.2 M of 86.6 M parameters, 81.85 % top-1
    "deit_b": (flora.deit("base"), NOT_SEVEN_EIGHTHS, (0.43, 0.46), RECIPE_B),
    # 2.73 G of 4.60 G multiply-adds, 12.6 M of 22.05 M parameters, 79.63 % top-1
    "deit_s": (flora.deit("small"), SIXTHS, (0.57, 0.60), RECIPE_S),
    "deit_t": (flora.deit("tiny"), SIXTHS, (0.57, 0.60), RECIPE_S),
    # 42 % fewer than 15.44 G multiply-adds
    "swin_b": (flora.swin("base"), EIGHTHS, (0.55, 0.58), RECIPE_B),
    "swin_s": (flora.swin("small"), EIGHTHS, (0.55, 0.58), RECIPE_B),
    "swin_t": (flora.swin("tiny"), EIGHTHS, (0.55, 0.58), RECIPE_B),
    # 21 to 26 % fewer multiply-adds "on compact hybrids", which are not named
    "tiny_vit_21m": (flora.tiny_vit("21m"), EIGHTHS, (0.74, 0.77), RECIPE_S),
    "tiny_vit_11m": (flora.tiny_vit("11m"), EIGHTHS, (0.74, 0.77), RECIPE_S),
    "tiny_vit_5m": (flora.tiny_vit("5m"), EIGHTHS, (0.74, 0.77), RECIPE_S),
}
SLIM = {
    # 10.6 G of 17.57 G multiply-adds, 52.6 M of 86.6 M parameters, 82.4 % top-1
    "vit_slim_deit_b": (flora.deit("base"), 0.6),
    "vit_slim_deit_s": (flora.deit("small"), 0.6),
}


def config(name: str) -> Callable[..., ConfigDict]:
    """`get_config(argument="")` of a network in one of the tables.

    What it returns raises ValueError for an argument that is not known.
    """
    if name in SLIM:
        return lambda argument="": with_argument(_slim(*SLIM[name]), argument, ("runlocal",))
    return lambda argument="": with_argument(_flora(*FLORA[name]), argument)


def with_argument(
    config: ConfigDict, argument: str, accepted: tuple[str, ...] = ("runlocal", "improved")
) -> ConfigDict:
    """The config changed as the words of the argument, with commas between them, say.

    Raises:
      ValueError: a word that is not accepted.
    """
    words = argument.split(",") if argument else []
    if not set(words) <= set(accepted):
        also = "; several with a comma between them" if len(accepted) > 1 else ""
        raise ValueError(
            f"unknown config argument {argument!r}; accepted: {', '.join(accepted)}{also}"
        )
    if "improved" in words:
        config = common.improved(config)
    return common.run_local(config) if "runlocal" in words else config


def _flora(
    spec: flora.Spec,
    ratios: tuple[float, ...],
    budget: tuple[float, float],
    recipe: tuple[float, float, float],
) -> ConfigDict:
    config = common.published(spec)
    config.space.ratios, config.budget.macs = ratios, budget
    config.supernet.epochs, config.supernet.learning_rate, local = recipe
    config.filter.train.learning_rate = local
    return config


def _slim(spec: flora.Spec, share: float) -> ConfigDict:
    config = common.published(spec)
    config.stages = common.SLIM_STAGES
    config.slim.budget.macs = share
    return config
