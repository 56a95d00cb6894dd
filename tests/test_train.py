"""Training: exact resumption, divergence, and each setting against a calculation by hand."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.data.normalize import Normalization
from flora_jax.io.checkpoint import read_parameters
from flora_jax.io.folder import save_description
from flora_jax.mesh import make_mesh, replicate, shard_batch
from flora_jax.models import create_abstract, functional
from flora_jax.train.loop import NonFiniteLossError, train
from flora_jax.train.optimizer import decays, make_optimizer
from flora_jax.train.settings import TrainSettings
from flora_jax.train.step import initial_state, make_step
from tests.conftest import ROOT

SPEC = flora.ViTSpec(image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3)
SPACE = flora.RankSpace.regular(SPEC, ratios=(1 / 2, 1))
NORMALIZATION = Normalization()
# The large epsilon keeps Adam from blowing up rounding differences to whole steps.
SETTINGS = TrainSettings(
    steps=7,
    batch_size=8,
    learning_rate=1e-2,
    epsilon=1e-2,
    ema_decay=0.5,
    label_smoothing=0.3,
    log_every=2,
    checkpoint_every=3,
)


def batch_of(step):
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (SETTINGS.batch_size, *SPEC.image_shape), np.uint8)
    return {"image": images, "label": rng.integers(0, 3, SETTINGS.batch_size).astype(np.int32)}


def batches(start):
    return map(batch_of, itertools.count(start))


def genes_of(step):
    return SPACE.sample(np.random.default_rng(step), 1)[0]


def a_network(implementation="sliced", seed=0):
    return flora.factorize(flora.create(SPEC, seed), SPACE, implementation=implementation).network


def run(directory, settings=SETTINGS, stream=batches, network=None, mesh=None):
    return train(
        network or a_network(),
        stream,
        settings,
        directory=directory,
        name="test",
        normalization=NORMALIZATION,
        draw_genes=genes_of,
        mesh=mesh,
    )


def states(settings, num_steps, network=None, teacher=None):
    """The states and metrics after each step, by the compiled step alone."""
    network, mesh = network or a_network(), make_mesh()
    graphdef, parameters = functional.split(network)
    teacher_graphdef, teacher_parameters = functional.split(teacher) if teacher else (None, None)
    step = make_step(graphdef, settings, NORMALIZATION, mesh, teacher_graphdef)
    state = initial_state(jax.tree.map(np.array, parameters), settings)
    found = []
    for i in range(num_steps):
        batch = shard_batch(batch_of(i), mesh)
        teacher_parameters = replicate(teacher_parameters, mesh)
        state, metrics = step(replicate(state, mesh), batch, genes_of(i), teacher_parameters)
        found.append(jax.tree.map(np.array, (state, metrics)))
    return found


def parameters_of(model):
    return {name: np.array(value) for name, value in functional.split(model)[1].items()}


def assert_same(ours, theirs):
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])


def assert_near(ours, theirs, tolerance):
    """The difference's norm relative to the parameter's own."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.linalg.norm(ours[name] - value) <= tolerance * np.linalg.norm(value), name


