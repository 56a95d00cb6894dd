"""The ViTs of today, all of one spec: outputs of their libraries, and what is made of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import flora_jax as flora
from flora_jax import slim
from flora_jax.models import functional
from flora_jax.models.network import Loop
from flora_jax.weights.export.timm import export_timm
from flora_jax.weights.load_parameters import NotFiniteWarning
from flora_jax.weights.metadata.spec import spec_of_config
from flora_jax.weights.resample import resample_relative_position_table
from flora_jax.weights.state_dict import read_state_dict
from tests.helpers import modern
from tests.helpers.networks import logits, random_model, size
from tests.helpers.slimming import gated_model, random_masks
from tests.helpers.weights import assert_same

NAMES = list(modern.SPECS)
TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_library(name):
    golden, model = modern.golden(name), modern.model(name)
    given, tokens = modern.output(name), model.features(modern.images(name))
    if "output" in golden:
        assert np.std(golden["output"]) > 0.01
        np.testing.assert_allclose(given, golden["output"], **TOLERANCE)
    if "pooled" in golden:
        np.testing.assert_allclose(given, golden["pooled"], **TOLERANCE)
    if "tokens" in golden:
        expected = golden["tokens"]
        if name == "hf_clip":  # transformers gives CLIP's tokens as they are before the last norm
            expected = model.norm(expected.reshape(-1, 48)).reshape(expected.shape)
        np.testing.assert_allclose(tokens, expected, **TOLERANCE)
        assert {"output", "pooled"} & golden.keys() or np.allclose(given, tokens[:, 0])


@pytest.mark.parametrize("name", NAMES)
def test_supernet_and_the_subnets_cut_out_of_it(name):
    """Full rank is the dense model; what is extracted is the supernet at its genes."""
    model, images = modern.model(name), modern.images(name)
    space = flora.RankSpace.regular(model.spec, ratios=(1 / 3, 1))
    supernet = flora.factorize(model, space, implementation="masked")
    structure, parameters = functional.split(supernet.network)

    def at(genes):
        return functional.merge(structure, parameters, jnp.asarray(genes))(images)

    dense = modern.output(name)
    np.testing.assert_allclose(at(space.full_rank_genes), dense, **TOLERANCE)
    for genes in space.sample(np.random.default_rng(1), 2, "uniform"):
        subnet = flora.extract(supernet, genes)
        given = subnet(images)
        np.testing.assert_allclose(given, at(genes), **TOLERANCE)
        assert abs(given - dense).max() > 1e-2
        assert flora.macs(subnet.spec) == space.macs(genes)
        assert flora.num_params(subnet.spec) == space.params(genes)


# Not those that differ from another in their classifier, activation or eps alone.
@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in ("timm_augreg_no_head", "timm_clip", "hf_siglip")]
)
def test_slimmed_is_masked(name):
    spec = modern.shallow(name, depth=2)
    gated = gated_model(spec)
    assert gated.has_token_gates == (name not in modern.TOKENS_STAY)
    masks = random_masks(spec, np.random.default_rng(3), tokens=False)
    if gated.has_token_gates:
        of_tokens = random_masks(spec, np.random.default_rng(4))
        masks = dataclasses.replace(masks, patch=of_tokens.patch)
    masked = slim.apply_masks(gated, masks)
    small = slim.extract(gated, masks, fold=False, tile=3)
    images = modern.images(name)[:2]
    np.testing.assert_allclose(logits(small, images), logits(masked, images), **TOLERANCE)
    assert size(small) == flora.num_params(small.spec)


@pytest.mark.parametrize("name", NAMES)
def test_costs(name, count_macs):
    """Products counted in the program; a norm is one multiply-add a value, other things none."""
    model = modern.model(name)
    spec = model.spec
    structure, parameters = functional.split(model)
    image = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    program = jax.make_jaxpr(lambda p, x: functional.merge(structure, p)(x))(parameters, image)
    tokens = spec.num_tokens
    normalised = 2 * spec.depth * tokens + spec.pre_norm * tokens
    if spec.pool == "token" or spec.normalises_pooled:
        normalised += 1
    else:
        normalised += tokens + (spec.pool == "attention")
    of_mlps = spec.mlp_norm * spec.depth * tokens * spec.mlp_dim
    assert flora.macs(spec) == count_macs(program) + normalised * spec.embed_dim + of_mlps

    stored = {
        n: a.size
        for n, a in modern.arrays(name).items()
        if "mask_token" not in n and "pooler.dense" not in n
    }
    folded = [n for n in stored if "lambda" in n or "gamma" in n]
    # DINOv2 stores the class token's position, which reading adds to the token.
    positions = spec.embed_dim if name == "hf_dinov2_registers" else 0
    expected = sum(stored.values()) - sum(stored[n] for n in folded) - positions
    assert flora.num_params(spec) == expected == size(model)
    assert bool(folded) == spec.layer_scale


@pytest.mark.parametrize("name", NAMES)
def test_export_and_back(name, tmp_path):
    model, path = modern.model(name), tmp_path / "timm.safetensors"
    export_timm(model, path)
    assert_same(flora.from_pretrained(path, model.spec), model)
    if name.startswith("timm"):
        theirs = modern.arrays(name)
        written = read_state_dict(path)
        assert {n: a.shape for n, a in written.items()} == {n: a.shape for n, a in theirs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_needs_no_spec(name, tmp_path):
    config = modern.config(name)
    if "model" in config:  # timm: what its save_for_hf writes
        config = {"architecture": f"{config['model']}.tag", "model_args": config["arguments"]}
    else:
        config = config["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(modern.arrays(name), tmp_path / "model.safetensors")
    assert flora.read_spec(tmp_path) == modern.SPECS[name]
    assert_same(flora.from_pretrained(tmp_path), modern.model(name))
    with pytest.raises(
        ValueError, match=r"contradicts the spec: layer_norm_eps is 1e-.*, and 0\.1"
    ):
        flora.from_pretrained(tmp_path, dataclasses.replace(modern.SPECS[name], layer_norm_eps=0.1))


@pytest.mark.parametrize("prefix", ["net.", "module.vit.", "student.0.", "encoder.layers."])
def test_any_prefix(prefix):
    for name in ("timm_deit3", "timm_dinov3", *(name for name in NAMES if name.startswith("hf"))):
        prefixed = {prefix + key: array for key, array in modern.arrays(name).items()}
        assert_same(flora.from_state_dict(prefixed, modern.SPECS[name]), modern.model(name))


@pytest.mark.parametrize("prefix", ["", "model.clip."])
def test_the_images_half_of_clip(prefix):
    arrays, words = modern.arrays("hf_clip"), np.zeros((5, 48), np.float32)
    texts = {"text_model.embeddings.token_embedding.weight": words, "text_projection.weight": words}
    texts |= {k.replace("vision", "text"): a for k, a in arrays.items() if "encoder.layers" in k}
    both = {prefix + key: array for key, array in (texts | arrays).items()}
    assert_same(flora.from_state_dict(both, modern.SPECS["hf_clip"]), modern.model("hf_clip"))


@pytest.mark.parametrize(
    ("name", "ending", "message"),
    [
        ("timm_deit3", "blocks.1.ls2.gamma", r"\(49,\) in the file, and \(48,\)"),
        ("hf_siglip", "attention.in_proj_weight", r"\(145, 48\) in the file, and \(144, 48\)"),
        ("hf_siglip", "attention.in_proj_bias", r"\(145,\) in the file, and \(144,\)"),
        ("hf_dinov2_registers", "position_embeddings", r"\(2, 10, 48\) in .*, and \(1, 10, 48\)"),
        ("hf_dinov3", "layer.0.attention.v_proj.bias", r"\(49,\) in the file, and \(48,\)"),
        ("hf_clip", "embeddings.class_embedding", r"\(49,\) in the file, and \(48,\)"),
    ],
)
def test_an_array_of_another_shape(name, ending, message):
    arrays = modern.arrays(name)
    (key,) = (key for key in arrays if key.endswith(ending))
    arrays[key] = np.concatenate([arrays[key], arrays[key][:1]])
    with pytest.raises(ValueError, match=f"{ending} has shape {message} in the spec"):
        flora.from_state_dict(arrays, modern.SPECS[name])


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("hf_siglip", "attention.in_proj_weight"),
        ("hf_dinov2_registers", "position_embeddings"),
        ("hf_dinov2", "layer.1.layer_scale1.lambda1"),
    ],
)
def test_values_of_rows_that_share_them(name, ending):
    arrays = modern.arrays(name)
    (key,) = (key for key in arrays if key.endswith(ending))
    arrays[key] = np.full_like(arrays[key], np.inf)
    with pytest.warns(NotFiniteWarning, match=f"NaN or infinite as float32: .*{ending}"):
        flora.from_state_dict(arrays, modern.SPECS[name])


@pytest.mark.parametrize("name", ["timm_dinov3_swiglu", "timm_eva02", "timm_pe", "timm_beitv2"])
def test_a_subnet_is_exported_and_read(name, tmp_path):
    """Scales are folded, rotary pairs put in another order, biases without a key's."""
    model = modern.model(name)
    space = flora.RankSpace.regular(model.spec, ratios=(1 / 3, 1))
    subnet = flora.extract(flora.factorize(model, space), np.arange(space.num_layers) % 2)
    export_timm(subnet, tmp_path / "x.safetensors")
    assert_same(flora.from_pretrained(tmp_path / "x.safetensors", model.spec), subnet)


