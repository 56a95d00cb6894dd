"""Second moments of what enters each layer, and the factors they weigh."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_jax as flora
from flora_jax import slim
from flora_jax.closed_form import calibrate
from flora_jax.closed_form.calibrate import layer_groups
from flora_jax.cluster.processes import Timer
from flora_jax.flora.svd import svd_factors
from flora_jax.models import functional
from tests.helpers.networks import QUICK, TINY, TINY_SWIN, images_of, logits, random_model
from tests.helpers.slimming import gated_model, random_masks

VIT = flora.ViTSpec(**TINY, depth=2, distilled=True)


def slimmed():
    """Heads of several widths, padded to the widest, and tokens that leave on the way."""
    masks = random_masks(VIT, np.random.default_rng(3))
    return slim.extract(gated_model(VIT), masks)


MODELS = {
    "deit": lambda: random_model(VIT),
    "swin": lambda: random_model(TINY_SWIN),
    "slimmed": slimmed,
}


@pytest.fixture(
    scope="module",
    params=["deit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("swin", "slimmed"))],
)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def calibration(model):
    return flora.calibrate(model, images_of(model.spec, 5))


@pytest.mark.parametrize(
    "fields, images",
    [
        ({}, 64),
        ({"image_size": 518, "patch_size": 14}, 8),  # 86 MiB of logits an image
        ({"image_size": 4480, "patch_size": 14}, 1),  # more than 1 GiB of them
    ],
)
def test_batches_keep_the_logits_of_a_device_within_a_gib(fields, images):
    spec = flora.deit("base", **fields)
    assert calibrate.batch_size(spec, num_devices=1) == images
    assert calibrate.batch_size(spec, num_devices=256) == 256 * images


@jax.jit(static_argnums=0, compiler_options=QUICK)
def inputs_by_hand(structure, parameters, images):
    """The inputs of each block's layers."""
    model = functional.merge(structure, parameters)
    found, x = {}, model.embed(images)
    for i, block in enumerate(model.blocks):
        before = x if block.downsample is None else block.downsample(x)
        found[f"blocks.{i}.attn.qkv"] = enters = block.norm1(block.cut(before))
        found[f"blocks.{i}.attn.proj"] = block.attn.context(enters)
        x = block.attention_half(x)
        found[f"blocks.{i}.mlp.fc1"] = block.norm2(x)
        hidden = block.mlp.fc1(block.norm2(x))
        found[f"blocks.{i}.mlp.fc2"] = jax.nn.gelu(hidden, approximate=False)
        x = block.mlp_half(x)
    return found


def test_moments_are_those_of_what_enters(model, calibration):
    found = inputs_by_hand(*functional.split(model), images_of(model.spec, 5))
    expected = {name: np.asarray(value, np.float64) for name, value in found.items()}
    assert set(calibration.moments) == {*expected, *(f"{name}.mean" for name in expected)}
    for name, x in expected.items():
        np.testing.assert_allclose(calibration.mean_of(name), x.mean(0), rtol=1e-4, atol=1e-5)
        covariance = np.cov(x, rowvar=False, bias=True)
        np.testing.assert_allclose(calibration.covariance_of(name), covariance, atol=1e-4)
        moment = x.T @ x / len(x)  # windows of tokens are tokens in another order
        np.testing.assert_allclose(calibration.moments[name], moment, rtol=1e-4, atol=1e-5)
    assert calibration.num_images == 5


def test_full_rank_is_the_dense_model(model, calibration):
    space, images = flora.RankSpace.regular(model.spec), images_of(model.spec)
    supernet = flora.factorize(model, space, calibration=calibration)
    found = logits(supernet, images, jnp.asarray(space.full_rank_genes))
    np.testing.assert_allclose(found, logits(model, images), atol=1e-4)


def test_batches_may_come_in_any_way(model, calibration):
    images = images_of(model.spec, 5)
    for batches in ([images[:2], images[2:]], (images[i : i + 1] for i in range(5))):
        other = flora.calibrate(model, batches)
        assert other.num_images == 5
        for name, moment in calibration.moments.items():
            np.testing.assert_allclose(other.moments[name], moment, rtol=1e-5, atol=1e-6)


