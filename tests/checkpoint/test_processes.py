"""Checkpoints of a state that lies on several processes."""

import functools
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.cluster import mesh, processes
from flora_jax.io.checkpoint import Checkpoints, read_parameters
from flora_jax.training.step import TrainState
from tests.helpers.checkpoints import assert_same, names, program
from tests.helpers.commands import ROOT, free_port

_program = functools.partial(program, __name__)
pytestmark = pytest.mark.processes


def sharded_state(step: int, over: jax.sharding.Mesh) -> TrainState:
    state = TrainState(jnp.int32(step), {"w": jnp.full((512, 256), step, jnp.float32)}, {}, None)
    return jax.jit(lambda tree: tree)(mesh.shard_parameters(state, over))


def save_and_restore_together(directory: str, port: int, process: int):
    """The program of one of two processes that hold half of the state each."""
    processes.connect(f"127.0.0.1:{port}", 2, process)
    over = mesh.make_mesh(fsdp=2)
    with Checkpoints(directory) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(step, sharded_state(step, over))
    processes.wait_for_all("saved")
    if process == 0:
        (pathlib.Path(directory) / "9" / "_CHECKPOINT_METADATA").write_text("{}")
    with Checkpoints(directory) as checkpoints:
        state = checkpoints.restore(sharded_state(0, over))
        (shard,) = state.parameters["w"].addressable_shards
        print(int(state.step), shard.data.shape, float(shard.data.min()), float(shard.data.max()))
        checkpoints.save(9, sharded_state(9, over))


def test_two_processes_agree_and_one_goes_on_alone(tmp_path):
    port = free_port()
    calls = [f"save_and_restore_together({str(tmp_path)!r}, {port}, {i})" for i in range(2)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    options["env"] = os.environ | {"JAX_PLATFORMS": "cpu"}
    started = [subprocess.Popen(_program(call), **options) for call in calls]
    try:
        outputs = [process.communicate(timeout=60) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    for output, errors in outputs:
        assert output.endswith("6 (256, 256) 6.0 6.0\n"), errors
    assert names(tmp_path) == ["6", "9", "damaged", "manifests"]
    np.testing.assert_array_equal(read_parameters(tmp_path)["w"], np.full((512, 256), 9))
    with Checkpoints(tmp_path) as checkpoints:
        alone = sharded_state(0, mesh.make_mesh())
        assert_same(checkpoints.restore(alone), sharded_state(9, mesh.make_mesh()))
