"""Evaluations, profiles and checkpoints while a training goes on."""

import dataclasses
import itertools

import numpy as np
import pytest

import flora_jax as flora
from flora_jax.cluster.processes import Timer
from flora_jax.io.json_lines import read_records
from tests.helpers.checkpoints import assert_same
from tests.helpers.training import (
    NORMALIZATION,
    SETTINGS,
    SPACE,
    Interruption,
    batch_of,
    metrics_of,
    parameters_of,
    run,
)


class Scores:
    """An evaluator that gives these values in turn, and keeps the parameters that it has seen."""

    def __init__(self, *values: float):
        self.values, self.seen = list(values), []

    def __call__(self, network):
        self.seen.append(parameters_of(network))
        yield "score", self.values[len(self.seen) - 1]
        yield "other", 0.5


@pytest.mark.slow
@pytest.mark.parametrize("result", ["last", "best"])
def test_evaluations_are_logged_and_the_best_parameters_kept(result, tmp_path, capsys):
    settings = dataclasses.replace(SETTINGS, keep_best=True, result=result)
    scores = Scores(0.1, 0.7, 0.3, 0.2)  # after 2, 4, 6 and 7 steps
    trained = parameters_of(run(tmp_path, settings, evaluators=[scores], evaluate_every=2))
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record.get("score") for record in records] == [None, 0.1, None, 0.7, None, 0.3, 0.2]
    assert all(record["other"] == 0.5 for record in records if "score" in record)
    assert records[1]["images_per_second"] > 0
    assert "score 0.2  other 0.5" in capsys.readouterr().err
    assert_same(trained, scores.seen[1 if result == "best" else 3])
    # A run that is done gives the same result without a step.
    again = run(tmp_path, settings, lambda _: iter(()), evaluators=[Scores()], evaluate_every=2)
    assert_same(parameters_of(again), trained)


@pytest.mark.slow
def test_an_interrupted_training_remembers_its_best(tmp_path):
    settings = dataclasses.replace(SETTINGS, keep_best=True, result="best")

    def until(stop):
        def stream(start):
            for step in itertools.count(start):
                if step == stop:
                    raise Interruption
                yield batch_of(step)

        return stream

    first = Scores(0.9, 0.1, 0.1)
    with pytest.raises(Interruption):
        run(tmp_path, settings, until(5), evaluators=[first], evaluate_every=2)
    rest = Scores(0.1, 0.3, 0.2)  # again after 4 steps, for the checkpoint is of step 3
    trained = parameters_of(run(tmp_path, settings, evaluators=[rest], evaluate_every=2))
    assert_same(trained, first.seen[0])
    assert [record.get("score") for record in metrics_of(tmp_path)][-4:] == [0.1, None, 0.3, 0.2]


@pytest.mark.slow
def test_held_out_images_are_looked_at_in_three_subnets():
    images = np.concatenate([batch_of(step)["image"] for step in range(3)])
    labels = np.concatenate([batch_of(step)["label"] for step in range(3)])
    supernet = flora.factorize(flora.create(SPACE.spec), SPACE)
    heldout = flora.ImageSet(images, labels, NORMALIZATION).on_devices
    found = dict(flora.HeldOut(heldout, SPACE, decides="top1")(supernet.network))
    assert next(iter(found)) == "heldout_top1"
    assert len(found) == 6
    for name, genes in (
        ("heldout_top1", SPACE.full_rank_genes),
        ("heldout_top1_middle", SPACE.middle_genes),
        ("heldout_top1_smallest", SPACE.cheapest_genes),
    ):
        assert found[name] == flora.top1(supernet, heldout, genes)
    plain = dict(flora.HeldOut(heldout)(flora.create(SPACE.spec)))
    assert list(plain) == ["heldout_top1", "heldout_log_likelihood"]


def test_the_middle_subnet_lies_between():
    space = flora.RankSpace.regular(flora.deit("tiny"), (1 / 8, 1 / 4, 1 / 2, 1))
    least, middle, most = (
        space.macs(genes)
        for genes in (space.cheapest_genes, space.middle_genes, space.full_rank_genes)
    )
    assert least < middle < most
    assert set(space.middle_genes) == {1}, "balanced: no layer is starved for another's rank"
    kept = space.keep([space.kept[0][[0, 5, -1]], *space.kept[1:]])
    assert kept.contains(kept.middle_genes)


@pytest.mark.slow
def test_one_step_is_profiled(tmp_path):
    run(tmp_path, dataclasses.replace(SETTINGS, steps=3), profile_step=2)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_timer_is_due_once_every_so_often():
    now = [100.0]
    timer = Timer(5, lambda: now[0])
    found = []
    for now[0] in (102, 104.9, 105, 106, 109.9, 117, 118):
        found.append(timer.is_due())
    assert found == [False, False, True, False, False, True, False]
    assert not Timer(0, lambda: now[0]).is_due()


@pytest.mark.slow
def test_checkpoints_come_by_time_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(Timer, "is_due", lambda self: True)  # at every look: when metrics are read
    settings = dataclasses.replace(SETTINGS, steps=5, log_every=2, checkpoint_every=100)
    run(tmp_path, settings)
    steps = {path.name for path in (tmp_path / "checkpoints/manifests").iterdir()}
    assert steps == {"4.json", "5.json"}  # the two newest of 2, 4 and 5
