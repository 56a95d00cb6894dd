"""Ranks by measured sensitivity: the knapsack, what is measured, and the path of prices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

import flora_jax as flora
from flora_jax.closed_form.allocate import (
    best_within,
    full_rank_sensitivity,
    least_loss,
    multiplier_path,
    nearly_uniform,
)
from flora_jax.closed_form.sensitivity import Sensitivity


@pytest.fixture(scope="module")
def supernet(tiny_model, tiny_space):
    return flora.factorize(tiny_model, tiny_space)


groups = st.lists(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


@given(groups, st.lists(st.integers(0, 60), min_size=1, max_size=4), st.sampled_from([1, 7, 1000]))
def test_knapsack_against_brute_force(options, spare, unit):
    losses = [np.array([loss for loss, _ in group], float) for group in options]
    costs = [unit * np.array([cost for _, cost in group]) for group in options]
    budgets = sum(int(cost.min()) for cost in costs) + unit * np.array(spare)
    picks = least_loss(losses, costs, budgets)

    def total(values, pick):
        return sum(value[i] for value, i in zip(values, pick, strict=True))

    every = list(itertools.product(*(range(len(group)) for group in options)))
    for pick, budget in zip(picks, budgets, strict=True):
        assert total(costs, pick) <= budget
        legal = [each for each in every if total(costs, each) <= budget]
        assert total(losses, pick) == min(total(losses, each) for each in legal)


def test_knapsack_of_costs_without_a_common_divisor_is_legal_and_close():
    rng = np.random.default_rng(0)
    costs = [rng.integers(1, 10**9, 40) for _ in range(12)]
    losses = [np.sort(rng.random(40))[np.argsort(np.argsort(-cost))] for cost in costs]
    budgets = np.array([2 * 10**9, 5 * 10**9])
    picks = least_loss(losses, costs, budgets)
    spent = sum(cost[pick] for cost, pick in zip(costs, picks.T, strict=True))
    assert (spent <= budgets).all()
    shorter = least_loss(losses, costs, budgets - 12 * 10**5)  # what the cells may round off
    ours, others = (
        sum(loss[pick] for loss, pick in zip(losses, each.T, strict=True))
        for each in (picks, shorter)
    )
    assert (ours <= others + 1e-12).all()


def test_knapsack_below_the_cheapest():
    with pytest.raises(ValueError, match="budget 4 is below the cheapest total, 5"):
        least_loss([np.array([0.0])], [np.array([5])], np.array([4, 6]))


@pytest.mark.parametrize("measure", ["divergence", "squared_error"])
def test_sensitivities_are_those_of_the_whole_network(supernet, tiny_images, measure):
    space = supernet.space
    sensitivity = Sensitivity(supernet, np.repeat(tiny_images, 2, axis=0), measure)
    sensitivities = sensitivity.of_choices()
    dense = supernet(tiny_images, space.full_rank_genes)
    for layer in range(space.num_layers):
        assert sensitivities[layer].shape == (len(space.choices[layer]),)
        for gene in range(len(space.choices[layer])):
            genes = space.full_rank_genes
            genes[layer] = gene
            logits = supernet(tiny_images, genes)
            if measure == "divergence":
                log_p, log_q = jax.nn.log_softmax(dense), jax.nn.log_softmax(logits)
                expected = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
            else:
                expected = jnp.sum((logits - dense) ** 2, -1) / jnp.sum(dense**2, -1)
            np.testing.assert_allclose(sensitivities[layer][gene], expected.mean(), atol=1e-5)
            np.testing.assert_allclose(sensitivity.loss(genes), expected.mean(), atol=1e-5)


def test_an_interrupted_measure_goes_on_behind_its_last_block(
    supernet, tiny_images, tmp_path, monkeypatch
):
    sensitivity, file = Sensitivity(supernet, tiny_images), epath.Path(tmp_path / "kept.jsonl")
    of_block, measured, expected = sensitivity.of_block, [], sensitivity.of_choices()

    def interrupted(block):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(block)
        return of_block(block)

    monkeypatch.setattr(sensitivity, "of_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        full_rank_sensitivity(sensitivity, file)
    with file.open("ab") as lines:
        lines.write(b'{"layers": [[0.0, ')  # what a kill leaves behind
    monkeypatch.setattr(sensitivity, "of_block", lambda b: measured.append(b) or of_block(b))
    for _ in range(2):  # the second time nothing is left to do
        for layer, of_layer in zip(full_rank_sensitivity(sensitivity, file), expected, strict=True):
            np.testing.assert_array_equal(layer, of_layer)
    assert measured == [*range(supernet.space.num_blocks)]


def test_another_reference(supernet, tiny_model, tiny_images):
    """A network to be like, such as the dense one of a supernet that was trained."""
    sensitivity = Sensitivity(supernet, tiny_images, "squared_error", reference=tiny_model)
    assert sensitivity.loss(supernet.space.full_rank_genes) < 1e-9
    other = flora.create(tiny_model.spec, seed=5)
    far = Sensitivity(supernet, tiny_images, "squared_error", reference=other)
    assert far.loss(supernet.space.full_rank_genes) > 0.1


def test_sensitivities_around_other_genes_reach_as_far_as_they_are_asked(supernet, tiny_images):
    space = supernet.space
    sensitivity = Sensitivity(supernet, np.repeat(tiny_images, 2, axis=0))
    genes = np.array([0, 1, 2, 1, 0, 2], np.int32)
    base = sensitivity.loss(genes)
    for layer, of_layer in enumerate(sensitivity.of_choices(genes, reach=1)):
        for gene in range(len(space.choices[layer])):
            changed = genes.copy()
            changed[layer] = gene
            if abs(gene - genes[layer]) > 1:
                assert of_layer[gene] == np.inf
            else:
                expected = sensitivity.loss(changed) - base
                np.testing.assert_allclose(of_layer[gene], expected, atol=1e-5)


def test_allocation_spends_each_budget_on_the_best_of_all_genes(supernet, tiny_images):
    space = supernet.space
    least, most = space.macs_range()
    budgets = [least, (least + most) // 2, most]
    genes = flora.allocate(supernet, tiny_images, macs=budgets)
    assert genes.shape == (3, space.num_layers)
    assert genes.dtype == np.int32
    np.testing.assert_array_equal(genes[1], flora.allocate(supernet, tiny_images, macs=budgets[1]))
    assert (space.macs(genes) <= budgets).all()
    np.testing.assert_array_equal(genes[0], space.cheapest_genes)
    assert (np.diff(space.macs(genes)) > 0).all()


def test_allocation_stays_in_the_kept_triples(tiny_space):
    rng = np.random.default_rng(0)
    kept = [
        np.concatenate([triples[rng.permutation(26)[:4]], triples[-1:]])
        for triples in tiny_space.kept
    ]
    space = tiny_space.keep(kept)
    sensitivities = [np.array([0.3, 0.1, 0.0]) * rng.random() for _ in range(6)]
    least, most = space.macs_range()
    genes = best_within(space, sensitivities, space.macs_cost, [least, (least + most) // 2, most])
    assert space.contains(genes).all()


def test_nearly_uniform_choices_spend_what_the_common_one_leaves(tiny_space):
    space, cost = tiny_space, tiny_space.macs_cost
    sensitivities = [np.array([0.3, 0.1, 0.0])] * 5 + [np.array([0.9, 0.1, 0.0])]
    common, dearer = space.macs(np.full(6, 0)), space.macs(np.append(np.zeros(5, int), 1))
    for budget, last in ((common, 0), (dearer, 1)):
        (genes,) = nearly_uniform(space, sensitivities, cost, budget)
        np.testing.assert_array_equal(genes, [0, 0, 0, 0, 0, last])
    (genes,) = nearly_uniform(space, sensitivities, cost, space.macs_range()[1])
    np.testing.assert_array_equal(genes, space.full_rank_genes)
    far = space.keep([np.array([[0, 0, 0], [2, 2, 2]])] * 2)
    assert not nearly_uniform(far, sensitivities, cost, far.macs_range()[1] - 1)


def test_single_image_serves_both_ways(supernet, tiny_images):
    space = supernet.space
    sensitivity = Sensitivity(supernet, tiny_images[:1])
    genes = space.full_rank_genes
    genes[0] = 0
    np.testing.assert_allclose(sensitivity.of_choices()[0][0], sensitivity.loss(genes), atol=1e-5)


@given(st.integers(0, 10**6))
def test_path_of_prices_is_nested_and_optimal_at_its_costs(tiny_space, seed):
    rng = np.random.default_rng(seed)
    sensitivities = [np.append(-np.sort(-rng.random(2)), 0.0) for _ in range(6)]
    path = multiplier_path(sensitivities, tiny_space.macs_cost)
    assert (np.diff(path, axis=0) >= 0).all()
    np.testing.assert_array_equal(path[-1], tiny_space.full_rank_genes)
    budgets = tiny_space.macs(path)
    best = best_within(tiny_space, sensitivities, tiny_space.macs_cost, budgets)

    def total(genes):
        return sum(of_layer[genes[:, i]] for i, of_layer in enumerate(sensitivities))

    np.testing.assert_allclose(total(path), total(best), atol=1e-12)


def test_unreachable_budgets(supernet, tiny_images):
    least, most = supernet.space.macs_range()
    message = rf"no subnet costs at most {least - 1} MACs; the space reaches {least}\.\.{most}"
    with pytest.raises(ValueError, match=message):
        flora.allocate(supernet, tiny_images, macs=[most, least - 1])
    with pytest.raises(ValueError, match=r"unknown measure 'square_error'.*did you mean 'squared"):
        flora.allocate(supernet, tiny_images, macs=most, measure="square_error")
