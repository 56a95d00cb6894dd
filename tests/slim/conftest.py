"""Small gated networks, masks for them, and what a cut model is held to."""

import pytest

import flora_jax as flora
from tests.helpers.networks import TINY
from tests.helpers.slimming import gated_model


@pytest.fixture(scope="module")
def tiny_gated():
    return gated_model(flora.ViTSpec(**TINY, depth=3))