def test_rotary_dimensions_leave_in_pairs():
    spec = modern.SPECS["timm_dinov3"]
    gated = slim.add_gates(modern.model("timm_dinov3"))
    masks = slim.threshold(gated)
    attn = [mask.copy() for mask in masks.attn]
    attn[1][0, 3] = False
    halved = dataclasses.replace(masks, attn=tuple(attn))
    with pytest.raises(ValueError, match="mask of block 1 parts dimensions i and i"):
        slim.extract(gated, halved)
    attn[1][0, 11] = False
    attn[2][1:, 7] = attn[2][1:, 15] = False
    attn[2][0] = False
    cut = slim.cut_spec(spec, dataclasses.replace(masks, attn=tuple(attn)))
    assert cut.blocks[0] == spec.blocks[0]
    assert cut.blocks[1].rotary_pairs[:2] == ((0, 1, 2, 4, 5, 6, 7, 3), (*range(8),))
    assert cut.blocks[2].rotary_pairs == ((*range(7),),) * 2
    assert (cut.blocks[2].num_heads, cut.blocks[2].head_dim) == (2, 14)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("timm_siglip", {}, "the pool attends to every patch"),
        ("hf_dinov2_classifier", {}, "the mean over all patches"),
        ("hf_dinov3", {"k_bias": True}, "rotary positions turn the keys' bias.*k_bias=False"),
    ],
)
def test_why_tokens_stay(name, changes, reason):
    spec = dataclasses.replace(modern.SPECS[name], **changes)
    with pytest.raises(ValueError, match=reason):
        slim.abstract_gated(spec, tokens=True)
    fewer = dataclasses.replace(spec.blocks[0], tokens=tuple(range(spec.num_tokens - 1)))
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(spec, blocks=(fewer,) * spec.depth)


