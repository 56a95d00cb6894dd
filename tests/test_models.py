"""Specs, models built from them, and weights by name."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_jax as flora
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.spec import BlockSpec
from flora_jax.models.spec_json import spec_from_json, spec_to_json
from flora_jax.models.swin_spec import SwinSpec
from flora_jax.models.vit_spec import ViTSpec

SMALL = {"image_size": 4, "patch_size": 2, "embed_dim": 6, "num_heads": 2, "num_classes": 3}
SMALL_SWIN = {"patch_size": 1, "num_classes": 3, "mlp_ratio": 2}


def with_any_ranks(draw, dense):
    ranks = [st.none() | st.integers(1, layer.full_rank) for layer in dense.layers]
    return dense.with_ranks(tuple(draw(rank) for rank in ranks))


block_specs = st.builds(BlockSpec, st.integers(1, 3), st.integers(1, 4), st.integers(1, 9))


@st.composite
def vit_specs(draw):
    """Two or three blocks of different shapes, layers dense or of any legal rank."""
    blocks = draw(st.lists(block_specs, min_size=2, max_size=3))
    pool = draw(st.sampled_from(["token", "mean"]))
    dense = ViTSpec(
        **SMALL,
        in_channels=draw(st.integers(1, 3)),
        qkv_bias=draw(st.booleans()),
        pool=pool,
        distilled=pool == "token" and draw(st.booleans()),
        class_token=pool == "token" or draw(st.booleans()),
        depth=len(blocks),
        blocks=tuple(blocks),
    )
    return with_any_ranks(draw, dense)


@st.composite
def swin_specs(draw):
    """Two or three stages, the last ones smaller than a window or not."""
    depths = draw(st.lists(st.integers(1, 2), min_size=2, max_size=3))
    window_size = draw(st.integers(1, 3))
    dense = SwinSpec(
        **SMALL_SWIN,
        image_size=window_size * 2 ** draw(st.integers(len(depths) - 1, 3)),
        embed_dim=2 * draw(st.integers(1, 3)),
        in_channels=draw(st.integers(1, 3)),
        qkv_bias=draw(st.booleans()),
        patch_norm=draw(st.booleans()),
        absolute_pos_embed=draw(st.booleans()),
        window_size=window_size,
        depths=tuple(depths),
        num_heads=(1,) * len(depths),
        blocks=tuple(draw(block_specs) for _ in range(sum(depths))),
    )
    return with_any_ranks(draw, dense)


def norm_macs(spec) -> int:
    """Multiply-adds of the norms around the blocks, as the published tables count them."""
    if isinstance(spec, ViTSpec):
        return (1 + spec.distilled) * spec.embed_dim
    patches = spec.grid_size**2
    merged = sum(stage.tokens * stage.width for stage in spec.stages[:-1])
    last = spec.pooled_dim * patches // 2 ** len(spec.depths)
    return spec.patch_norm * patches * spec.embed_dim + merged + last


@pytest.mark.slow
@settings(max_examples=40)
@given(spec=vit_specs() | swin_specs())
def test_costs_are_those_of_the_model(spec, count_macs):
    structure, parameters = functional.split(create_abstract(spec))
    assert sum(math.prod(p.shape) for p in parameters.values()) == flora.num_params(spec)

    def logits(parameters, images):
        return functional.merge(structure, parameters)(images)

    image = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    products = count_macs(jax.make_jaxpr(logits)(parameters, image))
    in_blocks = sum(2 * into.tokens * into.width for into in spec.block_inputs)
    assert products + in_blocks + norm_macs(spec) == flora.macs(spec)


def test_blocks_of_different_shapes():
    blocks = (BlockSpec(1, 5, 7), BlockSpec(3, 2, 4, (2, None, 3)), BlockSpec(2, 3, 24))
    structure, shapes = functional.split(create_abstract(ViTSpec(**SMALL, depth=3, blocks=blocks)))
    rng = np.random.default_rng(0)
    parameters = {name: np.float32(rng.normal(size=s.shape)) for name, s in shapes.items()}
    forward = jax.jit(lambda parameters, x: functional.merge(structure, parameters)(x))
    logits = forward(parameters, rng.normal(size=(2, 4, 4, 3)))
    assert logits.shape == (2, 3)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 30, "patch_size": 8}, "image_size 30 .* patch_size 8.* nearest .* 32"),
        ({"image_size": 3, "patch_size": 8}, "image_size 3 .* nearest .* 8"),
        ({"embed_dim": 50, "num_heads": 3}, "embed_dim 50 .* num_heads 3.* nearest .* 51"),
        ({"embed_dim": 2, "num_heads": 8}, "embed_dim 2 .* nearest .* 8"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"depth": 2, "blocks": (BlockSpec(1, 4, 8),)}, "depth is 2 but 1 blocks"),
        (
            {"depth": 1, "embed_dim": 6, "blocks": (BlockSpec(1, 4, 8, (None, 7, None)),)},
            r"rank 7 of blocks.0.mlp.fc1 lies outside 1\.\.6",
        ),
        (
            {"depth": 1, "blocks": (BlockSpec(1, 4, 8, (0, None, None)),)},
            r"rank 0 of blocks.0.attn.qkv lies outside 1\.\.12",
        ),
    ],
)
def test_bad_spec(fields, message):
    with pytest.raises(ValueError, match=message):
        ViTSpec(**fields)


@given(size=st.integers(1, 60), multiple=st.integers(1, 20))
def test_the_size_named_in_the_message_is_the_nearest(size, multiple):
    for names in (("image_size", "patch_size"), ("embed_dim", "num_heads")):
        try:
            ViTSpec(**dict(zip(names, (size, multiple), strict=True)))
        except ValueError as error:
            nearest = int(str(error).rsplit(" ", 1)[1])
            legal = range(multiple, 100, multiple)
            assert abs(nearest - size) == min(abs(other - size) for other in legal)
            assert nearest in legal
        else:
            assert size % multiple == 0


@pytest.mark.parametrize("fields", [(0, 4, 8), (1, -4, 8), (1, 4, 0), (1, 4, 8, (2, 2))])
def test_bad_block(fields):
    with pytest.raises(ValueError, match=r"must be at least 1, got|a block has 3 ranks"):
        BlockSpec(*fields)


def test_with_ranks():
    spec = ViTSpec(**SMALL, depth=2)
    ranks = (1, None, 2, 3, 4, None)
    assert spec.with_ranks(ranks).ranks == ranks
    assert spec.with_ranks(ranks).with_ranks((None,) * 6) == spec
    with pytest.raises(ValueError, match="expected 6 ranks, got 5"):
        spec.with_ranks(ranks[:5])


def test_deit_sizes():
    assert (flora.deit("small").embed_dim, flora.deit("small").num_heads) == (384, 6)
    assert flora.deit("tiny", num_classes=7, embed_dim=96).embed_dim == 96
    with pytest.raises(ValueError, match="unknown DeiT size 'huge'; choose one of tiny, small"):
        flora.deit("huge")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 9, 3), np.float32), r"shape \(2, 8, 9, 3\); expected \[B, 8, 8, 3\]"),
        (np.zeros((2, 3, 8, 8), np.float32), r"expected \[B, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.float32), r"shape \(8, 8, 3\); expected"),
        (np.zeros((2, 8, 8, 3), np.uint8), "dtype uint8; expected normalised floating point"),
    ],
)
def test_bad_images(tiny_model, images, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(images)


def test_create_is_a_function_of_the_seed(tiny_spec):
    first, again, other = (functional.split(flora.create(tiny_spec, seed))[1] for seed in (3, 3, 4))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        random = name.endswith(("kernel", "cls_token", "pos_embed"))
        assert (value == other[name]).all() == (not random)


def test_abstract_model(tiny_spec, tiny_model):
    abstract = functional.split(create_abstract(tiny_spec))[1]
    real = functional.split(tiny_model)[1]
    assert all(isinstance(shape, jax.ShapeDtypeStruct) for shape in abstract.values())
    assert {name: (s.shape, s.dtype) for name, s in abstract.items()} == {
        name: (p.shape, p.dtype) for name, p in real.items()
    }


def test_parameters_are_named_by_dotted_paths(tiny_spec, tiny_model):
    structure, parameters = functional.split(tiny_model)
    assert parameters["blocks.1.attn.qkv.kernel"] is not None
    assert parameters.keys() >= {f"{layer.name}.bias" for layer in tiny_spec.layers}
    again = functional.split(functional.merge(structure, parameters))
    assert again[0] == structure
    assert hash(again[0]) == hash(structure)
    assert all(again[1][name] is value for name, value in parameters.items())


def test_with_parameters_of_another_model(tiny_model):
    parameters = functional.split(tiny_model)[1]
    renamed = parameters | {"extra": np.zeros(3)}
    del renamed["head.bias"]
    with pytest.raises(ValueError, match=r"missing \['head.bias'\], unexpected \['extra'\]"):
        functional.with_parameters(tiny_model, renamed)
    with pytest.raises(ValueError, match=r"head.bias has shape \(4,\), expected \(3,\)"):
        functional.with_parameters(tiny_model, parameters | {"head.bias": np.zeros(4)})


@settings(max_examples=25)
@given(spec=vit_specs() | swin_specs())
def test_spec_survives_json(spec):
    again = spec_from_json(json.loads(json.dumps(spec_to_json(spec))))
    assert again == spec
    assert hash(again) == hash(spec)


def test_unknown_json():
    value = spec_to_json(ViTSpec(**SMALL, depth=1))
    with pytest.raises(ValueError, match="unknown model family 'resnet'; known: vit, swin"):
        spec_from_json(value | {"family": "resnet"})
    with pytest.raises(ValueError, match="unknown model family None"):
        spec_from_json({})
    with pytest.raises(ValueError, match="ViTSpec has no field dropout"):
        spec_from_json(value | {"gates": 1, "dropout": 0.1})
    with pytest.raises(
        ValueError, match=r"ViTSpec has no field num_head \(did you mean 'num_heads'\?\)"
    ):
        spec_from_json(value | {"num_head": 1})


@pytest.mark.parametrize("block", [{"gates": 1}, {"ranks": None}])
def test_unknown_json_of_a_block(block):
    value = spec_to_json(ViTSpec(**SMALL, depth=1))
    changed = {name: v for name, v in (value["blocks"][0] | block).items() if v is not None}
    with pytest.raises(ValueError, match=r"BlockSpec|a block has 3 ranks"):
        spec_from_json(value | {"blocks": [changed]})
