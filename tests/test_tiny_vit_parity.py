"""TinyViTs beside those of timm, whose batch norms are folded here and written as ones again."""

import json

import numpy as np
import pytest

import flora_jax as flora
from flora_jax.weights.export.timm import export_timm
from tests.helpers.networks import images_of, logits
from tests.helpers.torch_models import randomise, torch, torch_logits

files = pytest.importorskip("safetensors.torch")
timm = pytest.importorskip("timm", reason="compares with the models of timm")

pytestmark = pytest.mark.slow
CLASSES = {"num_classes": 10}
SHALLOW = {"num_classes": 10, "depths": (1, 1, 1, 1)}


def randomised(name, **options):
    """With batch norms that have seen data: without, those of MBConvs give zeros."""
    network = timm.create_model(name, **options)
    randomise(network)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5, generator=generator)
                norm.bias.normal_(0, 0.2, generator=generator)
                norm.running_mean.normal_(0, 0.2, generator=generator)
                norm.running_var.uniform_(0.2, 2, generator=generator)
    return network


def arrays_of(network):
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def assert_close(given, expected):
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "tiny_vit_21m_224"])
def test_a_folder_of_timm(tmp_path, name):
    network = randomised(name, **CLASSES)
    config = {
        "architecture": name,
        "pretrained_cfg": network.pretrained_cfg,
        **CLASSES,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    files.save_file(network.state_dict(), tmp_path / "model.safetensors")
    model = flora.from_pretrained(tmp_path)
    images = images_of(model.spec, 1)
    assert_close(logits(model, images), torch_logits(network, images))
    scales = sum(p.numel() for n, p in network.named_parameters() if n.endswith("bn.weight"))
    assert flora.num_params(model.spec) == sum(p.numel() for p in network.parameters()) - scales


@pytest.mark.parametrize("size", ["5m", "21m"])
def test_windows_interpolated_to_larger_images(size):
    name, windows = f"tiny_vit_{size}_224", (12, 12, 24, 12)
    network = randomised(name, **CLASSES)
    larger = timm.create_model(name, window_sizes=windows, **CLASSES)
    larger.load_state_dict(timm.models.tiny_vit.checkpoint_filter_fn(network.state_dict(), larger))
    spec = flora.tiny_vit(size, 384, **CLASSES)
    assert spec.window_sizes == windows
    model = flora.from_state_dict(arrays_of(network), spec)
    images = images_of(spec, 1)
    assert_close(logits(model, images), torch_logits(larger, images))


def test_windows_that_do_not_tile_and_an_export_back_to_timm(tmp_path):
    network = randomised("tiny_vit_5m_224", **SHALLOW)
    maps_of_25_13_7 = {"image_size": 200, "window_sizes": (7, 7, 14, 7)}
    spec = flora.tiny_vit("5m", **maps_of_25_13_7, **SHALLOW)
    model = flora.from_state_dict(arrays_of(network), spec)
    images = images_of(spec, 1)
    expected = torch_logits(network, images)
    assert_close(logits(model, images), expected)

    export_timm(model, tmp_path / "exported.safetensors")
    again = timm.create_model("tiny_vit_5m_224", **SHALLOW)
    again.load_state_dict(files.load_file(tmp_path / "exported.safetensors"), strict=True)
    assert_close(torch_logits(again, images), expected)
