"""A teacher and its stored predictions."""

import pytest

from flora_jax.training.stored_predictions import Teacher
from tests.helpers.predictions import NORMALIZATION, a_description, a_model, write


@pytest.fixture(scope="module")
def teacher():
    return Teacher(a_model(seed=1), NORMALIZATION)


@pytest.fixture(scope="module")
def description(teacher):
    return a_description(teacher)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, description, teacher):
    """A finished folder. Tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("stored")
    write(folder, description, teacher)
    return folder
