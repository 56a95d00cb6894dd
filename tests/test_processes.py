"""Two processes with two devices each: the same as one process, and an end together."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

import flora_jax as flora
from flora_jax.cluster import processes
from flora_jax.cluster.mesh import make_mesh
from flora_jax.evaluation.evaluate import evaluate_images
from flora_jax.flora.evolution import EvolutionSettings, image_scores, search
from flora_jax.io.files import locked, write_json
from flora_jax.models.network import Network
from flora_jax.weights.folder import save_description_once
from tests.helpers.commands import ROOT, STOPPED, free_port
from tests.helpers.training import (
    NORMALIZATION,
    SETTINGS,
    SPACE,
    SPEC,
    Interruption,
    batch_of,
    metrics_of,
    run,
)

pytestmark = pytest.mark.processes


STEPS = dataclasses.replace(SETTINGS, steps=20, checkpoint_every=5)
ENDLESS = dataclasses.replace(SETTINGS, steps=100_000, checkpoint_every=50_000)


def local_batches(start):
    """This process' share of each batch."""
    share = SETTINGS.batch_size // jax.process_count()
    own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    for step in itertools.count(start):
        yield {name: values[own] for name, values in batch_of(step).items()}


def train_and_search(directory: pathlib.Path) -> None:
    """Trains with whole parameters and with split ones, and searches with the latter."""
    found = {}
    for layout, fsdp in (("whole", 1), ("split", jax.device_count())):
        folder = directory / layout
        network = run(folder, STEPS, local_batches, mesh=make_mesh(fsdp))
        found[layout] = [line["loss"] for line in metrics_of(folder)]
    save_description_once(flora.Supernet(network, SPACE), folder)
    supernet = flora.load(folder)  # as another stage does
    images = flora.EvaluationSet(
        [batch_of(100) | {"mask": np.ones(SETTINGS.batch_size, np.float32)}], NORMALIZATION
    )
    settings = EvolutionSettings(
        generations=3, population=6, parents=3, mutants=2, crossovers=2, mutation_probability=0.5
    )
    window, history = SPACE.macs_range(), directory / "history.jsonl"
    mask = {"mask": np.ones(SETTINGS.batch_size, np.float32)}
    heldout = flora.EvaluationSet([batch_of(step) | mask for step in (100, 101)], NORMALIZATION)
    scores = image_scores(supernet, heldout, "log_likelihood")
    scores = dataclasses.replace(scores, rungs=(5, 8, 2 * SETTINGS.batch_size), deviations=0.5)
    [best] = search(SPACE, scores, SPACE.macs_cost, [window], settings, 0, history)
    found["winner"] = [int(gene) for gene in best.genes]
    flora.save(flora.extract(supernet, best.genes), directory / "subnet")
    each = evaluate_images(flora.create(SPEC), images)
    write_json(
        directory / f"images_{jax.process_index()}.json",
        {name: values.tolist() for name, values in each.items()},
    )
    masks = np.ones(SETTINGS.batch_size, np.float32)
    masks[2 + jax.process_index()] = 0  # what one process cannot decode counts in none
    if jax.process_count() == 1:
        masks[2:4] = 0
    partly = flora.EvaluationSet([batch_of(100) | {"mask": masks}], NORMALIZATION)
    found["partly"] = [partly.num_images, *flora.evaluate(flora.create(SPEC), partly).values()]
    found["partly"] = [float(value) for value in map(np.squeeze, found["partly"])]
    dense, seven = flora.create(SPEC), batch_of(100)["image"][:7]  # no equal shares for 4 devices
    seven = np.asarray(NORMALIZATION(jnp.asarray(seven)))
    moments = flora.calibrate(dense, seven).moments
    found["moments"] = {name: moment.ravel().tolist() for name, moment in moments.items()}
    found["compressed"] = compressed_logits(dense, seven)
    write_json(directory / "found.json", found)


