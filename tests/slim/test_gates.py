"""Gates: their shapes, what they do to the network, and the penalty on them."""

import jax
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import slim
from flora_jax.models import functional
from tests.helpers.networks import QUICK, TINY, TINY_SWIN, forward, images_of, logits, random_model
from tests.helpers.slimming import gated_model


@pytest.mark.parametrize(
    ("attention", "shape"), [("dim", (2, 4)), ("head", (2, 1)), ("uniform", (1, 4))]
)
def test_shapes_of_the_gates(tiny_gated, attention, shape):
    spec = tiny_gated.spec
    gated = slim.add_gates(random_model(spec), attention)
    gates = gated.gates()
    assert [gate.shape for gate in gates["attn"]] == [shape] * 3
    assert [gate.shape for gate in gates["mlp"]] == [(32,)] * 3
    assert [gate.shape for gate in gates["patch"]] == [(17,)] * 3
    abstract = functional.split(slim.abstract_gated(spec, attention).network)[1]
    real = functional.split(gated.network)[1]
    assert {n: p.shape for n, p in abstract.items()} == {n: p.shape for n, p in real.items()}


def test_open_gates_change_little():
    spec = flora.ViTSpec(**TINY, depth=3)
    model, images = random_model(spec), images_of(spec)
    dense = logits(model, images)
    np.testing.assert_allclose(logits(slim.add_gates(model), images), dense, rtol=0.05, atol=0.05)
    without = slim.add_gates(model, tokens=False)
    np.testing.assert_allclose(logits(without, images), dense, atol=1e-5)
    assert without.gates()["patch"] == []


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dim", "head", "uniform"])
def test_the_gradient_reaches_every_gate(attention):
    gated = gated_model(flora.ViTSpec(**TINY, depth=2), attention=attention)
    structure, parameters = functional.split(gated.network)
    images = images_of(gated.spec)
    gradient = jax.grad(lambda p: (forward(structure, p, images) ** 2).sum())
    grads = jax.jit(gradient, compiler_options=QUICK)(parameters)
    gates = {name: grad for name, grad in grads.items() if name.endswith("gate")}
    assert len(gates) == 6
    for name, grad in gates.items():
        assert (grad != 0).all(), name


def test_penalty_of_a_swin_has_no_token_term():
    gated = slim.add_gates(random_model(TINY_SWIN))
    terms = slim.SparsityPenalty().terms(functional.split(gated.network)[1])
    np.testing.assert_allclose(terms, [8 + 8 + 16, 32 + 32 + 64, 0])


def test_unknown_variant(tiny_gated):
    with pytest.raises(
        ValueError, match="unknown attention gates 'full'; choose one of dim, head, uniform"
    ):
        slim.add_gates(random_model(tiny_gated.spec), attention="full")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (TINY_SWIN, "the windows of a Swin need the whole feature map"),
        (flora.ViTSpec(**TINY, depth=1, pool="mean"), "the mean over all patches needs every one"),
    ],
    ids=["swin", "mean"],
)
def test_token_gates_where_tokens_cannot_leave(spec, reason):
    with pytest.raises(ValueError, match=f"no token gates here: {reason}"):
        slim.abstract_gated(spec, tokens=True)
    assert not slim.abstract_gated(spec).has_token_gates
