"""Blocks in a loop compute what blocks one after another compute."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.models import functional
from flora_jax.models.network import Loop, run_blocks
from flora_jax.slim import add_gates

pytestmark = pytest.mark.slow


VIT = flora.ViTSpec(
    image_size=8, patch_size=2, embed_dim=8, depth=3, num_heads=2, num_classes=3, distilled=True
)
SWIN = flora.SwinSpec(
    image_size=16,
    patch_size=2,
    embed_dim=8,
    depths=(4, 3),
    num_heads=(1, 2),
    window_size=4,
    num_classes=3,
)


def dense(spec):
    return flora.create(spec), None


def supernet(spec):
    space = flora.RankSpace.regular(spec)
    network = flora.factorize(flora.create(spec), space, implementation="masked").network
    return network, space.sample(np.random.default_rng(0), 1, "uniform")[0]


def gated(spec):
    return add_gates(flora.create(spec)).network, None


def two_widths(spec):
    """Blocks 0 and 1 are alike, the last one is not."""
    space = flora.RankSpace.regular(spec)
    genes = np.zeros_like(space.full_rank_genes)
    genes[-1] = 1
    return flora.extract(flora.factorize(flora.create(spec), space), genes), None


@pytest.mark.parametrize(
    "make, spec, num_loops",
    [
        (dense, VIT, 1),
        (supernet, VIT, 1),
        (gated, VIT, 1),
        (two_widths, VIT, 1),
        (dense, SWIN, 2),  # shifted windows in pairs, then the stage whose windows are the grid
        (supernet, SWIN, 2),
    ],
)
def test_a_loop_changes_nothing(make, spec, num_loops):
    model, genes = make(spec)
    structure, parameters = functional.split(model)
    images = jax.random.normal(jax.random.key(1), (2, *spec.image_shape))

    def loss(parameters, run):
        model = functional.merge(structure, parameters, genes)
        return jnp.square(model(images, run)).sum()

    compute = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = compute(parameters, run_blocks)
    for rematerialize in (False, True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            compute(parameters, Loop(rematerialize)),
            expected,
        )
    program = jax.jit(loss, static_argnums=1).lower(parameters, Loop()).as_text()
    assert len(re.findall(r"stablehlo\.while", program)) == num_loops
