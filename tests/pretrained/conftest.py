"""Models with random parameters, and their weights in any layout."""

import numpy as np
import pytest

import flora_jax as flora
from tests.helpers.slimming import TINY_HYBRID
from tests.helpers.weights import SWINS, VITS, random_model


@pytest.fixture(scope="module")
def models():
    specs = VITS | SWINS | {"tiny_vit": TINY_HYBRID}
    return {name: random_model(spec) for name, spec in specs.items()}


@pytest.fixture(scope="module")
def vit(models):
    return models["vit"]


@pytest.fixture(scope="module")
def swin(models):
    return models["swin"]


@pytest.fixture(scope="module")
def subnets(models):
    """Compressed models; each has a layer that stayed dense."""
    found = {}
    for name in ("vit", "distilled", "no_qkv_bias", "swin", "tiny_vit"):
        space = flora.RankSpace.regular(models[name].spec, ratios=(1 / 4, 1 / 2, 1))
        genes = np.arange(space.num_layers) % 3
        found[name] = flora.extract(flora.factorize(models[name], space), genes)
        assert {None} < set(found[name].spec.ranks)
    return found
