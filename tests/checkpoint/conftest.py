"""Checkpoints to read and to damage."""

import shutil

import pytest

from flora_jax.io.checkpoint import Checkpoints
from tests.helpers.checkpoints import state_at


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 3 and 6. Tests leave it as it is."""
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory) as checkpoints:
        for step in (3, 6):
            checkpoints.save(step, state_at(step))
    return directory


@pytest.fixture
def run(saved, tmp_path):
    """A copy of steps 3 and 6 to damage."""
    return shutil.copytree(saved, tmp_path / "run")