def metrics_of(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A whole run: its folder and its result's parameters."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    return directory, parameters_of(run(directory))


@pytest.fixture(scope="module")
def by_hand():
    """The same run's states and metrics, step by step."""
    return states(SETTINGS, SETTINGS.steps)


class Interruption(Exception):
    pass


def until(end):
    """The batches before step `end`, then an interruption; all of them for None."""

    def stream(start):
        for step in itertools.count(start):
            if step == end:
                raise Interruption
            yield batch_of(step)

    return stream


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6])
def test_interrupted_run_goes_on_exactly(uninterrupted, tmp_path, stop):
    starts = []

    def stream(start):
        starts.append(start)
        for step in itertools.count(start):
            if step == stop and len(starts) == 1:
                raise Interruption
            yield batch_of(step)

    with pytest.raises(Interruption):
        run(tmp_path, stream=stream)
    result = run(tmp_path, stream=stream)
    assert starts == [0, stop // 3 * 3]
    directory, parameters = uninterrupted
    assert_same(parameters_of(result), parameters)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (directory / "metrics.jsonl").read_bytes()


def test_repeated_lines_are_dropped_from_the_log(uninterrupted, tmp_path):
    """Stopped after step 3 was logged, but before the checkpoint that holds it."""

    def stream(start):
        return itertools.chain(map(batch_of, range(start, 4)), iter(_raise_interruption, None))

    with pytest.raises(Interruption):
        run(tmp_path, stream=stream)
    logged = (tmp_path / "metrics.jsonl").read_text()
    assert [line["step"] for line in metrics_of(tmp_path)] == [0, 1, 2, 3]
    (tmp_path / "metrics.jsonl").write_text(logged[:-20])  # torn by the crash
    run(tmp_path)
    assert metrics_of(tmp_path) == metrics_of(uninterrupted[0])


def _raise_interruption():
    raise Interruption


def test_finished_run_is_not_repeated(uninterrupted):
    directory, parameters = uninterrupted
    before = (directory / "metrics.jsonl").read_bytes()
    again = run(directory, stream=lambda start: iter(()))
    assert_same(parameters_of(again), parameters)
    assert (directory / "metrics.jsonl").read_bytes() == before


def test_the_loop_adds_nothing_to_its_steps(uninterrupted, by_hand):
    """Metrics and the result are those of the bare steps; the caller's model is left alone."""
    directory, parameters = uninterrupted
    assert_same(by_hand[-1][0].average, parameters)
    for i, (line, (_, metrics)) in enumerate(zip(metrics_of(directory), by_hand, strict=True)):
        assert line == {"step": i, "loss": metrics[0], "gradient_norm": metrics[1]}


def test_batches_are_closed(tmp_path):
    closed = []

    def stream(start):
        try:
            yield from batches(start)
        finally:
            closed.append(start)

    network = a_network()
    before = parameters_of(network)
    run(tmp_path, stream=stream, network=network)
    assert closed == [0]
    assert_same(parameters_of(network), before)


def test_moving_average(by_hand):
    average = parameters_of(a_network())
    for state, _ in by_hand:
        for name, value in state.parameters.items():
            average[name] = 0.5 * average[name] + 0.5 * value
    assert_near(by_hand[-1][0].average, average, 1e-6)
    raw = by_hand[-1][0].parameters
    assert all(np.linalg.norm(average[name] - raw[name]) > 0 for name in raw)


def test_one_program_serves_every_subnet(by_hand):
    """And every run of equal settings, whatever its weights."""
    assert len({tuple(genes_of(i)) for i in range(len(by_hand))}) > 3
    graphdef, equal_graphdef = (functional.split(a_network(seed=seed))[0] for seed in (0, 1))
    step = make_step(graphdef, SETTINGS, NORMALIZATION, make_mesh(), None)
    settings = dataclasses.replace(SETTINGS)
    assert make_step(equal_graphdef, settings, Normalization(), make_mesh(), None) is step
    assert step._cache_size() == 1
    settings = dataclasses.replace(SETTINGS, b1=0.8)
    assert make_step(graphdef, settings, NORMALIZATION, make_mesh(), None) is not step


def test_masked_and_sliced_train_alike(by_hand):
    masked = states(SETTINGS, 5, a_network("masked"))[-1][0].parameters
    assert_near(masked, by_hand[4][0].parameters, 1e-5)


def test_accumulated_gradient(by_hand):
    accumulated = states(dataclasses.replace(SETTINGS, accumulate=4), 2)
    for (state, metrics), (whole, whole_metrics) in zip(accumulated, by_hand[:2], strict=True):
        np.testing.assert_allclose(metrics, whole_metrics, rtol=1e-5)
        assert_near(state.parameters, whole.parameters, 1e-5)


def test_bfloat16(by_hand):
    narrow = states(dataclasses.replace(SETTINGS, compute_dtype="bfloat16"), 2)
    for (state, metrics), (_, wide_metrics) in zip(narrow, by_hand[:2], strict=True):
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(state)}
        assert dtypes == {np.dtype("int32"), np.dtype("float32")}
        np.testing.assert_allclose(metrics, wide_metrics, rtol=5e-2)
        assert (metrics != wide_metrics).all()


def logits_of(model, genes=None):
    return np.float64(model(NORMALIZATION(jnp.asarray(batch_of(0)["image"])), genes))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def cross_entropy(logits, targets):
    return -(targets * log_softmax(logits)).sum(-1).mean()


def test_loss_of_labels(by_hand):
    targets = 0.7 * np.eye(3)[batch_of(0)["label"]] + 0.3 / 3
    wanted = cross_entropy(logits_of(a_network(), genes_of(0)), targets)
    np.testing.assert_allclose(by_hand[0][1][0], wanted, rtol=1e-5)


def test_teacher():
    teacher = flora.create(SPEC, seed=1)
    ((_, metrics),) = states(SETTINGS, 1, teacher=teacher)
    targets = np.exp(log_softmax(logits_of(teacher)))
    wanted = cross_entropy(logits_of(a_network(), genes_of(0)), targets)
    np.testing.assert_allclose(metrics[0], wanted, rtol=1e-5)


