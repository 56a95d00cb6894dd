"""Compression in closed form: exact at full size, the best of its kind, and nearer than before."""

import dataclasses
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import slim
from flora_jax.closed_form import calibrate, compress, reduce, refit, regression
from flora_jax.closed_form.calibrate import layer_inputs
from flora_jax.closed_form.reduce import Shape
from flora_jax.cluster.processes import Stopped
from flora_jax.models import functional
from flora_jax.training.losses import READ_SHARE
from tests.helpers import modern
from tests.helpers.commands import DATA, ROOT
from tests.helpers.networks import (
    MICRO,
    QUICK,
    TINY,
    TINY_HYBRID,
    TINY_SWIN,
    TINY_SWIN_V2,
    images_of,
    logits,
    random_model,
)
from tests.helpers.slimming import gated_model
from tests.test_golden import SWIN_SPEC
from tests.test_regression import augmented, centred

VIT = flora.ViTSpec(**TINY, depth=2)
ONE_BLOCK = dataclasses.replace(VIT, depth=1, blocks=())
SPECS = {
    "vit": VIT,
    "swin": TINY_SWIN,
    "swin_v2": dataclasses.replace(TINY_SWIN_V2, depths=(1, 1), blocks=()),
    "tiny_vit": dataclasses.replace(
        TINY_HYBRID,
        embed_dims=(8, 16),
        depths=(1, 1),
        num_heads=(1, 2),
        window_sizes=(3, 3),
        blocks=(),
    ),
    "rotary": flora.ViTSpec(
        **TINY,
        depth=1,
        num_registers=2,
        positions="none",
        rope_theta=100.0,
        gated_mlp=True,
        activation="silu",
        qkv_bias=True,
        k_bias=False,
    ),
    "normed MLP": flora.ViTSpec(
        **TINY, depth=1, pool="mean", gated_mlp=True, activation="silu", mlp_norm=True
    ),
    "registers": flora.ViTSpec(**TINY | {"num_classes": 0}, depth=2, num_registers=4),
}
COMPILED_LONG = {"swin", "swin_v2", "tiny_vit"}


def kinds(names, slow):
    return [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names]


def parameters_of(network):
    return {name: np.asarray(p) for name, p in functional.split(network)[1].items()}


def assert_same(network, other, **tolerance):
    assert network.spec == other.spec
    found, expected = parameters_of(network), parameters_of(other)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], err_msg=name, **tolerance)


def batches_of(spec, number=4):
    """Batches of 8 images, all of one shape, so that each program is compiled once."""
    return list(images_of(spec, 8 * number).reshape(number, 8, *spec.image_shape))


