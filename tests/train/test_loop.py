"""The training loop: exact resumption, its log, and divergence."""

import dataclasses
import itertools

import numpy as np
import pytest

import flora_jax as flora
from flora_jax.io.checkpoint import read_parameters
from flora_jax.models import functional
from flora_jax.training.optimizer import learning_rate_schedule
from flora_jax.training.train import NonFiniteLossError
from flora_jax.weights.folder import save_description_once
from tests.helpers.checkpoints import assert_same
from tests.helpers.training import (
    SETTINGS,
    SPACE,
    Interruption,
    a_network,
    batch_of,
    batches,
    genes_of,
    interrupted_before,
    metrics_of,
    parameters_of,
    run,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A whole run: its folder and its result's parameters."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    return directory, parameters_of(run(directory))


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6])
def test_interrupted_run_goes_on_exactly(uninterrupted, tmp_path, stop):
    stream, starts = interrupted_before(stop)
    with pytest.raises(Interruption):
        run(tmp_path, stream=stream)
    result = run(tmp_path, stream=stream)
    assert starts == [0, stop // 3 * 3]
    directory, parameters = uninterrupted
    assert_same(parameters_of(result), parameters)
    assert metrics_of(tmp_path) == metrics_of(directory)


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
    rates = np.asarray(learning_rate_schedule(SETTINGS)(np.arange(len(by_hand)))).tolist()
    for i, (line, (_, metrics)) in enumerate(zip(metrics_of(directory), by_hand, strict=True)):
        expected = {"step": i, "loss": metrics[0], "gradient_norm": metrics[1]}
        assert line == expected | {"learning_rate": pytest.approx(rates[i], rel=1e-5)}


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


def test_divergence_names_step_genes_and_checkpoint(tmp_path):
    """The warm-up reaches an absurd learning rate at step 2, so step 3 has no finite loss."""
    settings = dataclasses.replace(
        SETTINGS, learning_rate=1e30, warmup_steps=7, log_every=1, checkpoint_every=2
    )
    network = a_network()
    save_description_once(flora.Supernet(network, SPACE), tmp_path)
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
    structure, parameters = functional.split(a_network())
    huge = functional.merge(structure, {name: p * 1e30 for name, p in parameters.items()})
    with pytest.raises(NonFiniteLossError, match=r"at step 0 .* checkpoint is none yet"):
        run(tmp_path, network=huge)
