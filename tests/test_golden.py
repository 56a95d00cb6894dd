"""Parity with the published FLORA implementation on a small DeiT and a small Swin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.models import functional
from flora_jax.training.losses import task_loss
from flora_jax.training.optimizer import learning_rate_schedule
from flora_jax.training.settings import TrainSettings
from tests.helpers.networks import logits, size

CONFIGS = range(8)
SWIN_SPEC = flora.SwinSpec(
    image_size=32,
    patch_size=2,
    embed_dim=24,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=4,
    num_classes=10,
)


@pytest.fixture(scope="module", params=["deit", "swin"])
def golden(request, deit_golden, data_dir):
    if request.param == "deit":
        return deit_golden
    with np.load(data_dir / "flora_swin_micro.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def model(golden, deit_golden, micro_spec):
    weights = {k.removeprefix("sd/"): v for k, v in golden.items() if k.startswith("sd/")}
    return flora.from_state_dict(weights, micro_spec if golden is deit_golden else SWIN_SPEC)


@pytest.fixture(scope="module")
def space(golden, model):
    return flora.RankSpace.regular(model.spec, ratios=golden["ratios"].tolist())


@pytest.fixture(scope="module")
def images(golden):
    return golden["images_nchw"].transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def genes(golden):
    """The golden's 8 configurations, int32 [8, L]."""
    return np.searchsorted(golden["ratios"], golden["configs"]).astype(np.int32)


@pytest.fixture(scope="module", params=[pytest.param("masked", marks=pytest.mark.slow), "sliced"])
def supernet(request, model, space):
    return flora.factorize(model, space, implementation=request.param)


def test_dense_logits(model, images, golden):
    np.testing.assert_allclose(logits(model, images), golden["dense_logits"], atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_supernet_logits(supernet, images, genes, golden, config):
    outputs = supernet(images, genes[config])
    np.testing.assert_allclose(outputs, golden["logits"][config], atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_extracted_logits(supernet, images, genes, golden, config):
    subnet = flora.extract(supernet, genes[config])
    outputs = logits(subnet, images)
    np.testing.assert_allclose(outputs, golden["logits"][config], atol=1e-4)
    np.testing.assert_allclose(outputs, supernet(images, genes[config]), atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_macs(space, genes, golden, supernet, config):
    assert space.macs(genes[config]) == golden["macs"][config]
    subnet = flora.extract(supernet, genes[config])
    assert flora.macs(subnet.spec) == golden["macs"][config]
    assert size(subnet) == flora.num_params(subnet.spec) == space.params(genes[config])


def test_distillation_loss_and_gradients(supernet, images, genes, golden):
    structure, parameters = functional.split(supernet.network)

    def loss(parameters):
        outputs = functional.merge(structure, parameters, jnp.asarray(genes[0]))(images)
        return task_loss(outputs, golden["teacher_probs"])

    value, gradient = jax.jit(jax.value_and_grad(loss))(parameters)
    np.testing.assert_allclose(value, golden["kd_loss_cfg0"], atol=1e-5)
    layers = [layer.name for layer in supernet.space.spec.layers]
    for factor, key in (("down", "grad_norm_V_cfg0"), ("up", "grad_norm_U_cfg0")):
        norms = [jnp.linalg.norm(gradient[f"{name}.{factor}"]) for name in layers]
        np.testing.assert_allclose(norms, golden[key], rtol=1e-3)
    np.testing.assert_allclose(gradient["head.kernel"].T, golden["grad_head_cfg0"], atol=1e-6)


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
