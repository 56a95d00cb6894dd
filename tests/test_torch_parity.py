"""Logits beside those of the models of transformers, timm and the published subnets, both ways."""

import numpy as np
import pytest

import flora_jax as flora
from flora_jax.weights.export.pytorch import load_export
from flora_jax.weights.export.timm import export_timm
from flora_jax.weights.metadata.spec import spec_of_config
from flora_jax.weights.pretrained import from_pretrained, from_state_dict
from tests.helpers.torch_models import TOLERANCE, images, randomise, torch, torch_logits
from tests.helpers.weights import assert_same

load_file = pytest.importorskip("safetensors.torch").load_file

pytestmark = pytest.mark.slow


def _vit_size(image_size, patch_size, width, depth):
    sizes = {"image_size": image_size, "patch_size": patch_size, "hidden_size": width}
    layers = {"num_hidden_layers": depth, "num_attention_heads": 3, "intermediate_size": 4 * width}
    return sizes | layers


VIT_SIZES = {"micro": _vit_size(32, 8, 48, 3), "tiny": _vit_size(224, 16, 192, 12)}
_SWIN_STAGES = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
SWIN_SIZES = {
    "micro": {"image_size": 32, "patch_size": 2, "use_absolute_embeddings": True} | _SWIN_STAGES,
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
    assert_same(from_state_dict(arrays_of(reference), spec), model)


def arrays_of(reference) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in reference.state_dict().items()}


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
        (
            "BeitModel",
            "BeitConfig",
            {"use_shared_relative_position_bias": True, "use_mean_pooling": False},
        ),
        (
            "BeitForImageClassification",
            "BeitConfig",
            {"use_absolute_position_embeddings": True, "use_mask_token": True},
        ),
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
        assert network.spec.outputs == "embedding"
        given, expected = network(batch), output.image_embeds
    else:
        given, expected = network.features(batch), output.last_hidden_state
    np.testing.assert_allclose(given, expected.numpy(), **TOLERANCE)

    assert_same(from_state_dict(arrays_of(reference), network.spec), network)


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


@pytest.mark.parametrize("image_size", [64, 256])
def test_hugging_face_swin_v2(transformers, tmp_path, image_size):
    """The spec comes from config.json; at 256 it is the most downloaded Swin V2."""
    options = _SWIN_STAGES if image_size == 64 else {"window_size": 8}
    config = transformers.Swinv2Config(**options, image_size=image_size, num_labels=10)
    reference = transformers.Swinv2ForImageClassification(config)
    spec = spec_of_config(config.to_dict() | {"architectures": [type(reference).__name__]})
    assert_parity(reference, spec, tmp_path, count=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_patch16_224", {"qkv_bias": False}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
        ("swin_tiny_patch4_window7_224", {}),
        ("swinv2_tiny_window8_256", {}),  # some windows need padding
        ("swinv2_base_window12to16_192to256", {"img_size": 256}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_base_patch16_siglip_224", {}),
        ("deit3_small_patch16_224", {}),
        ("vit_base_patch16_clip_quickgelu_224", {}),
        ("eva02_small_patch14_336", {}),
        ("eva02_base_patch14_224", {"num_classes": 10}),
        ("eva02_large_patch14_224", {"depth": 1}),
        ("beitv2_base_patch16_224", {}),
        ("vit_pe_core_small_patch16_384", {}),
        ("vit_pe_core_gigantic_patch14_448", {"depth": 1}),
    ],
)
def test_full_size_models_of_timm(tmp_path, name, options):
    """In from timm's names and config; out to a file that timm takes, LayerScale being ones."""
    timm = pytest.importorskip("timm", reason="compares with the models of timm")
    options = {"img_size": 224} | options
    reference = timm.create_model(name, **options)
    randomise(reference)
    config = {
        "architecture": name,
        "num_classes": reference.num_classes,
        "global_pool": reference.global_pool,
        "pretrained_cfg": reference.pretrained_cfg,
        "model_args": options,
    }
    spec = spec_of_config(config)
    batch = images(spec, 1)
    expected = torch_logits(reference, batch)
    arrays = arrays_of(reference)
    model = from_state_dict(arrays, spec)
    np.testing.assert_allclose(model(batch), expected, **TOLERANCE)
    scales = sum(a.size for n, a in arrays.items() if "gamma" in n)
    assert flora.num_params(spec) == sum(p.numel() for p in reference.parameters()) - scales

    export_timm(model, tmp_path / "exported.safetensors")
    again = timm.create_model(name, **options)
    again.load_state_dict(load_file(tmp_path / "exported.safetensors"), strict=True)
    np.testing.assert_allclose(torch_logits(again, batch), expected, **TOLERANCE)


# --- the names of the published subnets -----------------------------------------------------------


def our_name(published: str) -> str:
    """The name in `model.py` of `flora.export_torch`."""
    name = published.replace(".VT.", ".down.").replace(".U.", ".up.").replace(".fc.", ".")
    return name.replace("patch_embed.proj.", "patch_embed.")


@pytest.mark.parametrize("config", range(7))  # the golden's last one is dense throughout
def test_exported_subnet_in_pytorch(micro_model, micro_space, micro_genes, tmp_path, config):
    """Its layers are torch's, in low rank two Linears: VT, then U with the bias."""
    subnet = flora.extract(flora.factorize(micro_model, micro_space), micro_genes[config])
    assert any(rank is not None for rank in subnet.spec.ranks)
    export_timm(subnet, tmp_path / "subnet.safetensors")
    flora.export_torch(subnet, tmp_path / "torch")
    plain, arrays = load_export(tmp_path / "torch"), load_file(tmp_path / "subnet.safetensors")
    for name in ("cls_token", "pos_embed"):
        arrays[name] = arrays[name].squeeze(0)
    plain.load_state_dict({our_name(name): array for name, array in arrays.items()}, strict=True)
    batch = images(subnet.spec, 3)
    np.testing.assert_allclose(subnet(batch), torch_logits(plain, batch), **TOLERANCE)
