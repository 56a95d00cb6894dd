"""The settings of a training: what decays, and what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.training.optimizer import make_optimizer
from tests.helpers.training import SETTINGS, a_network


def names_that_decay(model) -> set[str]:
    """Those that a step without a gradient changes."""
    structure, parameters = functional.split(model)
    parameters = {name: jnp.ones(p.shape) for name, p in parameters.items()}
    settings = dataclasses.replace(SETTINGS, weight_decay=0.1)
    optimizer = make_optimizer(settings, structure.undecayed)
    no_gradient = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = jax.jit(optimizer.update)(no_gradient, optimizer.init(parameters), parameters)
    return {name for name, update in updates.items() if update.any()}


def test_what_decays(micro_spec):
    parameters = functional.split(create_abstract(micro_spec))[1]
    blocks = [
        f"blocks.{i}.{layer}.kernel"
        for i in range(3)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    decayed = names_that_decay(create_abstract(micro_spec))
    assert decayed == {"patch_embed.proj.kernel", "head.kernel", *blocks}
    assert parameters["pos_embed"].ndim == parameters["cls_token"].ndim == 2
    factors = functional.split(a_network())[1]
    assert names_that_decay(a_network()) == {
        name for name in factors if name.endswith(("kernel", "down", "up"))
    }


def test_decay_without_a_gradient():
    parameters = {"head.kernel": jnp.full((2, 3), 2.0), "pos_embed": jnp.ones((2, 3))}
    settings = dataclasses.replace(SETTINGS, weight_decay=0.1)
    optimizer = make_optimizer(settings, undecayed={"pos_embed"})
    no_gradient = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = jax.jit(optimizer.update)(no_gradient, optimizer.init(parameters), parameters)
    np.testing.assert_allclose(updates["head.kernel"], -1e-2 * 0.1 * 2.0, rtol=1e-6)
    assert not updates["pos_embed"].any()


def test_relative_steps_are_as_large_as_parameters():
    parameters = {
        "small": jnp.array([[0.003, -0.004]]),
        "large": jnp.array([[3.0, -4.0]]),
        "zero": jnp.zeros(2),
    }
    gradient = jax.tree.map(jnp.ones_like, parameters)
    steps = {}
    for relative in (False, True):
        settings = dataclasses.replace(SETTINGS, weight_decay=0.0, relative_steps=relative)
        optimizer = make_optimizer(settings, undecayed=())
        steps[relative] = optimizer.update(gradient, optimizer.init(parameters), parameters)[0]
    sizes = {"small": 0.005 / 2**0.5, "large": 5 / 2**0.5, "zero": 0.001}
    for name, size in sizes.items():
        np.testing.assert_allclose(steps[True][name], steps[False][name] * size, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"checkpoint_minutes": -1}, "checkpoint_minutes must be at least 0"),
        ({"accumulate": 3}, "batch_size 8 is not a multiple of accumulate 3"),
        ({"compute_dtype": "float16"}, "compute_dtype 'float16' is unknown; choose one of float32"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must lie in \[0, 1\), got -0.1"),
        ({"result": "best"}, "result 'best' needs keep_best=True"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"clip_norm": 0.0}, "clip_norm"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_best": True, "evaluate_epochs": 0.0}, "evaluate_epochs must be above 0"),
        ({"distill_features": 1.0, "stored_predictions": True}, "needs a teacher in every step"),
    ],
)
def test_bad_recipes(fields, message):
    with pytest.raises(ValueError, match=message):
        flora.Recipe(**fields)
