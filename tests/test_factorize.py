"""What an SVD can be taken of, and what is said where it cannot."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.flora.svd import svd_factors
from flora_jax.models import functional


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_factorize_of_what_is_not_finite(tiny_model, tiny_space, tiny_images, value):
    structure, parameters = functional.split(tiny_model)
    stats = flora.calibrate(tiny_model, tiny_images)
    name = "blocks.1.mlp.fc2"
    moments = stats.moments | {name: np.full_like(stats.moments[name], value)}
    with pytest.raises(
        ValueError, match=r"blocks\.1\.mlp\.fc2 .* second moment of its input is not"
    ):
        flora.factorize(
            tiny_model, tiny_space, calibration=dataclasses.replace(stats, moments=moments)
        )
    parameters[f"{name}.kernel"] = parameters[f"{name}.kernel"].at[2, 3].set(value)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc2 .* its kernel is not finite"):
        flora.factorize(functional.merge(structure, parameters), tiny_space)


def test_factorize_where_a_decomposition_fails(tiny_model, tiny_space, tiny_images):
    """The moment of no tokens, below zero; and singular values that float16 cannot hold."""
    stats, name = flora.calibrate(tiny_model, tiny_images), "blocks.0.attn.qkv"
    moments = stats.moments | {name: -stats.moments[name]}
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv cannot .*: .*positive definite"):
        flora.factorize(
            tiny_model, tiny_space, calibration=dataclasses.replace(stats, moments=moments)
        )
    structure, parameters = functional.split(tiny_model)
    parameters[f"{name}.kernel"] = jnp.full_like(parameters[f"{name}.kernel"], 6e4, jnp.float16)
    with pytest.raises(ValueError, match=r"attn\.qkv cannot .*: its factors exceed float16"):
        flora.factorize(functional.merge(structure, parameters), tiny_space)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_factorised_in_float32(tiny_model, tiny_space, dtype):
    structure, parameters = functional.split(tiny_model)
    halves = {name: p.astype(dtype) for name, p in parameters.items()}
    supernet = flora.factorize(functional.merge(structure, halves), tiny_space)
    found, layer = functional.split(supernet.network)[1], tiny_space.spec.layers[0]
    kernel = np.asarray(halves[f"{layer.name}.kernel"], np.float32)
    for part, factor in zip(("down", "up"), svd_factors(kernel, "down"), strict=True):
        assert found[f"{layer.name}.{part}"].dtype == dtype
        np.testing.assert_array_equal(found[f"{layer.name}.{part}"], factor.astype(dtype))
