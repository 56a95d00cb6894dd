"""From budgets to masks: what is kept, and how many MACs that leaves."""

import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax import slim
from flora_jax.slim.threshold import read_decision, write_decision
from tests.helpers.networks import TINY_SWIN, images_of, logits, random_model
from tests.helpers.slimming import gated_model, with_gates


def test_kept_shares_and_order(tiny_gated):
    masks, gates = slim.threshold(tiny_gated, 0.5, 0.25, 0.6), tiny_gated.gates()
    for kind, budget in (("attn", 0.5), ("mlp", 0.25)):
        kept = np.stack(getattr(masks, kind))
        values = np.stack(gates[kind])
        assert kept.sum() == round(budget * kept.size)
        assert values[kept].min() >= masks.thresholds[kind] > values[~kept].max()
    patch = np.stack(masks.patch)
    assert patch[:, 0].all()
    assert (patch[:-1] >= patch[1:]).all()
    wanted = np.stack(gates["patch"]) >= masks.thresholds["patch"]
    wanted[:, 0] = True
    np.testing.assert_array_equal(patch, [wanted[b:].any(0) for b in range(3)])


def test_whole_budget_keeps_everything(tiny_gated):
    masks = slim.threshold(tiny_gated)
    assert all(mask.all() for mask in (*masks.attn, *masks.mlp, *masks.patch))
    assert slim.cut_spec(tiny_gated.spec, masks) == tiny_gated.spec


@pytest.fixture(scope="module")
def costs(tiny_gated):
    """MACs of the cut model at a common budget of 0.001, 0.002, ... 1."""
    spec = tiny_gated.spec
    budgets = [(step / 1000,) * 3 for step in range(1, 1001)]
    return [slim.cut_spec(spec, slim.threshold(tiny_gated, *b)).macs() for b in budgets]


@settings(max_examples=20)
@given(data=st.data())
def test_threshold_to_macs_spends_the_budget(tiny_gated, costs, data):
    target = data.draw(st.integers(min(costs), max(costs) + 9) | st.sampled_from(costs))
    masks = slim.threshold_to_macs(tiny_gated, target)
    cost = slim.cut_spec(tiny_gated.spec, masks).macs()
    assert cost <= target
    assert cost == max(other for other in costs if other <= target)
    step = 1000 - costs[::-1].index(cost)
    budget = (step / 1000,) * 3
    assert masks.thresholds == slim.threshold(tiny_gated, *budget).thresholds
    assert step == 1000 or costs[step] > target


@pytest.mark.parametrize("tile", [1, 2])
def test_threshold_to_macs_on_a_swin(tile):
    target = int(0.6 * TINY_SWIN.macs())
    masks = slim.threshold_to_macs(gated_model(TINY_SWIN), target, tile)
    assert 0.9 * target < slim.cut_spec(TINY_SWIN, masks, tile).macs() <= target


def test_unreachable_macs(tiny_gated):
    with pytest.raises(ValueError, match=r"no budget reaches 10 MACs; the least is (\d+)") as error:
        slim.threshold_to_macs(tiny_gated, 10)
    least = int(str(error.value).rsplit(" ", 1)[1])
    masks = slim.threshold_to_macs(tiny_gated, least)
    assert slim.cut_spec(tiny_gated.spec, masks).macs() == least


@pytest.mark.parametrize("kind", ["attn", "mlp", "patch"])
@pytest.mark.parametrize("budget", [0, -1, 1.5, math.nan])
def test_bad_budget(tiny_gated, kind, budget):
    with pytest.raises(ValueError, match=rf"budget {kind}={budget} lies outside \(0, 1\]"):
        slim.threshold(tiny_gated, **{kind: budget})


def test_token_budget_without_token_gates():
    gated = slim.add_gates(random_model(TINY_SWIN))
    with pytest.raises(ValueError, match=r"budget patch=0\.5, but .* tokens have no gates"):
        slim.threshold(gated, patch=0.5)


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The log of the package, which does not propagate where the command line was run."""
    monkeypatch.setattr(logging.getLogger("flora_jax"), "propagate", True)
    return caplog


def test_a_block_is_never_emptied(tiny_gated, warnings):
    low = {
        "blocks.1.attn.qkv.gate": np.linspace(0.1, 0.05, 8).reshape(2, 4),
        "blocks.2.mlp.fc2.gate": np.linspace(0.1, 0.05, 32),
    }
    gated = with_gates(tiny_gated, low)
    masks = slim.threshold(gated, 0.5, 0.5)
    assert [mask.sum() for mask in masks.attn][1] == 1
    assert [mask.sum() for mask in masks.mlp][2] == 1
    assert masks.attn[1][0, 0], "the largest gate"
    assert [record.getMessage() for record in warnings.records] == [
        "the budget empties the attention of block 1: its largest gate is kept all the same",
        "the budget empties the MLP of block 2: its largest gate is kept all the same",
    ]
    images = images_of(gated.spec)
    small, masked = slim.extract(gated, masks, fold=False), slim.apply_masks(gated, masks)
    np.testing.assert_allclose(logits(small, images), logits(masked, images), atol=1e-4)


def test_only_the_budget_found_warns(tiny_gated, warnings):
    slim.threshold_to_macs(tiny_gated, tiny_gated.spec.macs() - 1)
    assert not warnings.records


@pytest.mark.parametrize("spec", [None, TINY_SWIN], ids=["with tokens", "without"])
def test_a_decision_comes_back_from_its_file(tiny_gated, tmp_path, spec):
    gated = tiny_gated if spec is None else gated_model(spec)
    masks = slim.threshold(gated, 0.5, 0.25, 0.6 if spec is None else 1.0)
    write_decision(tmp_path / "decision.safetensors", gated, masks)
    gates, again = read_decision(tmp_path / "decision.safetensors")
    assert again.thresholds == masks.thresholds
    for kind, values in gated.gates().items():
        assert len(gates[kind]) == len(values) == len(getattr(again, kind))
        for one, other in zip(gates[kind], values, strict=True):
            np.testing.assert_array_equal(one, other, strict=True)
        for one, other in zip(getattr(again, kind), getattr(masks, kind), strict=True):
            np.testing.assert_array_equal(one, other, strict=True)
