"""TinyViT: timm's numbers, its windows and convolutions, costs, and both methods on it."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import flora_jax as flora
from flora_jax import slim
from flora_jax.flora.filter import score_block
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.network import Loop
from flora_jax.models.spec import BlockSpec
from flora_jax.models.tiny_vit import DepthwiseConvolution
from flora_jax.models.windows import Windows
from flora_jax.weights.layouts import timm
from flora_jax.weights.resample import resample_distance_table
from tests.helpers import modern
from tests.helpers.commands import DATA
from tests.helpers.networks import QUICK, every_triple, logits, random_model, size
from tests.helpers.slimming import gated_model, random_masks
from tests.helpers.weights import assert_same

NAME = "timm_tiny_vit"
SPEC = modern.TINY_VIT
TOLERANCE = {"atol": 1e-4, "rtol": 0}


@functools.cache
def model():
    return flora.from_state_dict(modern.arrays(NAME), SPEC)


@jax.jit(static_argnums=0, compiler_options=QUICK)
def _looped(structure, parameters, images):
    return functional.merge(structure, parameters)(images, Loop())


def logits_in_a_loop(model, images):
    return _looped(*functional.split(model), images)


def test_output_is_that_of_timm():
    given = logits(model(), modern.images(NAME))
    assert np.std(given) > 0.5
    np.testing.assert_allclose(given, modern.golden(NAME)["output"], **TOLERANCE)


@pytest.mark.parametrize(
    ("expected", "window_sizes"), [("padded", (7, 4, 4, 2)), ("interpolated", (7, 6, 3, 3))]
)
def test_windows_that_do_not_tile_and_others_than_the_weights_have(expected, window_sizes):
    """Feature maps of 5, 3 and 2 tokens a side, by timm."""
    golden = np.load(DATA / "modern/timm_tiny_vit_windows.npz")
    spec = dataclasses.replace(SPEC, image_size=37, window_sizes=window_sizes, blocks=())
    network = flora.from_state_dict(modern.arrays(NAME), spec)
    given = logits(network, golden["images_nchw"].transpose(0, 2, 3, 1))
    np.testing.assert_allclose(given, golden[expected], **TOLERANCE)


def test_a_distance_table_of_no_window():
    with pytest.raises(ValueError, match="8 distances belong to no window"):
        resample_distance_table(np.zeros((8, 2), np.float32), 4)


@pytest.mark.parametrize("large", [False, True])
def test_a_folder_needs_no_spec(tmp_path, large):
    config = modern.config(NAME)
    config = {"architecture": f"{config['model']}.tag", "model_args": config["arguments"]}
    config["pretrained_cfg"] = {"input_size": [3, 96, 96] if large else [3, 64, 64]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(modern.arrays(NAME), tmp_path / "model.safetensors")
    read = flora.read_spec(tmp_path)
    assert read == dataclasses.replace(SPEC, image_size=96 if large else 64, blocks=())
    if not large:
        assert_same(flora.from_pretrained(tmp_path), model())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_conv_size": 5}, "local_conv_size is 5, but a TinyViT has 3 here"),
        ({"act_layer": "relu"}, "act_layer is 'relu', but a TinyViT has 'gelu' here"),
        ({"key_dim": 16}, "model_args of tiny_vit_21m_224 have key_dim, which is not known"),
        ({"window_sizes": [7, 7]}, r"window_sizes \(7, 7\) must have one entry a stage"),
    ],
)
def test_a_network_that_is_not_built(tmp_path, arguments, message):
    config = {"architecture": "tiny_vit_21m_224", "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        flora.read_spec(tmp_path)


def test_export_and_back(tmp_path):
    path = tmp_path / "timm.safetensors"
    flora.export_timm(model(), path)
    assert_same(flora.from_pretrained(path, SPEC), model())
    written, theirs = load_file(path), modern.arrays(NAME)
    assert {n: a.shape for n, a in written.items()} == {n: a.shape for n, a in theirs.items()}
    flora.save(model(), tmp_path / "own")
    assert_same(flora.load(tmp_path / "own"), model())


def test_a_subnet_is_exported_and_read(tmp_path):
    space = flora.RankSpace.regular(SPEC, ratios=(1 / 3, 1))
    subnet = flora.extract(flora.factorize(model(), space), np.arange(space.num_layers) % 2)
    flora.export_timm(subnet, tmp_path / "x.safetensors")
    assert_same(flora.from_pretrained(tmp_path / "x.safetensors", SPEC), subnet)


def test_weights_that_do_not_fit():
    arrays = modern.arrays(NAME)
    wider = dataclasses.replace(
        SPEC, embed_dims=(24, 32, 64, 64), num_heads=(1, 2, 4, 4), blocks=()
    )
    with pytest.raises(ValueError, match=r"has shape .* in the file, and .* in the spec"):
        flora.from_state_dict(arrays, wider)
    name = "stages.1.blocks.0.local_conv.bn.running_var"
    with pytest.raises(ValueError, match=f"missing {re.escape(name)}; unexpected none"):
        flora.from_state_dict({n: a for n, a in arrays.items() if n != name}, SPEC)
    arrays[name] = arrays[name][:-1]
    with pytest.raises(ValueError, match=r"running_var has shape \(31,\) in the file, and \(32,\)"):
        flora.from_state_dict(arrays, SPEC)
    with pytest.raises(ValueError, match="weights of a timm TinyViT, but the spec is a ViTSpec"):
        flora.from_state_dict(arrays, flora.deit("tiny"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": (3, 5, 12, 18)}, "stage 2 has width 192, .* num_heads 5; .* it: 4"),
        ({"depths": (2, 2)}, r"depths \(2, 2\), .* must have one entry a stage"),
        ({"depths": (0, 2, 6, 2)}, r"depths must be at least 1, got \(0, 2, 6, 2\)"),
        ({"embed_dims": (95, 192, 384, 576)}, "begin with 95, which must be even.*nearest: 96"),
        ({"blocks": (BlockSpec(1, 4, 8),)}, "make 10 blocks .* but 1 were given"),
        ({"blocks": (BlockSpec(6, 32, 768, tokens=(0,)),) * 10}, "no token can leave: the conv"),
    ],
)
def test_bad_spec(fields, message):
    with pytest.raises(ValueError, match=message):
        flora.TinyViTSpec(**fields)


def test_published_sizes():
    """MACs with one a value of a norm; without it 21M has the published 4.25 G."""
    counts = {size: flora.macs(flora.tiny_vit(size)) for size in ("5m", "11m", "21m")}
    assert counts == {"5m": 1_256_015_488, "11m": 2_017_137_920, "21m": 4_251_948_288}
    assert flora.tiny_vit("21m", 384).window_sizes == (12, 12, 24, 12)
    assert flora.tiny_vit("5m", 512).window_sizes == (16, 16, 32, 16)
    with pytest.raises(ValueError, match="unknown TinyViT size '22m'; choose one of 5m, 11m, 21m"):
        flora.tiny_vit("22m")


@pytest.mark.parametrize(("name", "params"), [("5m", 5_392_764), ("21m", 21_198_568)])
def test_parameters_as_timm_counts_them(name, params):
    """A folded batch norm leaves a bias: one value a channel less than its weight and bias."""
    spec = flora.tiny_vit(name)
    stored, own = {}, {}
    shapes = {n: p.shape for n, p in functional.split(create_abstract(spec))[1].items()}
    for row in timm(spec):
        stored |= row.shapes(shapes[row.target])
        own[row.target] = shapes[row.target]
    learned = {n: shape for n, shape in stored.items() if ".running_" not in n}
    assert sum(map(np.prod, learned.values())) == params
    channels = sum(shape[0] for n, shape in learned.items() if n.endswith("bn.weight"))
    assert flora.num_params(spec) == params - channels == sum(map(np.prod, own.values()))


def test_costs(count_macs):
    """Products counted in the program, padding and all; a norm is one multiply-add a value."""
    spec = dataclasses.replace(SPEC, image_size=37, blocks=())
    network = random_model(spec)
    structure, parameters = functional.split(network)
    image = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    program = jax.make_jaxpr(lambda p, x: functional.merge(structure, p)(x))(parameters, image)
    convolved = 19**2 * 9 * 3 * 12 + 10**2 * 9 * 12 * 24
    for _, part in nnx.iter_modules(network):
        if isinstance(part, DepthwiseConvolution):
            convolved += 9 * part.kernel.shape[-1] * (-(-part.grid_size // part.stride)) ** 2
    norms = sum((into.attending_tokens + into.tokens) * into.width for into in spec.block_inputs)
    assert [into.padding for into in spec.block_inputs] == [39, 39, 7, 7, 0]
    expected = count_macs(program) + convolved + norms + spec.pooled_dim
    assert flora.macs(spec) == expected
    assert flora.num_params(spec) == size(network)


@settings(max_examples=20)
@given(grid_size=st.integers(1, 6), window_size=st.integers(1, 7), shift=st.integers(0, 3))
def test_windows_join_to_what_was_cut(grid_size, window_size, shift):
    windows = Windows(grid_size, window_size, shift)
    x = jnp.arange(2.0 * 3 * grid_size**2).reshape(-1, 3)
    cut = windows.cut(x)
    assert len(cut) == len(x) + 2 * windows.num_padding_tokens
    np.testing.assert_array_equal(windows.join(cut), x)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("grid_size", [1, 4, 5])
def test_depthwise_convolution_is_that_of_xla(grid_size, stride):
    layer = DepthwiseConvolution(grid_size, 4, stride, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, grid_size, grid_size, 4)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        x,
        layer.kernel[...][:, :, None],
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    np.testing.assert_allclose(layer(x.reshape(-1, 4)), expected.reshape(-1, 4), atol=1e-6)


def test_one_program_serves_every_subnet_and_extraction_is_the_supernet():
    images = modern.images(NAME)
    stats = flora.calibrate(model(), images)
    space = flora.RankSpace.regular(SPEC, ratios=(1 / 3, 1))
    for implementation in ("masked", "sliced"):
        supernet = flora.factorize(model(), space, calibration=stats, implementation=implementation)
        structure, parameters = functional.split(supernet.network)
        traces = []

        @jax.jit(compiler_options=QUICK)
        def forward(parameters, images, genes, structure=structure, traces=traces):
            traces.append(genes)
            return functional.merge(structure, parameters, genes)(images)

        full = forward(parameters, images, jnp.asarray(space.full_rank_genes))
        np.testing.assert_allclose(full, modern.golden(NAME)["output"], **TOLERANCE)
        for genes in space.sample(np.random.default_rng(1), 2, "uniform"):
            subnet = flora.extract(supernet, genes)
            given = forward(parameters, images, jnp.asarray(genes))
            np.testing.assert_allclose(logits(subnet, images), given, **TOLERANCE)
            assert abs(given - full).max() > 1e-2
            assert flora.macs(subnet.spec) == space.macs(genes)
            assert flora.num_params(subnet.spec) == space.params(genes) == size(subnet)
        assert len(traces) == 1
    np.testing.assert_allclose(
        logits_in_a_loop(subnet, images), logits(subnet, images), **TOLERANCE
    )


def test_scoring_a_block_is_scoring_the_network():
    """Candidates share the blocks before, and a block's attention half."""
    space = flora.RankSpace.regular(SPEC, ratios=(1 / 3, 1))
    supernet = flora.factorize(model(), space, implementation="masked")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    batch = {"image": pictures, "label": np.arange(3, dtype=np.int32)}
    heldout = flora.EvaluationSet([batch | {"mask": np.ones(3, np.float32)}], flora.Normalization())
    expected = flora.evaluate(supernet, heldout, every_triple(space, 2))["log_likelihood"]
    scores = score_block(supernet, 2, heldout)["log_likelihood"]
    assert len(np.unique(scores.round(4))) == 8
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_slimmed_is_masked():
    gated = gated_model(SPEC)
    assert not gated.has_token_gates
    masks = random_masks(SPEC, np.random.default_rng(3), tokens=False)
    masked = slim.apply_masks(gated, masks)
    small = slim.extract(gated, masks, fold=False, tile=3)
    images = modern.images(NAME)[:2]
    np.testing.assert_allclose(logits(small, images), logits(masked, images), **TOLERANCE)
    assert size(small) == flora.num_params(small.spec)
    with pytest.raises(ValueError, match="no token gates here: the convolutions and windows of a"):
        slim.add_gates(model(), tokens=True)