def test_sums_go_on_where_they_stopped(tmp_path, monkeypatch):
    model = random_model(VIT)
    batches = list(images_of(VIT, 6).reshape(3, 2, *VIT.image_shape))
    whole, sums, calls = flora.calibrate(model, batches), calibrate.batch_sums, []

    def interrupted_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sums(*arguments)

    monkeypatch.setattr(calibrate, "batch_sums", interrupted_at_the_third)
    monkeypatch.setattr(Timer, "is_due", lambda self: True)
    with pytest.raises(KeyboardInterrupt):
        flora.calibrate(model, batches, directory=tmp_path)
    found = flora.calibrate(model, batches, directory=tmp_path)
    assert len(calls) == 4
    for name, moment in whole.moments.items():
        np.testing.assert_array_equal(found.moments[name], moment)


def test_bfloat16_models_keep_their_dtype():
    model = random_model(VIT)
    structure, parameters = functional.split(model)
    half = functional.merge(structure, {n: p.astype("bfloat16") for n, p in parameters.items()})
    images = images_of(VIT, 4)
    supernet = flora.factorize(
        half, flora.RankSpace.regular(VIT), calibration=flora.calibrate(half, images)
    )
    found = functional.split(supernet.network)[1]
    assert {value.dtype.name for value in found.values()} == {"bfloat16"}
    wide = {name: value.astype("float32") for name, value in found.items()}
    network = functional.with_parameters(supernet.network, wide)
    expected = functional.merge(
        structure, {n: p.astype("float32") for n, p in functional.split(half)[1].items()}
    )
    np.testing.assert_allclose(logits(network, images), logits(expected, images), atol=0.02)


def random_layer(seed, rows, columns, rank_of_moment):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rank_of_moment, rows)) * rng.gamma(0.5, size=rows)[None]
    return rng, rng.normal(size=(rows, columns)), x.T @ x


@settings(max_examples=30)
@given(
    st.integers(0, 10**6),
    st.tuples(st.integers(2, 9), st.integers(2, 9)),
    st.sampled_from(["down", "up"]),
    st.integers(1, 12),
)
def test_leading_components_are_the_best_of_their_rank(seed, shape, side, rank_of_moment):
    """In the norm of what enters: no worse than the plain SVD's, nor than random competitors."""
    rng, kernel, moment = random_layer(seed, *shape, rank_of_moment)
    size = shape[0]
    shrunk = 0.99 * moment + 0.01 * np.trace(moment) / size * np.eye(size)
    down, up = svd_factors(kernel, side, shrunk)
    plain_down, plain_up = svd_factors(kernel, side)
    np.testing.assert_allclose(down.T @ up, kernel, atol=1e-9)

    def error(product, norm):
        missing = kernel - product
        return np.trace(missing.T @ norm @ missing)

    tolerance = 1e-9 * error(0 * kernel, shrunk)
    for rank in range(1, min(shape) + 1):
        ours, plain = down[:rank].T @ up[:rank], plain_down[:rank].T @ plain_up[:rank]
        for norm in (moment, shrunk):  # shrinking towards the identity keeps the order
            assert error(ours, norm) <= error(plain, norm) + tolerance
        for _ in range(20):
            rows = np.linalg.qr(rng.normal(size=(shape[1], rank)))[0]
            assert error(ours, shrunk) <= error(kernel @ rows @ rows.T, shrunk) + tolerance


def test_shrunk_to_the_identity_it_is_the_plain_svd(model, calibration):
    space = flora.RankSpace.regular(model.spec)
    wholly = dataclasses.replace(calibration, shrinkage=1.0)
    ours = functional.split(flora.factorize(model, space, calibration=wholly).network)[1]
    plain = functional.split(flora.factorize(model, space).network)[1]
    for layer in model.spec.layers:
        down, up = (f"{layer.name}.{side}" for side in ("down", "up"))
        for rank in (1, layer.full_rank):
            np.testing.assert_allclose(
                ours[down][:rank].T @ ours[up][:rank],
                plain[down][:rank].T @ plain[up][:rank],
                atol=1e-5,
            )


