"""Swin V2: numbers of timm and transformers, costs, and both methods and the closed form on it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flora_jax as flora
from flora_jax import slim
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.spec_json import spec_from_json, spec_to_json
from flora_jax.weights.metadata.spec import spec_of_config
from tests.helpers import modern
from tests.helpers.networks import (
    TINY_SWIN_V2,
    forward,
    images_of,
    logits,
    random_model,
    size,
)
from tests.helpers.slimming import gated_model, random_masks
from tests.helpers.weights import assert_same

SPECS = modern.SWINS_V2
HUGGING_FACE, TIMM = SPECS["hf_swin_v2"], SPECS["timm_swin_v2"]
TOLERANCE = {"atol": 1e-4, "rtol": 0}


@functools.cache
def model(name):
    return flora.from_state_dict(modern.arrays(name), SPECS[name])


@pytest.mark.parametrize("name", SPECS)
def test_outputs_are_those_of_the_library(name):
    given = logits(model(name), modern.images(name))
    assert np.std(given) > 0.5
    np.testing.assert_allclose(given, modern.golden(name)["output"], **TOLERANCE)


def config_of(name):
    config = modern.config(name)
    if "model" in config:
        return {"architecture": f"{config['model']}.tag", "model_args": config["arguments"]}
    return config["config"]


@pytest.mark.parametrize("name", SPECS)
def test_a_folder_needs_no_spec(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    save_file(modern.arrays(name), tmp_path / "model.safetensors")
    assert flora.read_spec(tmp_path) == SPECS[name]
    assert_same(flora.from_pretrained(tmp_path), model(name))


def test_windows_of_the_pretraining_leave_no_trace_in_the_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("timm_swin_v2")))
    save_file(modern.arrays("timm_swin_v2"), tmp_path / "model.safetensors")
    other = dataclasses.replace(TIMM, pretrained_window_sizes=())
    with pytest.raises(ValueError, match=r"pretrained_window_sizes is \(4, 0\), and \(\) in the"):
        flora.from_pretrained(tmp_path, other)


@pytest.mark.parametrize(
    ("name", "windows", "pretrained", "width"),
    [
        ("swinv2_tiny_window8_256", [8, 8, 8, 8], (), 96),
        ("swinv2_small_window16_256.ms_in1k", [16, 16, 16, 8], (), 96),
        ("swinv2_base_window12to16_192to256", [16, 16, 16, 8], (12, 12, 12, 6), 128),
        ("swinv2_large_window12to24_192to384", [24, 24, 24, 12], (12, 12, 12, 6), 192),
        ("swinv2_base_window12_192.ms_in22k", [12, 12, 12, 6], (), 128),
    ],
)
def test_names_of_timm(name, windows, pretrained, width):
    spec = spec_of_config({"architecture": name})
    assert [stage.window_size for stage in spec.stages] == windows
    assert (spec.pretrained_window_sizes, spec.embed_dim) == (pretrained, width)
    assert (spec.post_norm, spec.cosine_attention, spec.k_bias) == (True, True, False)


def test_the_published_cost_and_size():
    """5.9 G and 28 M, table 1 of the paper."""
    spec = flora.swin_v2("tiny")
    assert flora.num_params(spec) == 28_347_154
    assert round(flora.macs(spec) / 1e9, 2) == 5.93


@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
def test_names_of_microsofts_release_and_buffers(prefix):
    arrays = {}
    for name, array in modern.arrays("timm_swin_v2").items():
        arrays[
            name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head")
        ] = array
    for name in ("relative_coords_table", "relative_position_index"):
        arrays[f"layers.0.blocks.0.attn.{name}"] = np.zeros((1, 11, 11, 2), np.float32)
    arrays = {prefix + name: array for name, array in arrays.items()}
    assert_same(flora.from_state_dict(arrays, TIMM), model("timm_swin_v2"))


def test_export_to_timm_and_back(tmp_path):
    path = tmp_path / "timm.safetensors"
    flora.export_timm(model("timm_swin_v2"), path)
    assert_same(flora.from_pretrained(path, TIMM), model("timm_swin_v2"))
    written, theirs = load_file(path), modern.arrays("timm_swin_v2")
    assert written.keys() == theirs.keys()
    for name, array in written.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_save_and_load(tmp_path):
    flora.save(model("timm_swin_v2"), tmp_path)
    assert_same(flora.load(tmp_path), model("timm_swin_v2"))
    parameters = functional.split(model("timm_swin_v2"))[1]
    assert_same(flora.from_state_dict(parameters, TIMM), model("timm_swin_v2"))
    assert spec_from_json(spec_to_json(TIMM)) == TIMM


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 250}, "image_size 250 is not a multiple of patch_size 4"),
        ({"image_size": 264}, "do not tile stage 3 of .* 16.5 patches a side; the nearest image"),
        ({"pretrained_window_sizes": (8, 8)}, r"\(8, 8\) must have one entry for each of the 4"),
        ({"pretrained_window_sizes": (8, 8, 8, -1)}, "pretrained_window_sizes must be at least 0"),
    ],
)
def test_bad_spec(fields, message):
    with pytest.raises(ValueError, match=message):
        flora.swin_v2("tiny", **fields)


@pytest.mark.parametrize("spec", [HUGGING_FACE, TIMM], ids=["tiled", "padded"])
def test_costs(spec, count_macs):
    """Products counted in the program, less those of weights alone, which no image changes."""
    structure, parameters = functional.split(create_abstract(spec))
    assert size(create_abstract(spec)) == flora.num_params(spec)
    image = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    products = count_macs(jax.make_jaxpr(forward, static_argnums=0)(structure, parameters, image))
    for stage in spec.stages:
        of_each = (2 * stage.window_size - 1) ** 2 * 512 * (2 + stage.num_heads)
        products -= stage.depth * of_each
    first, last = spec.stages
    norms = sum(2 * into.tokens * into.width for into in spec.block_inputs)
    norms += first.tokens * first.width + last.tokens * last.width  # patches, merging
    norms += last.width * first.tokens // 4
    assert products + norms == flora.macs(spec)


def test_vectors_of_zeros_have_no_direction():
    """As those of what pads windows without a bias: no NaN, forward or backward."""
    spec = dataclasses.replace(TINY_SWIN_V2, qkv_bias=False)
    structure, parameters = functional.split(random_model(spec))
    parameters = {n: jnp.zeros_like(p) if "qkv" in n else p for n, p in parameters.items()}

    @jax.jit
    def gradient(parameters):
        return jax.grad(lambda p: forward(structure, p, images_of(spec)).sum())(parameters)

    assert all(np.isfinite(g).all() for g in gradient(parameters).values())


def test_subnets_are_what_the_supernet_computes():
    name = "timm_swin_v2"
    images = modern.images(name)
    space = flora.RankSpace.regular(TIMM, ratios=(1 / 3, 1))
    supernet = flora.factorize(model(name), space, implementation="masked")
    dense = modern.golden(name)["output"]
    np.testing.assert_allclose(supernet(images, space.full_rank_genes), dense, **TOLERANCE)
    (genes,) = space.sample(np.random.default_rng(1), 1, "uniform")
    subnet = flora.extract(supernet, genes)
    expected = supernet(images, genes)
    np.testing.assert_allclose(logits(subnet, images), expected, **TOLERANCE)
    assert abs(expected - dense).max() > 1e-2
    assert flora.macs(subnet.spec) == space.macs(genes)
    assert flora.num_params(subnet.spec) == space.params(genes) == size(subnet)


@pytest.mark.parametrize("loses_a_head", [False, True])
def test_slimmed_is_masked(loses_a_head):
    """A head leaves with its scale and its part of the position MLP."""
    gated = gated_model(TINY_SWIN_V2)
    masks = random_masks(TINY_SWIN_V2, np.random.default_rng(3), tokens=False)
    attn = [mask.copy() for mask in masks.attn]
    attn[0][0], attn[0][1, 0] = not loses_a_head, True
    masks = dataclasses.replace(masks, attn=tuple(attn))
    small = slim.extract(gated, masks, fold=False, tile=3)
    assert small.spec.blocks[0].num_heads == 2 - loses_a_head
    images = images_of(TINY_SWIN_V2)
    masked = logits(slim.apply_masks(gated, masks), images)
    np.testing.assert_allclose(logits(small, images), masked, **TOLERANCE)
    assert size(small) == flora.num_params(small.spec)
    scale = "blocks.0.attn.logit_scale"
    assert scale in functional.split(gated.network)[0].undecayed