def halves(spec):
    return [Shape(block.head_dim // 2, block.mlp_dim // 2) for block in spec.blocks]


def reduced_to(model, images, shapes):
    """Cut as it is before a refit."""
    orders = reduce.importance(model, flora.calibrate(model, images))
    return reduce.reduced(model, orders, shapes)


# Exactness at full size.


def golden(name):
    """A network with weights of its library, and images."""
    if name not in ("flora_deit", "flora_swin"):
        spec = (modern.SPECS | modern.SWINS_V2).get(name, modern.TINY_VIT)
        return flora.from_state_dict(modern.arrays(name), spec), modern.images(name)
    with np.load(DATA / f"{name}_micro.npz") as archive:
        weights = {k.removeprefix("sd/"): archive[k] for k in archive if k.startswith("sd/")}
        images = archive["images_nchw"].transpose(0, 2, 3, 1)
    return flora.from_state_dict(weights, MICRO if name == "flora_deit" else SWIN_SPEC), images


# Not those that differ from another in their classifier, activation or eps alone.
ALIKE = {"timm_augreg_no_head", "timm_clip", "hf_siglip", "hf_vit_no_head", "hf_beit"}
ALIKE |= {"hf_dinov2", "hf_dinov2_registers"}
GOLDENS = [
    n
    for n in (*modern.SPECS, "timm_tiny_vit", "flora_deit", "flora_swin", "timm_swin_v2")
    if n not in ALIKE
]
DISTINCT = {"timm_dinov2_registers", "timm_dinov3_swiglu", "timm_siglip", "hf_dinov3", "flora_deit"}


@pytest.mark.parametrize("name", kinds(GOLDENS, set(GOLDENS) - DISTINCT))
def test_full_size_is_the_dense_network(name):
    """Refitted to itself, with all heads turned, and with nothing cut."""
    model, images = golden(name)
    dense = logits(model, images)
    assert np.std(dense) > 0.01
    calibration = flora.calibrate(model, images)
    orders = reduce.importance(model, calibration)
    rotated = reduce.rotated(model, calibration)
    whole = [Shape(block.head_dim, block.mlp_dim) for block in model.spec.blocks]
    uncut, fitted = reduce.reduced(model, orders, whole), flora.refit(model, model, images)
    for network in (uncut, rotated, fitted):
        np.testing.assert_allclose(logits(network, images), dense, atol=1e-4)
    kernel = "blocks.0.attn.proj.kernel"
    moved = parameters_of(rotated)[kernel] - parameters_of(model)[kernel]
    assert abs(moved).max() > 1e-2
    assert uncut.spec == fitted.spec == model.spec


@pytest.mark.parametrize("step", [1, 3])
def test_what_an_mlp_loses_without_units(step):
    rng = np.random.default_rng(step)
    tokens = rng.normal(size=(60, 12)) @ rng.normal(size=(12, 12)) * rng.gamma(1, size=12)
    covariance, fc2 = tokens.T @ tokens / 60, rng.normal(size=(12, 4))
    units = reduce.order_units(covariance, fc2, step)
    ridge = reduce._MLP_RIDGE * np.trace(covariance) / 12
    root = np.linalg.cholesky(covariance + ridge * np.eye(12)).T

    def loss(kept):
        """The squared error of the best new fc2 for these units."""
        columns, target = root[:, kept], root @ fc2
        return ((columns @ np.linalg.lstsq(columns, target)[0] - target) ** 2).sum()

    np.testing.assert_array_equal(np.sort(units.order), np.arange(12))
    np.testing.assert_array_equal(units.left, np.arange(12, 0, -step))
    for left, lost in zip(units.left, units.loss, strict=True):
        np.testing.assert_allclose(lost, loss(units.order[:left]), rtol=1e-6, atol=1e-9)
        if left < 12:
            others = [loss(rng.permutation(12)[:left]) for _ in range(50)]
            assert lost < np.mean(others)


def tokens_of(model, images):
    """What enters qkv and proj of the first block, float64 [n, in] each."""
    inputs = dict(itertools.islice(layer_inputs(model, jnp.asarray(images)), 2))
    return (np.asarray(x, float) for x in inputs.values())


def test_heads_lose_the_least_that_a_rank_can():
    """In the logits, where a mean of the keys counts for nothing, and behind the projection."""
    model, images, rng = random_model(VIT), images_of(VIT, 8), np.random.default_rng(0)
    ((heads, _), _) = reduce.importance(model, flora.calibrate(model, images))
    x, context = tokens_of(model, images)
    parameters, count = parameters_of(model), len(x)
    qkv = x @ parameters["blocks.0.attn.qkv.kernel"] + parameters["blocks.0.attn.qkv.bias"]
    queries, keys, _ = qkv.reshape(count, 3, 2, 4).transpose(1, 2, 0, 3)
    keys = keys - keys.mean(1, keepdims=True)
    contexts = (context - context.mean(0)).reshape(count, 2, 4).transpose(1, 0, 2)
    proj = parameters["blocks.0.attn.proj.kernel"].astype(float).reshape(2, 4, 8)
    for head in range(2):
        # Behind each: a matrix in three parts, of which the middle one loses rank.
        of_logits = queries[head], heads.query[head], heads.key[head].T, keys[head].T
        of_output = contexts[head], heads.value[head], heads.back[head], proj[head]
        for before, turn, back, behind in (of_logits, of_output):
            np.testing.assert_allclose(turn @ back, np.eye(4), atol=1e-4)
            sizes = np.linalg.svd(before @ behind, compute_uv=False)[:4]

            def error(middle, before=before, behind=behind):
                return ((before @ (middle - np.eye(4)) @ behind) ** 2).sum()

            for rank in range(1, 4):
                ours = error(turn[:, :rank] @ back[:rank])
                least = (sizes[rank:] ** 2).sum()
                np.testing.assert_allclose(ours, least, rtol=1e-2, atol=1e-6 * (sizes**2).sum())
                for _ in range(50):
                    basis = np.linalg.qr(rng.normal(size=(4, rank)))[0]
                    assert ours < error(basis @ basis.T) * (1 + 1e-6)


def test_rotary_pairs_leave_by_their_energy():
    model, images = random_model(SPECS["rotary"]), images_of(SPECS["rotary"], 8)
    cut = reduced_to(model, images, halves(model.spec))
    x, _ = tokens_of(model, images)
    kernel, bias = (parameters_of(model)[f"blocks.0.attn.qkv.{n}"] for n in ("kernel", "bias"))
    qkv = x @ kernel + np.concatenate([bias[:8], np.zeros(8), bias[8:]])
    square = (qkv**2).mean(0).reshape(3, 2, 2, 2).sum(2)  # of each pair of each head
    strongest = (square[0] * square[1]).argmax(1)
    assert cut.spec.blocks[0].rotary_pairs == tuple((pair,) for pair in strongest.tolist())
    kept = (np.stack([strongest, strongest + 2], 1) + 4 * np.arange(2)[:, None]).ravel()
    found = parameters_of(cut)["blocks.0.attn.qkv.kernel"][:, :8]
    scale = np.sqrt(1 / 2)  # for logits are divided by the root of fewer dimensions
    expected = np.concatenate([kernel[:, kept] * scale, kernel[:, 8 + kept]], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit", "rotary"])
def test_units_that_leave_add_nothing(name):
    """The two parts of a gated MLP's unit leave together."""
    model, images = random_model(SPECS[name]), images_of(SPECS[name], 8)
    orders = reduce.importance(model, flora.calibrate(model, images))
    shapes = [Shape(block.head_dim, block.mlp_dim // 2) for block in model.spec.blocks]
    structure, parameters = functional.split(model)
    for number, (_, units) in enumerate(orders):
        gone = units.order[shapes[number].mlp_dim :]
        kernel = f"blocks.{number}.mlp.fc2.kernel"
        parameters[kernel] = parameters[kernel].at[gone].set(0.0)
    emptied = functional.merge(structure, parameters)
    given = logits(reduce.reduced(model, orders, shapes), images)
    np.testing.assert_allclose(given, logits(emptied, images), atol=1e-4)


# What a refit does.


@jax.jit(static_argnums=0, compiler_options=QUICK)
def _inputs_and_streams(structure, parameters, images):
    """What enters each layer; and the tokens of each block in four places."""
    network = functional.merge(structure, parameters)
    streams, x = [], network.embed(images)
    for block in network.blocks:
        entered = block.entered(x)
        attended = block.after_attention(entered, block.attn(block.attention_input(entered)))
        x = block.mlp_half(convolved := block.convolved(attended))
        streams.append((entered, attended, convolved, x))
    return dict(layer_inputs(network, images)), streams


@pytest.mark.parametrize("name", kinds(("vit", "tiny_vit"), COMPILED_LONG))
def test_every_layer_of_a_refit_is_a_regression_on_what_enters_it(name):
    """A class token weighs its share of all others, and what pads windows nothing."""
    model, batches = random_model(SPECS[name]), batches_of(SPECS[name])
    small = reduced_to(model, batches, halves(model.spec))
    fitted, images = flora.refit(small, model, batches, ridge=0.03), np.concatenate(batches)
    inputs, streams = _inputs_and_streams(*functional.split(fitted), images)
    dense_inputs, dense_streams = _inputs_and_streams(*functional.split(model), images)
    start, found = parameters_of(small), parameters_of(fitted)
    tokens = [READ_SHARE * 16] + [1] * 16
    for number, block in enumerate(model.blocks):
        entered, _, convolved, x = streams[number]
        weights = np.tile(tokens, len(images)) if name == "vit" else np.ones(len(x))
        in_windows = np.asarray(block.cut(jnp.asarray(weights)[:, None]))[:, 0]
        for leaf, of_rows, target in (
            ("attn.qkv", in_windows, None),
            ("attn.proj", in_windows, block.cut(dense_streams[number][1] - entered)),
            ("mlp.fc1", weights, None),
            ("mlp.fc2", weights, dense_streams[number][3] - convolved),
        ):
            layer = f"blocks.{number}.{leaf}"
            kernel = start[f"{layer}.kernel"]
            if target is None:
                target = dense_inputs[layer] @ kernel
            rows, targets = (
                centred(np.asarray(each, float), of_rows) for each in (inputs[layer], target)
            )
            expected = np.linalg.lstsq(*augmented(rows, targets, of_rows, kernel, 0.03))[0]
            np.testing.assert_allclose(found[f"{layer}.kernel"], expected, atol=1e-4, err_msg=layer)


@jax.jit(static_argnums=0, compiler_options=QUICK)
def _features(structure, parameters, images):
    return functional.merge(structure, parameters).features(images)


def distance(network, model, images):
    """The relative squared error of the features of the tokens that are left."""
    tokens = network.spec.blocks[-1].tokens
    dense = np.asarray(_features(*functional.split(model), images))
    dense = dense if tokens is None else dense[:, np.array(tokens)]
    return ((_features(*functional.split(network), images) - dense) ** 2).sum() / (dense**2).sum()


def assert_nearer(small, model, batches):
    fitted = flora.refit(small, model, batches)
    assert fitted.spec == small.spec
    unseen = np.random.default_rng(9).normal(size=batches[0].shape).astype(np.float32)
    for some in (batches[1], unseen):
        assert distance(fitted, model, some) < 0.9 * distance(small, model, some)


@pytest.mark.parametrize("name", kinds(SPECS, COMPILED_LONG))
def test_a_refit_brings_a_reduced_network_nearer(name):
    model, batches = random_model(SPECS[name]), batches_of(SPECS[name])
    small = reduced_to(model, batches, halves(model.spec))
    assert flora.macs(small.spec) < flora.macs(model.spec)
    assert_nearer(small, model, batches)


def test_a_refit_brings_a_slimmed_network_nearer():
    """Heads, units and tokens have left."""
    gated = gated_model(VIT)
    small = slim.extract(gated, slim.threshold(gated, attn=0.6, mlp=0.6, patch=0.5))
    numbers = [block.tokens for block in small.spec.blocks]
    assert len(numbers[1]) < len(numbers[0]) < VIT.num_tokens
    assert_nearer(small, random_model(VIT), batches_of(VIT))


def low_rank(model):
    space = flora.RankSpace.regular(model.spec, ratios=(1 / 4, 1 / 2, 1))
    genes = np.arange(space.num_layers) % 3
    return flora.extract(flora.factorize(model, space), genes)


def test_a_refit_brings_a_low_rank_network_nearer():
    model = random_model(VIT)
    small = low_rank(model)
    assert {rank is None for rank in small.spec.ranks} == {True, False}
    assert_nearer(small, model, batches_of(VIT))


def test_a_trained_network_is_fitted_to_what_the_dense_layers_give():
    """Its own biases of qkv and fc1 are no part of the target."""
    model, images = random_model(VIT), images_of(VIT, 8)
    structure, parameters = functional.split(low_rank(model))
    for name in ("blocks.0.attn.qkv.bias", "blocks.1.mlp.fc1.bias"):
        parameters[name] = parameters[name] + 1.0
    trained = functional.merge(structure, parameters)
    found, expected = (flora.refit(n, model, images) for n in (trained, low_rank(model)))
    assert_same(found, expected, atol=1e-4)


def test_a_bfloat16_network_keeps_its_dtype():
    structure, parameters = functional.split(random_model(ONE_BLOCK))
    half = functional.merge(structure, {n: p.astype("bfloat16") for n, p in parameters.items()})
    images = images_of(VIT, 8)
    fitted = flora.refit(half, half, images)
    small = flora.compress(half, images, macs=flora.macs(ONE_BLOCK) * 6 // 10)
    for found in (fitted, small):
        assert {p.dtype.name for p in parameters_of(found).values()} == {"bfloat16"}
    assert_same(fitted, half, rtol=0.02, atol=0.02)


# Whole compressions.


def test_shapes_are_the_best_of_all():
    spec = dataclasses.replace(VIT, mlp_ratio=1.0, blocks=())
    rng = np.random.default_rng(0)
    choices = [(compress.head_dims(spec, b), compress.mlp_dims(b)) for b in spec.blocks]
    assert choices[0] == ([1, 2, 3, 4], [*range(1, 9)])
    losses = [
        compress.Losses(*(np.append(-np.sort(-rng.random(len(c) - 1)), 0.0) for c in pair))
        for pair in choices
    ]
    of_blocks = [
        [
            (Shape(d, u), own.heads[i] + own.units[j])
            for i, d in enumerate(dims)
            for j, u in enumerate(widths)
        ]
        for own, (dims, widths) in zip(losses, choices, strict=True)
    ]
    every = [
        (reduce.reduced_spec(spec, (first, second)).macs(), loss + other)
        for (first, loss), (second, other) in itertools.product(*of_blocks)
    ]
    costs = np.array([cost for cost, _ in every])
    budgets = [costs.min(), *np.quantile(costs, (0.2, 0.5, 0.8)).astype(int), costs.max()]
    for budget, shapes in zip(
        budgets, compress.allocate_shapes(spec, losses, budgets), strict=True
    ):
        of_shape = [dict(block) for block in of_blocks]
        found = sum(each[shape] for each, shape in zip(of_shape, shapes, strict=True))
        assert reduce.reduced_spec(spec, shapes).macs() <= budget
        assert found == pytest.approx(min(loss for cost, loss in every if cost <= budget))


def test_networks_cost_what_they_may():
    model, images = random_model(VIT), images_of(VIT, 8)
    dense = flora.macs(VIT)
    budgets = [dense * 6 // 10, dense]
    small, whole = flora.compress(model, images, macs=budgets)
    assert 0.9 * budgets[0] < flora.macs(small.spec) <= budgets[0]
    for found, block in zip(small.spec.blocks, VIT.blocks, strict=True):
        assert found.head_dim in compress.head_dims(VIT, block)
        assert found.mlp_dim in compress.mlp_dims(block)
    assert whole.spec == VIT
    np.testing.assert_allclose(logits(whole, images), logits(model, images), atol=1e-4)
    alone = flora.compress(model, [images], macs=budgets[0])
    assert_same(alone, small, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "swin_v2"])
def test_losses_of_head_dimensions_are_those_of_the_cut_network(name):
    """Of the block alone, for each token by its size behind the block, the mean taken off."""
    spec = dataclasses.replace(ONE_BLOCK, class_token=False, pool="mean", blocks=())
    if name == "swin_v2":
        one_stage = {"depths": (1,), "num_heads": (2,), "pretrained_window_sizes": (2,)}
        spec = dataclasses.replace(TINY_SWIN_V2, **one_stage, blocks=())
    model, images = random_model(spec), images_of(spec, 8)
    orders = reduce.importance(model, flora.calibrate(model, images))
    losses = compress.choice_losses(model, orders, images)[0].heads
    x = model.embed(jnp.asarray(images))
    whole, out = model.blocks[0].attention_half(x), np.asarray(model.blocks[0](x), float)
    size = ((out - out.mean(0)) ** 2).sum(1)
    for dim, loss in zip(compress.head_dims(spec, spec.blocks[0]), losses, strict=True):
        shapes = [Shape(dim, block.mlp_dim) for block in spec.blocks]
        cut = reduce.reduced(model, orders, shapes).blocks[0].attention_half(x)
        error = np.asarray(cut - whole, float)
        expected = (((error - error.mean(0)) ** 2).sum(1) / size).mean()
        np.testing.assert_allclose(loss, expected, rtol=1e-3, atol=1e-6)


def test_losses_of_images_in_batches_are_those_of_all(monkeypatch):
    """Two batches alike: the mean that sizes of tokens are taken about is that of each batch."""
    model, images = random_model(ONE_BLOCK), images_of(VIT, 4)
    orders = reduce.importance(model, flora.calibrate(model, images))
    monkeypatch.setattr(calibrate, "BATCH_SIZE", 4)
    (expected,) = compress.choice_losses(model, orders, images)
    (found,) = compress.choice_losses(model, orders, np.concatenate([images, images]))
    assert (expected.heads[:-1] > 0).all()
    np.testing.assert_allclose(found.heads, expected.heads, rtol=1e-5)
    np.testing.assert_allclose(found.units, expected.units, rtol=1e-5)


@pytest.mark.parametrize("number", [1, 3, 7, 12, 20])
def test_first_images_are_spread_over_batches(number):
    images = np.arange(20.0)
    found = compress.first_images([images[:3], images[3:4], images[4:13], images[13:]], number)
    np.testing.assert_array_equal(found, images[:: max(1, 20 // number)][:number])


@pytest.fixture(scope="module")
def pair():
    """A dense network, a smaller one, images in three batches, and what the refit of all gives."""
    model = random_model(VIT)
    batches, small = batches_of(VIT, 3), low_rank(model)
    return model, small, batches, flora.refit(small, model, batches)


def test_a_refit_goes_on_where_it_was_killed(pair, tmp_path, monkeypatch):
    model, small, batches, expected = pair
    fit, calls = regression.fit_layer, []

    def killed_in_the_second_block(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(refit, "fit_layer", killed_in_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        flora.refit(small, model, batches, directory=tmp_path)
    found = flora.refit(small, model, batches, directory=tmp_path)
    assert len(calls) == 6 + 4
    assert_same(found, expected, rtol=0, atol=0)
    again = flora.refit(small, model, batches, directory=tmp_path)
    assert len(calls) == 6 + 4
    assert_same(again, expected, rtol=0, atol=0)


def test_a_refit_that_is_told_to_end_stops_behind_a_block(pair, tmp_path, monkeypatch):
    model, small, batches, expected = pair
    with monkeypatch.context() as patch:
        patch.setattr(refit.StopRequest, "is_set", lambda self: any(tmp_path.iterdir()))
        with pytest.raises(Stopped, match="refit is saved up to block 1"):
            flora.refit(small, model, batches, directory=tmp_path)
    assert [path.name[:10] for path in tmp_path.iterdir()] == ["block_000_"]
    assert_same(flora.refit(small, model, batches, directory=tmp_path), expected, rtol=0, atol=0)


def test_hidden_states_may_lie_in_files(pair, monkeypatch):
    """What a pass leaves as it is is not written again: four halves of the two streams a block."""
    model, small, batches, expected = pair
    make, made, save, saved = tempfile.TemporaryDirectory, [], np.save, []
    monkeypatch.setattr(np, "save", lambda *args: saved.append(args) or save(*args))
    monkeypatch.setattr(refit, "STATES_BYTES", 0)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda: made.append(make()) or made[-1])
    assert_same(flora.refit(small, model, batches), expected, rtol=0, atol=0)
    (folder,) = made
    assert not os.path.exists(folder.name)
    assert len(saved) == len(batches) * (2 + 4 * len(VIT.blocks))


def test_one_array_of_images_is_the_batches_together(pair):
    model, small, batches, expected = pair
    assert_same(flora.refit(small, model, np.concatenate(batches)), expected, atol=1e-4)


def show_on_two_devices():
    """Run where there are two devices; the batch of 7 images does not share out equally."""
    assert jax.device_count() == 2
    print(json.dumps(on_these_devices()))


def on_these_devices():
    """Losses of choices, and outputs of a network that was refitted."""
    model, images = random_model(ONE_BLOCK), images_of(VIT, 7)
    orders = reduce.importance(model, flora.calibrate(model, images))
    (losses,) = compress.choice_losses(model, orders, images)
    fitted = flora.refit(low_rank(model), model, images)
    return [np.asarray(a).tolist() for a in (losses.heads, losses.units, logits(fitted, images))]


@pytest.mark.slow
def test_two_devices_are_as_one():
    done = subprocess.run(
        [sys.executable, "-c", "from tests import test_closed_form as t; t.show_on_two_devices()"],
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    given = json.loads(done.stdout.splitlines()[-1])
    for found, expected in zip(given, on_these_devices(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


# Input that is bad, or poor.


def test_budgets_below_the_least():
    model, images = random_model(VIT), images_of(VIT)
    floor = [Shape(1, compress.mlp_dims(block)[0]) for block in VIT.blocks]
    least = reduce.reduced_spec(VIT, floor).macs()
    with pytest.raises(ValueError, match=rf"at most {least - 1} .*; the least is {least}, 0\."):
        flora.compress(model, images, macs=[flora.macs(VIT), least - 1])


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((0, 8, 8, 3), np.float32), "at least one image"),
        ([], "at least one image"),
        (np.zeros((2, 8, 9, 3), np.float32), r"shape \(2, 8, 9, 3\); expected \[B, 8, 8, 3\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), "have dtype uint8; expected normalised"),
        (np.full((2, 8, 8, 3), np.nan, np.float32), r"enters blocks\.0\.attn\.qkv is not finite"),
    ],
    ids=["none", "no batches", "shape", "bytes", "nan"],
)
def test_bad_images(images, message):
    model = random_model(VIT)
    with pytest.raises(ValueError, match=message):
        flora.refit(model, model, images)
    with pytest.raises(ValueError, match=message):
        flora.compress(model, images, macs=flora.macs(VIT))


@pytest.mark.parametrize("leaf", ["attn.proj", "mlp.fc1", "mlp.fc2"])
def test_weights_that_are_not_finite(leaf):
    model, images = random_model(VIT), images_of(VIT)
    structure, parameters = functional.split(model)
    name = f"blocks.1.{leaf}.kernel"
    parameters[name] = parameters[name].at[0, 0].set(np.inf)
    fitted = "attn.proj" if leaf == "attn.proj" else "mlp.fc2"
    with pytest.raises(ValueError, match=f"what blocks.1.{fitted} is fitted to is not finite"):
        flora.refit(model, functional.merge(structure, parameters), images)


def test_a_slimmed_network_is_compressed_further():
    gated, images = gated_model(VIT), images_of(VIT, 32)
    slimmed = slim.extract(gated, slim.threshold(gated, patch=0.5))
    assert_same(flora.refit(slimmed, slimmed, images), slimmed, atol=1e-4)
    budget = round(0.7 * flora.macs(slimmed.spec))
    small = flora.compress(slimmed, images, macs=budget)
    assert flora.macs(small.spec) <= budget
    assert [b.tokens for b in small.spec.blocks] == [b.tokens for b in slimmed.spec.blocks]
    assert np.isfinite(np.asarray(small(images))).all()


def test_networks_that_do_not_belong_together():
    model, images = random_model(VIT), images_of(VIT)
    for changes, message in (
        ({"depth": 3}, r"the smaller has 3 blocks of widths \[8\], the dense one 2 of \[8\]"),
        ({"embed_dim": 16}, r"2 blocks of widths \[16\], the dense one 2 of \[8\]"),
        ({"image_size": 10}, r"image_shape \(10, 10, 3\), the dense one's is \(8, 8, 3\)"),
        ({"distilled": True}, "num_prefix_tokens 2, the dense one's is 1"),
    ):
        other = random_model(dataclasses.replace(VIT, blocks=(), **changes))
        with pytest.raises(ValueError, match=message):
            flora.refit(other, model, images)
    small = low_rank(model)
    gated = gated_model(VIT)
    fewer_tokens = slim.extract(gated, slim.threshold(gated, patch=0.5))
    with pytest.raises(ValueError, match="block 0 of the smaller network works on tokens"):
        flora.refit(model, fewer_tokens, images)
    with pytest.raises(ValueError, match="must be dense, but it has low-rank layers"):
        flora.refit(model, small, images)
    with pytest.raises(ValueError, match="needs a dense network, but this one has low-rank"):
        flora.compress(small, images, macs=flora.macs(VIT))


@pytest.mark.parametrize("ridge", [0, -1, float("nan")])
def test_a_ridge_must_be_above_zero(ridge):
    model = random_model(VIT)
    with pytest.raises(ValueError, match=f"ridge must be above 0, got {ridge}"):
        flora.refit(model, model, images_of(VIT), ridge=ridge)


def test_images_that_are_all_alike():
    model, images = random_model(ONE_BLOCK), np.repeat(images_of(VIT, 1), 8, axis=0)
    small = flora.compress(model, images, macs=flora.macs(ONE_BLOCK) * 6 // 10)
    assert np.isfinite(logits(small, images_of(VIT))).all()
    blank = np.zeros_like(images)
    assert np.isfinite(logits(flora.refit(small, model, blank), images)).all()


def test_one_image_with_fewer_tokens_than_layers_are_wide(caplog):
    model, image = random_model(VIT), images_of(VIT, 1)
    with caplog.at_level(logging.INFO):
        fitted = flora.refit(low_rank(model), model, image)
    assert "1 images have fewer tokens than blocks.0.mlp.fc2" in caplog.text
    assert np.isfinite(logits(fitted, images_of(VIT))).all()