def test_what_never_enters_does_no_harm():
    """A layer that sees only zeros, as after a cut, is factorised by the plain SVD."""
    model = random_model(VIT)
    structure, parameters = functional.split(model)
    for name in ("norm2.scale", "norm2.bias"):
        parameters[f"blocks.1.{name}"] *= 0
    model, space = functional.merge(structure, parameters), flora.RankSpace.regular(VIT)
    images = images_of(VIT)
    supernet = flora.factorize(model, space, calibration=flora.calibrate(model, images))
    np.testing.assert_allclose(supernet.network(images), model(images), atol=1e-4)


def test_too_few_images_to_fill_a_moment_are_told(caplog):
    model = random_model(dataclasses.replace(VIT, image_size=2))  # one patch and two prefix tokens
    calibration = flora.calibrate(model, images_of(model.spec, 2))
    space = flora.RankSpace.regular(model.spec)
    with caplog.at_level(logging.INFO):
        flora.factorize(model, space, calibration=calibration)
    assert "2 images are few for what enters blocks.0.attn.qkv" in caplog.text


def test_groups_of_layers_bound_the_memory_of_a_device():
    spec = flora.ViTSpec(
        image_size=224, patch_size=14, embed_dim=4096, depth=24, num_heads=32, num_classes=10
    )
    groups = layer_groups(spec)
    layers = [layer for group in groups for layer in group]
    assert {layer.name for layer in layers} == {la.name for la in spec.layers + spec.projections}
    for group in groups:
        bytes_needed = sum(4 * layer.in_features**2 for layer in group)
        assert bytes_needed <= 2**30
    alone = layer_groups(spec, device_bytes=1)
    assert [len(group) for group in alone] == [1] * len(layers)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((0, 8, 8, 3), np.float32), "at least one image"),
        ([], "at least one image"),
        (np.zeros((2, 8, 9, 3), np.float32), r"shape \(2, 8, 9, 3\); expected \[B, 8, 8, 3\]"),
        ([np.zeros((8, 8, 3), np.float32)], r"shape \(8, 8, 3\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), "have dtype uint8; expected normalised"),
        (np.full((2, 8, 8, 3), np.nan, np.float32), r"enters blocks\.0\.attn\.qkv is not finite"),
    ],
    ids=["none", "no batches", "shape", "one image", "bytes", "nan"],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        flora.calibrate(random_model(VIT), images)


def test_weights_that_are_not_finite_are_told_by_the_layer_behind_them():
    structure, parameters = functional.split(random_model(VIT))
    name = "blocks.1.attn.proj.kernel"
    parameters[name] = parameters[name].at[0, 0].set(np.inf)
    with pytest.raises(ValueError, match=r"enters blocks\.1\.mlp\.fc1 is not finite"):
        flora.calibrate(functional.merge(structure, parameters), images_of(VIT))


def test_calibration_of_another_model(model, calibration):
    other = random_model(model.spec, seed=9)
    space = flora.RankSpace.regular(other.spec)
    with pytest.raises(ValueError, match="another model: the spec is the same, the weights are"):
        flora.factorize(other, space, calibration=calibration)
    spec = dataclasses.replace(model.spec, num_classes=5)
    with pytest.raises(ValueError, match="another model: its spec is another one"):
        flora.factorize(random_model(spec), flora.RankSpace.regular(spec), calibration=calibration)


def test_models_with_ranks_are_refused(model):
    space = flora.RankSpace.regular(model.spec)
    small = flora.extract(flora.factorize(model, space), space.cheapest_genes)
    with pytest.raises(ValueError, match="needs a dense model"):
        flora.calibrate(small, images_of(model.spec))


def test_shrinkage_must_leave_something(calibration):
    with pytest.raises(ValueError, match=r"shrinkage must lie in \(0, 1\], got 0"):
        dataclasses.replace(calibration, shrinkage=0)