def compressed_logits(dense: Network, images: np.ndarray) -> list:
    """With hidden states on the devices and in files; no process sends what all of them have."""
    found, compare = [], multihost_utils.assert_equal

    def compare_numbers(tree, fail_message=""):
        assert not any(map(np.ndim, jax.tree.leaves(tree)))
        compare(tree, fail_message)

    for states_bytes in (2**31, 0):
        with (
            mock.patch("flora_jax.closed_form.refit.STATES_BYTES", states_bytes),
            mock.patch.object(multihost_utils, "assert_equal", compare_numbers),
        ):
            small = flora.compress(dense, images, macs=dense.spec.macs() * 6 // 10)
        found.append(np.asarray(small(images)).tolist())
    return found


def train_before(directory: pathlib.Path, end: int) -> None:
    """With split parameters."""

    def stream(start):
        yield from itertools.islice(local_batches(start), end - start)
        raise Interruption

    with contextlib.suppress(Interruption):
        run(directory, STEPS, stream, mesh=make_mesh(jax.device_count()))


def train_until_told_to_end(directory: pathlib.Path) -> None:
    try:
        run(directory, ENDLESS, local_batches)
    except processes.Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(stopped.exit_status)


def fail_alone(directory: pathlib.Path) -> None:
    if jax.process_index() == 1:
        processes.exit_at_once(3)
    run(directory, ENDLESS, local_batches)


def member(
    name: str, directory: str, coordinator: str, num_processes: int, process_id: int, *arguments
):
    """The program of one process."""
    if num_processes > 1:
        processes.connect(coordinator, num_processes, process_id)
    with mock.patch("flora_jax.cluster.mesh.SMALLEST_SHARDED", 1):
        globals()[name](pathlib.Path(directory), *arguments)


def start(name: str, directory: pathlib.Path, num_processes: int, devices: int, *arguments):
    coordinator = f"127.0.0.1:{free_port()}"
    members = []
    for i in range(num_processes):
        call = (name, str(directory), coordinator, num_processes, i, *arguments)
        program = f"from tests.test_processes import member; member{call}"
        environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command, options = [sys.executable, "-c", program], {"cwd": ROOT, **pipes}
        members.append(subprocess.Popen(command, env=os.environ | environment, **options))
    return members


def finish(members) -> list[subprocess.CompletedProcess]:
    return [
        subprocess.CompletedProcess(process.args, process.wait(), output, errors)
        for process in members
        for output, errors in [process.communicate(timeout=200)]
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process with one device has found, and two processes with two each."""
    found = []
    for num_processes, devices in ((1, 1), (2, 2)):
        directory = tmp_path_factory.mktemp("processes")
        for done in finish(start("train_and_search", directory, num_processes, devices)):
            assert done.returncode == 0, done.stderr
        found.append(directory)
    return found


@pytest.fixture(scope="module")
def found(results):
    return [json.loads((folder / "found.json").read_text()) for folder in results]


@pytest.mark.parametrize("layout", ["whole", "split"])
def test_two_processes_train_as_one(found, layout):
    alone, together = found
    assert len(alone["whole"]) == 20
    np.testing.assert_allclose(together[layout], alone["whole"], rtol=1e-6)


def test_two_processes_find_the_same_subnet(results, found):
    assert found[1]["winner"] == found[0]["winner"]
    assert flora.load(results[1] / "subnet").spec == flora.load(results[0] / "subnet").spec
    histories = [(folder / "history.jsonl").read_text().splitlines() for folder in results]
    for ours, theirs in zip(*histories, strict=True):
        for name in ("genes", "share"):
            assert json.loads(ours).get(name) == json.loads(theirs).get(name)
    assert '"share"' in histories[0][-1]


def test_two_processes_sum_the_same_and_leave_out_what_either_cannot_decode(found):
    alone, together = found
    for name, moment in alone["moments"].items():
        np.testing.assert_allclose(together["moments"][name], moment, rtol=1e-5, atol=1e-6)
    assert together["partly"][0] == alone["partly"][0] == SETTINGS.batch_size - 2
    np.testing.assert_allclose(together["partly"], alone["partly"], rtol=1e-6)


def test_two_processes_compress_as_one(found):
    alone, together = (np.array(each["compressed"]) for each in found)
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(alone[0], alone[1])
    assert not np.allclose(alone[0][0], alone[0][1], atol=1e-2)


def test_both_processes_know_what_one_finds_in_each_image(results):
    files = [results[i] / f"images_{process}.json" for i, process in ((0, 0), (1, 0), (1, 1))]
    alone, *both = (json.loads(file.read_text()) for file in files)
    assert len(alone["predicted"]) == SETTINGS.batch_size
    for together in both:
        for name in ("predicted", "is_correct"):
            assert together[name] == alone[name]
        np.testing.assert_allclose(together["log_likelihood"], alone["log_likelihood"], rtol=1e-6)


def test_one_device_goes_on_where_four_have_stopped(results):
    """The last step's checkpoint, opened here, is where one device alone has come to."""
    for layout in ("whole", "split"):
        theirs, ours = (
            flora.models.functional.split(run(folder / own, STEPS, lambda start: iter(())))[1]
            for folder, own in ((results[1], layout), (results[0], "whole"))
        )
        for name, expected in ours.items():
            np.testing.assert_allclose(theirs[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_run_goes_on_on_other_devices_with_the_same_losses(found, tmp_path):
    """Two processes with two devices, one with four, one with one."""
    for num_processes, devices, end in ((2, 2, 10), (1, 4, 15), (1, 1, 20)):
        for done in finish(start("train_before", tmp_path, num_processes, devices, end)):
            assert done.returncode == 0, done.stderr
        assert len(metrics_of(tmp_path)) >= end // 5 * 5
    losses = [line["loss"] for line in metrics_of(tmp_path)]
    np.testing.assert_allclose(losses, found[0]["whole"], rtol=1e-6)


def wait_until(condition, members) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert all(process.poll() is None for process in members), finish(members)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lines_of(directory) -> int:
    log = directory / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.mark.parametrize("num_processes", [pytest.param(1, marks=pytest.mark.faults), 2])
def test_told_to_end_all_save_the_same_step_and_go_on_from_there(num_processes, tmp_path):
    members = start("train_until_told_to_end", tmp_path, num_processes, 2)
    wait_until(lambda: lines_of(tmp_path) > 10, members)
    members[-1].send_signal(signal.SIGTERM)
    stopped = finish(members)
    assert [done.returncode for done in stopped] == [STOPPED] * num_processes
    (message,) = {done.stdout.strip().splitlines()[-1] for done in stopped}
    (step,) = (int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert message == f"test is saved at step {step} of 100000"
    assert lines_of(tmp_path) == step
    until = dataclasses.replace(ENDLESS, steps=step)
    run(tmp_path, until, lambda start: iter(()))  # it is complete


@pytest.mark.faults
@pytest.mark.parametrize("name", ["fail_alone", "train_until_told_to_end"])
def test_one_that_is_gone_does_not_leave_the_other_waiting(name, tmp_path):
    """It has failed, or was killed."""
    members = start(name, tmp_path, 2, 1)
    if name == "train_until_told_to_end":
        wait_until(lambda: lines_of(tmp_path) > 10, members)
        members[1].kill()
    members[1].wait(timeout=100)
    started = time.monotonic()
    members[0].wait(timeout=100)
    assert time.monotonic() - started < 60
    assert all(done.returncode != 0 for done in finish(members))


def test_a_lock_is_held_by_one_and_left_behind_by_none(tmp_path):
    lock = tmp_path / "run.lock"
    lock.write_text("process 1 on another machine\n")  # a stale one
    with locked(lock):
        program = f"from flora_jax.io.files import locked\nwith locked({str(lock)!r}): pass"
        second = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert f"{tmp_path} is in use by another run: process {os.getpid()} on" in second.stderr
    with locked(lock):
        pass
