"""Training on several devices, in a process that has four."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.cluster.mesh import make_mesh
from flora_jax.weights.folder import save_description_once
from tests.helpers.commands import ROOT
from tests.helpers.training import (
    NORMALIZATION,
    SETTINGS,
    SPACE,
    Interruption,
    batch_of,
    genes_of,
    metrics_of,
    run,
)

pytestmark = pytest.mark.slow


def until(end):
    """The batches before step `end`, then an interruption; all of them for None."""

    def stream(start):
        for step in itertools.count(start):
            if step == end:
                raise Interruption
            yield batch_of(step)

    return stream


# Groups of devices that hold the parameters once, and devices in a group.
LAYOUTS = {"1x1": (1, 1), "4x1": (4, 1), "2x2": (4, 2), "1x4": (4, 4)}


def mesh_of(layout):
    devices, fsdp = LAYOUTS[layout]
    return make_mesh(fsdp, jax.devices()[:devices])


def show_one_and_four_devices():
    """The program of a process with four devices: prints one line of JSON a result."""
    assert jax.device_count() == 4
    settings, metrics = dataclasses.replace(SETTINGS, steps=6, checkpoint_every=2), {}
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch("flora_jax.cluster.mesh.SMALLEST_SHARDED", 1),
    ):
        directory = pathlib.Path(name)
        for layout in LAYOUTS:
            network = run(directory / layout, settings, mesh=mesh_of(layout))
            metrics[layout] = metrics_of(directory / layout)
        for layout, end in (("2x2", 2), ("1x4", 4), ("1x1", None)):
            with contextlib.suppress(Interruption):
                run(directory / "moved", settings, until(end), mesh=mesh_of(layout))
        metrics["moved"] = metrics_of(directory / "moved")
        print(json.dumps(metrics), flush=True)
        save_description_once(flora.Supernet(network, SPACE), directory / "1x4")
        loaded = flora.load(directory / "1x4").network
    batch = batch_of(0) | {"mask": np.ones(SETTINGS.batch_size, np.float32)}
    evaluation_set = flora.EvaluationSet([batch], NORMALIZATION)
    scores = [
        flora.top1(flora.Supernet(model, SPACE), evaluation_set, genes_of(0))
        for model in (network, loaded)
    ]
    print(json.dumps(scores))


@pytest.fixture(scope="module")
def on_devices():
    """The finished process of `show_one_and_four_devices`."""
    program = "from tests.train import test_devices; test_devices.show_one_and_four_devices()"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("layout", ["4x1", "2x2", "1x4", "moved"])
def test_several_devices_train_as_one(on_devices, layout):
    """However they hold the parameters, and when a run goes on with others than it began with."""
    assert on_devices.stdout, on_devices.stderr
    metrics = json.loads(on_devices.stdout.splitlines()[0])
    assert [line["step"] for line in metrics["1x1"]] == list(range(6))
    for ours, theirs in zip(metrics[layout], metrics["1x1"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-5)


def test_several_devices_evaluate_a_loaded_run(on_devices):
    assert on_devices.returncode == 0, on_devices.stderr
    trained, loaded = json.loads(on_devices.stdout.splitlines()[1])
    assert trained == loaded
