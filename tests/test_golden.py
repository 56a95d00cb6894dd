"""Parity with the published FLORA implementation on a small DeiT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.models import functional
from flora_jax.train.optimizer import learning_rate_schedule
from flora_jax.train.settings import TrainSettings
from flora_jax.train.step import task_loss

CONFIGS = range(8)


@pytest.fixture(scope="module", params=["masked", "sliced"])
def supernet(request, micro_model, micro_space):
    return flora.factorize(micro_model, micro_space, implementation=request.param)


def test_dense_logits(micro_model, micro_images, deit_golden):
    np.testing.assert_allclose(micro_model(micro_images), deit_golden["dense_logits"], atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_supernet_logits(supernet, micro_images, micro_genes, deit_golden, config):
    logits = supernet(micro_images, micro_genes[config])
    np.testing.assert_allclose(logits, deit_golden["logits"][config], atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_extracted_logits(supernet, micro_images, micro_genes, deit_golden, config):
    subnet = flora.extract(supernet, micro_genes[config])
    np.testing.assert_allclose(subnet(micro_images), deit_golden["logits"][config], atol=1e-4)
    np.testing.assert_allclose(
        subnet(micro_images), supernet(micro_images, micro_genes[config]), atol=1e-5
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_macs(micro_space, micro_genes, deit_golden, supernet, config):
    assert micro_space.macs(micro_genes[config]) == deit_golden["macs"][config]
    subnet = flora.extract(supernet, micro_genes[config])
    assert flora.macs(subnet.spec) == deit_golden["macs"][config]
    stored = sum(p.size for p in functional.split(subnet)[1].values())
    assert stored == flora.num_params(subnet.spec) == micro_space.params(micro_genes[config])


def test_distillation_loss_and_gradients(supernet, micro_images, micro_genes, deit_golden):
    graphdef, parameters = functional.split(supernet.network)

    def loss(parameters):
        logits = functional.merge(graphdef, parameters)(micro_images, jnp.asarray(micro_genes[0]))
        return task_loss(logits, deit_golden["teacher_probs"])

    value, gradient = jax.value_and_grad(loss)(parameters)
    np.testing.assert_allclose(value, deit_golden["kd_loss_cfg0"], atol=1e-5)
    layers = [layer.name for layer in supernet.space.spec.layers]
    for factor, key in (("down", "grad_norm_V_cfg0"), ("up", "grad_norm_U_cfg0")):
        norms = [jnp.linalg.norm(gradient[f"{name}.{factor}"]) for name in layers]
        np.testing.assert_allclose(norms, deit_golden[key], rtol=1e-3)
    np.testing.assert_allclose(gradient["head.kernel"].T, deit_golden["grad_head_cfg0"], atol=1e-6)


def test_learning_rate_is_the_published_schedule(data_dir):
    with np.load(data_dir / "cosine_schedule.npz") as golden:
        settings = TrainSettings(
            steps=int(golden["total_steps"]),
            batch_size=1,
            learning_rate=float(golden["base"]),
            min_learning_rate=float(golden["min"]),
            warmup_learning_rate=float(golden["warmup_init"]),
            warmup_steps=int(golden["warmup_steps"]),
        )
        rates = jax.vmap(learning_rate_schedule(settings))(jnp.arange(settings.steps))
        np.testing.assert_allclose(rates, golden["lr_used_at_step"], rtol=1e-5)
