"""Checkpoints to read and to damage."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.io.checkpoint import Checkpoints
from flora_jax.training.step import TrainState


def state_at(step: int, size: int = 100) -> TrainState:
    """A state that differs in every array from that of another step."""
    noise = np.random.default_rng(step).normal(size=size)
    return TrainState(
        step=jnp.int32(step),
        parameters={"w": jnp.float32(noise), "b": jnp.float32(noise[:3])},
        optimizer={"w": jnp.bfloat16(noise)},
        average=None,
    )


def restored_step(directory) -> int:
    """The step that training goes on from; its arrays must be those saved."""
    with Checkpoints(directory) as checkpoints:
        state = checkpoints.restore(state_at(0))
    assert_same(state, state_at(int(state.step)))
    return int(state.step)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def files(directory) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def program(module: str, *calls: str) -> list[str]:
    """The command of a process that makes these calls to functions of the module."""
    lines = (f"import {module} as part", *(f"part.{call}" for call in calls))
    return [sys.executable, "-c", "; ".join(lines)]