@pytest.mark.parametrize("name", ["hf_dinov3", "timm_dinov3_swiglu"])
def test_flora_on_a_slimmed_network(name, tmp_path):
    """Calibration, sliced layers, the loop over blocks, saving: on heads that lost pairs."""
    gated, images = gated_model(modern.shallow(name, depth=1)), modern.images(name)
    patch = 0.6 if gated.has_token_gates else 1
    small = slim.extract(gated, slim.threshold(gated, attn=0.6, mlp=0.6, patch=patch))
    assert all(block.rotary_pairs for block in small.spec.blocks)
    dense = logits(small, images)
    space = flora.RankSpace.regular(small.spec, ratios=(1 / 3, 1))
    supernet = flora.factorize(
        small, space, calibration=flora.calibrate(small, images), implementation="sliced"
    )
    genes = np.arange(space.num_layers) % 2
    np.testing.assert_allclose(supernet(images, space.full_rank_genes), dense, **TOLERANCE)
    subnet = flora.extract(supernet, genes)
    expected = supernet(images, genes)
    assert abs(expected - dense).max() > 1e-2
    flora.save(subnet, tmp_path)
    again = flora.load(tmp_path)
    assert again.spec == subnet.spec
    given = again(images, Loop()) if gated.has_token_gates else logits(again, images)
    np.testing.assert_allclose(given, expected, **TOLERANCE)


def test_a_network_without_a_classifier():
    """It is allocated by the error of its features; what needs classes says so."""
    model = random_model(modern.shallow("timm_dinov2", depth=1))
    images = modern.images("timm_dinov2")
    space = flora.RankSpace.regular(model.spec, ratios=(1 / 3, 1))
    supernet = flora.factorize(model, space, implementation="masked")
    with pytest.raises(ValueError, match="measure 'divergence' needs a classifier"):
        flora.allocate(supernet, images, macs=space.macs_range()[1], measure="divergence")
    genes = flora.allocate(supernet, images, macs=space.macs_range()[1])
    np.testing.assert_array_equal(genes, space.full_rank_genes)
    batch = {"image": np.zeros((3, 42, 42, 3), np.uint8), "label": np.zeros(3, np.int32)}
    batches = [batch | {"mask": np.ones(3, np.float32)}]
    evaluation_set = flora.EvaluationSet(batches, flora.Normalization())
    with pytest.raises(ValueError, match=r"top1 needs a classifier, .* num_classes is 0"):
        flora.top1(model, evaluation_set)


