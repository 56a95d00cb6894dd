"""Gates, masks and logits against the published implementation of ViT-Slim."""

import numpy as np
import pytest

import flora_jax as flora
from flora_jax import slim
from flora_jax.models import functional
from tests.helpers.networks import logits

pytestmark = pytest.mark.slow


GOLDENS = {"full": "dim", "head": "head", "uniform": "uniform"}


@pytest.fixture(scope="module", params=list(GOLDENS))
def golden(request, data_dir):
    with np.load(data_dir / f"slim_deit_{request.param}.npz") as archive:
        return dict(archive) | {"attention": GOLDENS[request.param]}


@pytest.fixture(scope="module")
def golden_gated(golden, micro_spec):
    arrays = {k.removeprefix("sd/"): v for k, v in golden.items() if k.startswith("sd/")}
    return slim.from_state_dict(arrays, micro_spec, golden["attention"])


def test_gated_logits_and_penalty(golden, golden_gated):
    images = golden["images_nchw"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(logits(golden_gated, images), golden["soft_logits"], atol=1e-4)
    parameters = functional.split(golden_gated.network)[1]
    penalty = slim.SparsityPenalty(attn=2e-4, mlp=5e-5, patch=1e-4)
    sums = golden["sparsity_attn_mlp_patch"]
    np.testing.assert_allclose(penalty.terms(parameters), sums, rtol=1e-6)
    np.testing.assert_allclose(penalty(parameters), sums @ [2e-4, 5e-5, 1e-4], rtol=1e-6)


@pytest.mark.parametrize("budget", range(3))
def test_masks_and_logits(golden, golden_gated, budget):
    images, spec = golden["images_nchw"].transpose(0, 2, 3, 1), golden_gated.spec
    wanted = {
        name.removeprefix(f"b{budget}/"): value
        for name, value in golden.items()
        if name.startswith(f"b{budget}/")
    }
    masks = slim.threshold(golden_gated, *golden["budgets"][budget].tolist())
    thresholds = [masks.thresholds["attn"], masks.thresholds["mlp"]]
    np.testing.assert_array_equal(thresholds, wanted["threshold_attn_mlp"])
    attn = np.broadcast_to(wanted["attn_mask"][:, 0, 0, :, 0, :], (3, 3, 16))
    np.testing.assert_array_equal(masks.attn, attn == 1)
    np.testing.assert_array_equal(masks.mlp, wanted["mlp_mask"][:, 0, 0] == 1)
    np.testing.assert_array_equal(masks.patch, wanted["patch_mask"][:, 0, :, 0] == 1)
    flops = slim.published_flops(spec, masks)
    np.testing.assert_array_equal(flops, wanted["reference_flops_total_searched"])

    masked = logits(slim.apply_masks(golden_gated, masks), images)
    np.testing.assert_allclose(masked, wanted["logits"], atol=1e-4)
    for tile in (1, 8):
        small = slim.extract(golden_gated, masks, fold=False, tile=tile)
        np.testing.assert_allclose(logits(small, images), wanted["logits"], atol=1e-4)
        assert all(
            block.head_dim % tile == 0 and block.mlp_dim % tile == 0 for block in small.spec.blocks
        )
        assert flora.macs(small.spec) < flora.macs(spec)


def test_published_gates_of_another_variant(golden, micro_spec):
    arrays = {k.removeprefix("sd/"): v for k, v in golden.items() if k.startswith("sd/")}
    for attention in set(GOLDENS.values()) - {golden["attention"]}:
        with pytest.raises(ValueError, match=rf"attn.zeta has shape .* attention='{attention}'"):
            slim.from_state_dict(arrays, micro_spec, attention)
    del arrays["blocks.1.mlp.zeta"]
    with pytest.raises(ValueError, match=r"the gates blocks\.1\.mlp\.zeta are missing"):
        slim.from_state_dict(arrays, micro_spec, golden["attention"])
