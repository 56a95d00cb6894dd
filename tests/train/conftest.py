"""A tiny network, its batches and settings, and runs of them."""

import pytest

from tests.helpers.training import SETTINGS, states


@pytest.fixture(scope="module")
def by_hand():
    """The states and metrics of a whole run, step by step."""
    return states(SETTINGS, SETTINGS.steps)
