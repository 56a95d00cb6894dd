"""The config of `finished_run`, and what differs from it."""

from ml_collections import ConfigDict

from flora_jax.configs import deit_t


def tiny_config(**changes) -> ConfigDict:
    config = deit_t.get_config("improved,runlocal")
    config.update_from_flattened_dict(changes)
    return config