def test_gates_on_both_sides_of_a_norm_are_folded():
    gated, images = gated_model(modern.shallow("timm_eva02", depth=2)), modern.images("timm_eva02")
    whole = slim.threshold(gated, attn=1, mlp=1)
    expected = logits(gated, images)
    assert abs(expected - logits(random_model(gated.spec), images)).max() > 1e-2
    np.testing.assert_allclose(logits(slim.extract(gated, whole), images), expected, **TOLERANCE)


def test_names_of_the_release_of_eva02():
    names = {"q_proj.bias": "q_bias", "v_proj.bias": "v_bias", "fc1_g": "w1", "fc1_x": "w2"}
    names |= {"mlp.norm": "mlp.ffn_ln", "mlp.fc2": "mlp.w3"}
    released = {f"{at}rope.freqs_cos": np.ones(2) for at in ("", "blocks.0.attn.")}
    for name, array in modern.arrays("timm_eva02").items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        released[name] = array
    model = flora.from_state_dict(released, modern.SPECS["timm_eva02"])
    assert_same(model, modern.model("timm_eva02"))


def test_a_table_that_all_blocks_share():
    arrays = modern.arrays("timm_beitv2")
    table = "relative_position_bias_table"
    shared = {n: a for n, a in arrays.items() if not n.endswith(table)}
    shared[f"rel_pos_bias.{table}"] = arrays[f"blocks.1.attn.{table}"]
    model = flora.from_state_dict(shared, modern.SPECS["timm_beitv2"])
    expected = {
        n: arrays[f"blocks.1.attn.{table}"] if n.endswith(table) else a for n, a in arrays.items()
    }
    assert_same(model, flora.from_state_dict(expected, modern.SPECS["timm_beitv2"]))


def test_relative_positions_of_another_grid():
    """Those of patches are interpolated as Swin's, those of the class token stay."""
    larger = dataclasses.replace(modern.SPECS["timm_beitv2"], image_size=48)
    model = flora.from_state_dict(modern.arrays("timm_beitv2"), larger)
    for i, block in enumerate(model.blocks):
        given = modern.arrays("timm_beitv2")[f"blocks.{i}.attn.relative_position_bias_table"]
        expected = resample_relative_position_table(given[:-3], 6)
        found = block.attn.relative_position_bias_table
        np.testing.assert_array_equal(found, np.concatenate([expected, given[-3:]]))


@pytest.mark.parametrize("changes", [{"num_registers": 1}, {"distilled": True, "pool": "token"}])
def test_relative_positions_know_one_token_before_the_patches(changes):
    with pytest.raises(ValueError, match="relative_positions=True is of the patches and a class"):
        dataclasses.replace(modern.SPECS["timm_beitv2"], **changes)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("eva02_large_patch14_448.mim_in22k_ft_in1k", {"image_size": 448, "mlp_dim": 2730}),
        ("eva02_small_patch14_336.mim_in22k_ft_in1k", {"mlp_norm": False, "rope_grid": 16}),
        ("beit_large_patch16_512.in22k_ft_in22k_in1k", {"num_relative_positions": 63**2 + 3}),
        ("vit_pe_core_large_patch14_336.fb", {"rope_grid": 24, "outputs": "embedding"}),
        ("vit_pe_core_gigantic_patch14_448.fb", {"rope_offset": 0, "mlp_dim": 8960}),
    ],
)
def test_what_a_name_of_timm_says(architecture, fields):
    size = int(architecture.partition(".")[0].rpartition("_")[2])
    config = {"architecture": architecture, "pretrained_cfg": {"input_size": [3, size, size]}}
    spec = spec_of_config(config | {"num_classes": 1024})
    assert {name: getattr(spec, name) for name in fields} == fields


def test_towers_that_are_not_read():
    for name in ("eva02_base_patch16_clip_224", "vit_pe_spatial_base_patch16_512"):
        with pytest.raises(
            ValueError, match=f"unknown kind of eva02: 'clip_224'|{name!r} is not a"
        ):
            spec_of_config({"architecture": name})


def test_a_norm_of_hidden_units_needs_a_gate():
    with pytest.raises(ValueError, match="mlp_norm=True needs gated_mlp=True"):
        dataclasses.replace(modern.SPECS["timm_deit3"], mlp_norm=True)


def test_registers_stay():
    spec = modern.SPECS["timm_dinov2_registers"]
    gated = gated_model(spec)
    masks = slim.threshold(gated, attn=0.5, mlp=0.5, patch=0.1)
    kept = np.array(masks.patch)
    assert kept[:, :5].all()
    assert not kept[:, 5:].all()
    small = slim.extract(gated, masks)
    assert small.pos_embed.shape == (kept[0].sum() - 5, 48)
