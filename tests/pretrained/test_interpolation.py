"""Positions at another image size: each library's own interpolation of the weights it wrote."""

import dataclasses

import numpy as np
import pytest

import flora_jax as flora
from flora_jax.models import functional
from flora_jax.weights import layouts
from flora_jax.weights.resample import resample_pos_embed
from tests.helpers import modern
from tests.helpers.networks import logits
from tests.helpers.weights import SWINS, VITS, random_model, written

# Four patches more a side are two windows, one in the second stage.
ABSOLUTE = dataclasses.replace(SWINS["absolute"], window_size=2, depths=(1, 1), blocks=())
# Of networks of transformers; None: with antialiasing, as timm does it.
OFFSETS = {
    "vit": 0.0,
    "deit": 0.0,
    "dinov2": 0.0,
    "dinov2_with_registers": None,
    "siglip": 0.0,
    "clip": 0.0,
    "dinov2_release": 0.1,
}
OF_FILES = {
    "hf_clip": 0.0,
    "hf_deit_one_head": 0.0,
    "hf_dinov2": 0.0,
    "hf_dinov2_classifier": 0.0,
    "hf_dinov2_registers": None,
    "hf_siglip": 0.0,
    "hf_vit_no_head": 0.0,
    "timm_dinov2": None,
    "timm_dinov2_registers": None,
    "timm_siglip": None,
}


@pytest.mark.parametrize("grid", [3, 8])
@pytest.mark.parametrize("name", OFFSETS)
def test_a_grid_becomes_that_of_its_library(data_dir, name, grid):
    with np.load(data_dir / "resample_transformers.npz") as golden:
        ours = resample_pos_embed(golden["grid_5"], 0, grid, OFFSETS[name])
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, golden[f"{name}_{grid}"], atol=5e-6, rtol=0)


def both(arrays, spec) -> tuple[np.ndarray, np.ndarray]:
    """The table of positions at the size of the weights, and at four patches a side more."""
    size = spec.image_size + 4 * spec.patch_size
    specs = spec, dataclasses.replace(spec, image_size=size, blocks=())
    models = [functional.split(flora.from_state_dict(arrays, each))[1] for each in specs]
    (name,) = {"pos_embed", "absolute_pos_embed"} & models[0].keys()
    before, after = (np.asarray(parameters[name]) for parameters in models)
    return before, after


def resampled(table, spec, offset) -> np.ndarray:
    side = spec.image_size // spec.patch_size
    return resample_pos_embed(table, len(table) - side**2, side + 4, offset)


@pytest.mark.parametrize("name", OF_FILES)
def test_the_names_in_a_file_say_which(name):
    spec, offset = modern.SPECS[name], OF_FILES[name]
    before, after = both(modern.arrays(name), spec)
    np.testing.assert_array_equal(after, resampled(before, spec, offset))
    other = resampled(before, spec, 0.0 if offset is None else None)
    assert abs(after - other).max() > 1e-3


def test_a_release_of_dinov2_keeps_its_mask_token():
    spec = modern.SPECS["timm_dinov2"]
    mask = {"mask_token": np.ones((1, spec.embed_dim), np.float32)}
    before, after = both(modern.arrays("timm_dinov2") | mask, spec)
    np.testing.assert_array_equal(after, resampled(before, spec, 0.1))
    spec = modern.SPECS["timm_dinov2_registers"]
    arrays = modern.arrays("timm_dinov2_registers") | mask
    arrays["register_tokens"] = arrays.pop("reg_token")
    first = np.zeros_like(arrays["pos_embed"][:, :1])
    arrays["pos_embed"] = np.concatenate([first, arrays["pos_embed"]], axis=1)
    before, after = both(arrays, spec)
    np.testing.assert_array_equal(after, resampled(before, spec, None))


@pytest.mark.parametrize(
    ("spec", "table", "offset"),
    [
        (ABSOLUTE, layouts.timm, None),
        (ABSOLUTE, layouts.hugging_face_swin, 0.0),
        (VITS["vit"], layouts.own, None),
    ],
)
def test_swins_and_names_of_our_own(spec, table, offset):
    before, after = both(written(random_model(spec), table), spec)
    np.testing.assert_array_equal(after, resampled(before, spec, offset))


@pytest.mark.slow
@pytest.mark.parametrize("grid", [3, 7])
@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters", "ViT", "SiglipVision"])
def test_features_are_those_of_transformers(tmp_path, kind, grid):
    torch = pytest.importorskip("torch", reason="transformers computes with torch")
    transformers = pytest.importorskip("transformers", reason="its own interpolation")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        image_size=40, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=96,
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "position_embedding" in name:
                parameter.copy_(torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path)
    spec = dataclasses.replace(flora.read_spec(tmp_path), image_size=8 * grid)
    images = np.random.default_rng(0).normal(size=(2, 8 * grid, 8 * grid, 3)).astype(np.float32)
    options = {} if kind.startswith("Dinov2") else {"interpolate_pos_encoding": True}
    with torch.inference_mode():
        output = theirs(torch.tensor(images.transpose(0, 3, 1, 2)), **options)
    ours = logits(flora.from_pretrained(tmp_path, spec), images)
    is_pooled = kind != "ViT"  # whose pooler is a layer of its own
    wanted = output.pooler_output if is_pooled else output.last_hidden_state[:, 0]
    np.testing.assert_allclose(ours, wanted.numpy(), atol=1e-4, rtol=0)