def test_divergence_names_step_genes_and_checkpoint(tmp_path):
    """The warm-up reaches an absurd learning rate at step 2, so step 3 has no finite loss."""
    settings = dataclasses.replace(
        SETTINGS, learning_rate=1e30, warmup_steps=7, log_every=1, checkpoint_every=2
    )
    network = a_network()
    save_description(flora.Supernet(network, SPACE), tmp_path)
    with pytest.raises(NonFiniteLossError) as caught:
        run(tmp_path, settings, network=network)
    message = str(caught.value)
    assert f"at step 3 with genes {genes_of(3).tolist()}" in message
    assert f"last good checkpoint is {tmp_path / 'checkpoints' / '2'};" in message
    assert len(metrics_of(tmp_path)) == 3
    for value in read_parameters(tmp_path / "checkpoints").values():
        assert np.isfinite(value).all()
    logits = flora.load(tmp_path)(np.ones((1, 8, 8, 3), np.float32), genes_of(3))
    assert np.isfinite(logits).all()


def test_divergence_before_any_checkpoint(tmp_path):
    """The first loss overflows, because the weights start beyond float32's square root."""
    graphdef, parameters = functional.split(a_network())
    huge = functional.merge(graphdef, {name: p * 1e30 for name, p in parameters.items()})
    with pytest.raises(NonFiniteLossError, match=r"at step 0 .* checkpoint is none yet"):
        run(tmp_path, network=huge)


def test_what_decays(micro_spec):
    parameters = functional.split(create_abstract(micro_spec))[1]
    blocks = [
        f"blocks.{i}.{layer}.kernel"
        for i in range(3)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    decayed = {name for name, parameter in parameters.items() if decays(name, parameter)}
    assert decayed == {"patch_embed.proj.kernel", "head.kernel", *blocks}
    assert parameters["pos_embed"].ndim == parameters["cls_token"].ndim == 2
    factors = functional.split(a_network())[1]
    assert {name for name, p in factors.items() if decays(name, p)} == {
        name for name in factors if name.endswith(("kernel", "down", "up"))
    }


def test_decay_without_a_gradient():
    parameters = {"head.kernel": jnp.full((2, 3), 2.0), "pos_embed": jnp.ones((2, 3))}
    optimizer = make_optimizer(dataclasses.replace(SETTINGS, weight_decay=0.1))
    no_gradient = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = jax.jit(optimizer.update)(no_gradient, optimizer.init(parameters), parameters)
    np.testing.assert_allclose(updates["head.kernel"], -1e-2 * 0.1 * 2.0, rtol=1e-6)
    assert not updates["pos_embed"].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"log_every": -1}, "log_every must be at least 1, got -1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"accumulate": 3}, "batch_size 8 is not a multiple of accumulate 3"),
        ({"compute_dtype": "float16"}, "compute_dtype 'float16'; choose float32 or bfloat16"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must lie in \[0, 1\), got -0.1"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **fields)


@pytest.mark.parametrize(
    "fields", [{"learning_rate": math.nan}, {"warmup_steps": -1}, {"clip_norm": 0.0}]
)
def test_bad_rates(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        dataclasses.replace(SETTINGS, **fields)


# Groups of devices that hold the parameters once, and devices in a group.
LAYOUTS = {"1x1": (1, 1), "4x1": (4, 1), "2x2": (4, 2), "1x4": (4, 4)}


def mesh_of(layout):
    devices, fsdp = LAYOUTS[layout]
    return make_mesh(fsdp, jax.devices()[:devices])


def show_one_and_four_devices():
    """The program of a process with four devices: prints one line of JSON a result."""
    assert jax.device_count() == 4
    settings, metrics = dataclasses.replace(SETTINGS, steps=6, checkpoint_every=2), {}
    with tempfile.TemporaryDirectory() as name, mock.patch("flora_jax.mesh.SMALLEST_SHARDED", 1):
        directory = pathlib.Path(name)
        for layout in LAYOUTS:
            network = run(directory / layout, settings, mesh=mesh_of(layout))
            metrics[layout] = metrics_of(directory / layout)
        for layout, end in (("2x2", 2), ("1x4", 4), ("1x1", None)):
            with contextlib.suppress(Interruption):
                run(directory / "moved", settings, until(end), mesh=mesh_of(layout))
        metrics["moved"] = metrics_of(directory / "moved")
        print(json.dumps(metrics), flush=True)
        save_description(flora.Supernet(network, SPACE), directory / "1x4")
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
    program = "from tests import test_train; test_train.show_one_and_four_devices()"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
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
