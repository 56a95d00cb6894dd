"""The ViTs of today, all of one spec: outputs of timm and transformers, and what is made of them."""

import jax
import numpy as np
import pytest

from flora_jax.models import functional
from tests.helpers import modern

NAMES = list(modern.SPECS)
TOLERANCE = {"atol": 1e-4, "rtol": 0}


@jax.jit(static_argnums=0)
def outputs(structure, parameters, images):
    """(what the model gives, its features)"""
    network = functional.merge(structure, parameters)
    return network(images), network.features(images)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_library(name):
    golden, model = modern.golden(name), modern.model(name)
    given, tokens = outputs(*functional.split(model), modern.images(name))
    if "output" in golden:
        assert np.std(golden["output"]) > 0.01
        np.testing.assert_allclose(given, golden["output"], **TOLERANCE)
    if "pooled" in golden:
        np.testing.assert_allclose(given, golden["pooled"], **TOLERANCE)
    if "tokens" in golden:
        expected = golden["tokens"]
        if name == "hf_clip":  # transformers gives CLIP's tokens as they are before the last norm
            expected = model.norm(expected.reshape(-1, 48)).reshape(expected.shape)
        np.testing.assert_allclose(tokens, expected, **TOLERANCE)
        assert {"output", "pooled"} & golden.keys() or np.allclose(given, tokens[:, 0])
