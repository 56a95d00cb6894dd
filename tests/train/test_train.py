"""`flora_jax.train` as a library uses it: a supernet, gates, with a folder and without."""

import dataclasses

import numpy as np
import pytest

import flora_jax as flora
from flora_jax.training.settings import seed_of
from tests.helpers.checkpoints import assert_same
from tests.helpers.networks import ONE_BLOCK, TINY, images_of, logits
from tests.helpers.training import NORMALIZATION, SPACE, batch_of, parameters_of

RECIPE = flora.Recipe(epochs=2.0, batch_size=8, learning_rate=0.5, warmup_epochs=0.0)
NUM_STEPS = 6


@pytest.fixture(scope="module")
def images():
    batches = [batch_of(step) for step in range(3)]
    arrays = [np.concatenate([batch[name] for batch in batches]) for name in ("image", "label")]
    return flora.ImageSet(*arrays, NORMALIZATION)


@pytest.fixture(scope="module")
def supernet():
    return flora.factorize(flora.create(ONE_BLOCK), SPACE)


def trained(model, images, recipe=RECIPE, **arguments):
    return parameters_of(flora.train(model, images, recipe, **arguments).network)


def test_a_folder_changes_nothing(supernet, images, tmp_path):
    teacher = flora.create(ONE_BLOCK, seed=1)
    without, within, again = (
        trained(supernet, images, directory=folder, name="any", teacher=teacher)
        for folder in (None, tmp_path, tmp_path)
    )
    assert_same(within, without)
    assert_same(again, without)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_a_recipe_without_distillation_ignores_the_teacher(supernet, images):
    by_labels = dataclasses.replace(RECIPE, distill=False)
    teacher = flora.create(ONE_BLOCK, seed=1)
    alone, beside = (trained(supernet, images, by_labels, teacher=t) for t in (None, teacher))
    assert_same(beside, alone)
    assert_same(trained(supernet, images), alone)


def test_which_subnets_are_trained(supernet, images):
    """By the name of a sampling, or by a function of the step."""
    steps, seed = [], seed_of(0, "train/genes")

    def uniform(step):
        steps.append(step)
        return SPACE.sample(np.random.default_rng([seed, step]), 1, "uniform")[0]

    by_name = trained(supernet, images, sample="uniform")
    assert_same(trained(supernet, images, sample=uniform), by_name)
    assert steps == list(range(NUM_STEPS))
    with pytest.raises(ValueError, match=r"unknown sampling 'unifrom'.*did you mean 'uniform'"):
        flora.train(supernet, images, RECIPE, sample="unifrom")


@pytest.mark.slow
def test_vit_slim_by_the_public_names_alone(images):
    model = flora.create(flora.ViTSpec(**TINY, depth=1))
    gated = flora.slim.add_gates(model, attention="dim")
    free, held = (
        flora.train(gated, images, RECIPE, teacher=model, penalty=penalty)
        for penalty in (None, flora.slim.SparsityPenalty(attn=0.1, mlp=0.1, patch=0.1))
    )
    for kind, gates in held.gates().items():
        assert np.mean(gates) < np.mean(free.gates()[kind]), kind
    masks = flora.slim.threshold(held, attn=0.7, mlp=0.7, patch=0.9)
    small = flora.slim.extract(held, masks)
    assert flora.macs(small.spec) < 0.8 * flora.macs(model.spec)
    assert np.isfinite(logits(small, images_of(small.spec))).all()
    space = flora.RankSpace.regular(small.spec, ratios=(1 / 2, 1))
    assert flora.factorize(small, space).space is space


@pytest.mark.slow
def test_a_filter_and_a_search_that_go_on(supernet, images, tmp_path):
    """Of what is done nothing is done again, and with no folder the result is the same."""
    local = dataclasses.replace(RECIPE, evaluate_epochs=0.0)

    def found(directory):
        space = flora.filter_space(
            supernet, images, images, SPACE.macs_range()[1], local, directory=directory, drop=0.5
        )
        settings = flora.EvolutionSettings(2, 2, 1, 1, 1)
        best = flora.evolve(supernet, images, SPACE.macs_range(), settings, directory=directory)
        return [triples.tolist() for triples in space.kept], best

    first = found(tmp_path)
    assert [len(triples) for triples in first[0]] == [4]
    (tmp_path / "block_00/metrics.jsonl").unlink()  # a training would write it again
    assert found(tmp_path) == found(None) == first
    assert not (tmp_path / "block_00/metrics.jsonl").exists()
