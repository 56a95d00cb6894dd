"""Logits beside those of the models of transformers and timm."""

import numpy as np
import pytest

import flora_jax as flora
from flora_jax.models import functional
from flora_jax.weights.export.timm import export_timm
from flora_jax.weights.metadata.spec import spec_of_config
from flora_jax.weights.pretrained import from_pretrained, from_state_dict
from tests.helpers.torch_models import TOLERANCE, images, randomise, torch, torch_logits

load_file = pytest.importorskip("safetensors.torch").load_file

pytestmark = pytest.mark.slow


VIT_SIZES = {
    "micro": {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 192,
    },
    "tiny": {
        "image_size": 224,
        "patch_size": 16,
        "hidden_size": 192,
        "num_hidden_layers": 12,
        "num_attention_heads": 3,
        "intermediate_size": 768,
    },
}
SWIN_SIZES = {
    "micro": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 24,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
        "use_absolute_embeddings": True,
    },
    "tiny": {},  # the defaults are Swin-T
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="compares with the models of transformers")


def assert_parity(reference, spec, folder, count: int) -> None:
    """Through the file that transformers writes, and through the names it has in memory."""
    randomise(reference)
    batch = images(spec, count)
    expected = torch_logits(reference, batch)
    assert np.std(expected) > 0.01
    reference.save_pretrained(folder)
    model = from_pretrained(folder, spec)
    np.testing.assert_allclose(model(batch), expected, **TOLERANCE)

    arrays = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    again = functional.split(from_state_dict(arrays, spec))[1]
    for name, parameter in functional.split(model)[1].items():
        np.testing.assert_array_equal(parameter, again[name])


@pytest.mark.parametrize("size", VIT_SIZES)
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("distilled", [False, True])
def test_hugging_face_vit(transformers, tmp_path, size, qkv_bias, distilled):
    if distilled:
        config_class = transformers.DeiTConfig
        model_class = transformers.DeiTForImageClassificationWithTeacher
    else:
        config_class, model_class = transformers.ViTConfig, transformers.ViTForImageClassification
    config = config_class(**VIT_SIZES[size], qkv_bias=qkv_bias, num_labels=10)
    spec = flora.ViTSpec(
        image_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_classes=10,
        qkv_bias=qkv_bias,
        distilled=distilled,
        layer_norm_eps=config.layer_norm_eps,
    )
    assert_parity(model_class(config), spec, tmp_path, count=3 if size == "micro" else 1)


@pytest.mark.parametrize(
    ("model", "config", "options"),
    [
        ("Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True}),
        ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {}),
        (
            "DINOv3ViTModel",
            "DINOv3ViTConfig",
            {"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 4},
        ),
        ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {}),
    ],
)
def test_hugging_face_of_today(transformers, tmp_path, model, config, options):
    """The spec comes from config.json, the weights from the file and from memory."""
    made = getattr(transformers, config)(**VIT_SIZES["micro"] | options)
    reference = getattr(transformers, model)(made)
    randomise(reference)
    reference.save_pretrained(tmp_path)
    network = from_pretrained(tmp_path)
    batch = images(network.spec, 3)
    with torch.no_grad():
        output = reference.eval()(torch.tensor(batch.transpose(0, 3, 1, 2)))
    if "Classification" in model:
        given, expected = network(batch), output.logits
    elif "CLIP" in model:
        projection = reference.visual_projection.weight.detach().numpy()
        given, expected = network(batch) @ projection.T, output.image_embeds
    else:
        given, expected = network.features(batch), output.last_hidden_state
    np.testing.assert_allclose(given, expected.numpy(), **TOLERANCE)

    arrays = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    again = functional.split(from_state_dict(arrays, network.spec))[1]
    for name, parameter in functional.split(network)[1].items():
        np.testing.assert_array_equal(parameter, again[name])


@pytest.mark.parametrize("size", SWIN_SIZES)
def test_hugging_face_swin(transformers, tmp_path, size):
    config = transformers.SwinConfig(**SWIN_SIZES[size], num_labels=10)
    spec = flora.SwinSpec(
        image_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depths=tuple(config.depths),
        num_heads=tuple(config.num_heads),
        window_size=config.window_size,
        num_classes=10,
        absolute_pos_embed=config.use_absolute_embeddings,
        layer_norm_eps=config.layer_norm_eps,
    )
    reference = transformers.SwinForImageClassification(config)
    assert_parity(reference, spec, tmp_path, count=3 if size == "micro" else 1)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "vit_base_patch16_siglip_224",
        "deit3_small_patch16_224",
        "vit_base_patch16_clip_quickgelu_224",
    ],
)
def test_full_size_models_of_timm(tmp_path, name):
    """In from timm's names and config; out to a file that timm takes, LayerScale being ones."""
    timm = pytest.importorskip("timm", reason="compares with the models of timm")
    reference = timm.create_model(name, img_size=224)
    randomise(reference)
    config = {
        "architecture": name,
        "num_classes": reference.num_classes,
        "global_pool": reference.global_pool,
        "pretrained_cfg": reference.pretrained_cfg,
        "model_args": {"img_size": 224},
    }
    spec = spec_of_config(config)
    batch = images(spec, 1)
    expected = torch_logits(reference, batch)
    arrays = {n: t.numpy() for n, t in reference.state_dict().items()}
    model = from_state_dict(arrays, spec)
    np.testing.assert_allclose(model(batch), expected, **TOLERANCE)
    scales = sum(a.size for n, a in arrays.items() if "gamma" in n)
    assert flora.num_params(spec) == sum(p.numel() for p in reference.parameters()) - scales

    export_timm(model, tmp_path / "exported.safetensors")
    again = timm.create_model(name, img_size=224)
    again.load_state_dict(load_file(tmp_path / "exported.safetensors"), strict=True)
    np.testing.assert_allclose(torch_logits(again, batch), expected, **TOLERANCE)
