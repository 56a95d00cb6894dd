"""Saving and restoring states, errors in the background, folders of trainings."""

import functools
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.cluster import mesh
from flora_jax.io import checkpoint
from flora_jax.io.checkpoint import Checkpoints, read_parameters
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.training.settings import TrainSettings
from flora_jax.training.step import initial_state
from flora_jax.weights.folder import save_description_once
from tests.helpers.checkpoints import assert_same, files, names, restored_step, state_at


def test_a_state_comes_back_on_the_devices_it_is_wanted_on(saved):
    template = mesh.replicate(state_at(0), mesh.make_mesh())
    with Checkpoints(saved) as checkpoints:
        state = checkpoints.restore(template)
    assert_same(state, state_at(6))
    for ours, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(template), strict=True):
        assert ours.sharding == wanted.sharding


def test_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        state = state_at(0)
        assert checkpoints.restore(state) is state
        assert checkpoints.latest_path() is None
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        read_parameters(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        read_parameters(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "keep, keep_every, kept",
    [(2, 0, ["10", "8"]), (1, 0, ["10"]), (1, 4, ["10", "4", "8"]), (2, 5, ["10", "8"])],
)
def test_which_steps_stay(tmp_path, keep, keep_every, kept):
    with Checkpoints(tmp_path, keep, keep_every) as checkpoints:
        for step in (2, 4, 6, 8, 10):
            checkpoints.save(step, state_at(step))
        assert checkpoints.latest_path() == tmp_path / "10"
    assert names(tmp_path) == [*kept, "manifests"]
    assert names(tmp_path / "manifests") == [f"{step}.json" for step in kept]
    assert restored_step(tmp_path) == 10


def test_a_step_is_not_saved_over(run):
    before = files(run)
    with Checkpoints(run) as checkpoints, pytest.raises(ValueError, match="6 already exists: r"):
        checkpoints.save(6, state_at(7))
    assert files(run) == before


def test_file_modes_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        with Checkpoints(tmp_path / "run") as checkpoints:
            checkpoints.save(3, state_at(3))
    finally:
        os.umask(previous)
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    """On CPU, what is being written are views of the very buffers that the next step is given."""
    step = jax.jit(functools.partial(jax.tree.map, lambda x: x * 2 + 1), donate_argnums=0)
    state = state_at(3, size=2**22)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        assert_same(checkpoints.restore(state), state_at(3, size=2**22))


def test_save_returns_before_the_step_is_complete(tmp_path, monkeypatch):
    may_go_on = threading.Event()
    write = checkpoint.write_manifest

    def write_later(*arguments):
        assert may_go_on.wait(timeout=60)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_manifest", write_later)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state_at(3))
        assert not (tmp_path / "manifests" / "3.json").exists()
        may_go_on.set()
        assert checkpoints.latest_path() == tmp_path / "3"
    assert restored_step(tmp_path) == 3


def _fail(*_):
    raise OSError("the cable is out")


USES = {
    "save": lambda checkpoints: checkpoints.save(12, state_at(12)),
    "restore": lambda checkpoints: checkpoints.restore(state_at(0)),
    "latest_path": Checkpoints.latest_path,
    "exit": lambda checkpoints: checkpoints.__exit__(None, None, None),
}


@pytest.mark.parametrize("use", USES)
def test_an_error_in_the_background_surfaces(run, monkeypatch, use):
    """At the next call, or at the end; only once, and the steps before it stay."""
    checkpoints = Checkpoints(run, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_manifest", _fail)
        checkpoints.save(9, state_at(9))
        with pytest.raises(OSError, match=rf"saving {run}/9 failed: the cable is out"):
            USES[use](checkpoints)
    checkpoints.__exit__(None, None, None)
    assert restored_step(run) == 6


def test_an_error_in_the_background_is_not_hidden_by_one_in_the_foreground(run, monkeypatch):
    """Who stops a run must learn that its last state was not saved."""

    def stop_after_save():
        with Checkpoints(run) as checkpoints:
            checkpoints.save(9, state_at(9))
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_manifest", _fail)
    with pytest.raises(OSError, match=r"saving .*/run/9 failed") as caught:
        stop_after_save()
    assert isinstance(caught.value.__context__, KeyboardInterrupt)


# --- opening a training folder --------------------------------------------------------------------


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
