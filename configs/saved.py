"""The config of a run that is there already: what --workdir alone goes on with."""

from etils import epath

from flora_jax.configs import common
from flora_jax.runs.workdir import saved_settings


def get_config(workdir: str):
    return common.as_config(saved_settings(epath.Path(workdir)))
