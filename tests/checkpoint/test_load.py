"""Opening a training folder."""

import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.cluster import mesh
from flora_jax.io.checkpoint import Checkpoints
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.training.settings import TrainSettings
from flora_jax.training.step import initial_state
from flora_jax.weights.folder import save_description_once
from tests.helpers.checkpoints import assert_same


def state_of(model, step, ema_decay=0.0):
    """A state whose moving average differs from its parameters."""
    settings = TrainSettings(steps=9, batch_size=1, learning_rate=0.1, ema_decay=ema_decay)
    structure, parameters = functional.split(model)
    parameters = {name: np.array(value) for name, value in parameters.items()}
    state = initial_state(structure, parameters, settings)
    if ema_decay:
        state = state._replace(average={name: -value for name, value in parameters.items()})
    return mesh.replicate(state._replace(step=jnp.int32(step)), mesh.make_mesh())


def test_load_opens_a_training_folder(tiny_model, tiny_space, tmp_path):
    supernet = flora.factorize(tiny_model, tiny_space)
    save_description_once(supernet, tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(4, state_of(supernet.network, 4))
    again = flora.load(tmp_path)
    assert_same(functional.split(again.network)[1], functional.split(supernet.network)[1])
    assert again.space.choices == supernet.space.choices


def test_load_prefers_the_moving_average(tiny_model, tmp_path):
    save_description_once(tiny_model, tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(4, state_of(tiny_model, 4, ema_decay=0.9))
    loaded, parameters = (functional.split(m)[1] for m in (flora.load(tmp_path), tiny_model))
    for name, value in parameters.items():
        np.testing.assert_array_equal(loaded[name], -value)


def test_relative_folders(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("run/checkpoints") as checkpoints:
        checkpoints.save(3, state_of(tiny_model, 3))
    save_description_once(tiny_model, "run")
    loaded = functional.split(flora.load("run"))[1]
    for name, value in state_of(tiny_model, 3).parameters.items():
        np.testing.assert_array_equal(loaded[name], value)


def test_checkpoint_of_another_network(tiny_model, micro_spec, tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state_of(tiny_model, 3))
    save_description_once(create_abstract(micro_spec), tmp_path)
    with pytest.raises(ValueError, match="do not fit the model"):
        flora.load(tmp_path)
