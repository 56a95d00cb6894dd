"""What an exported folder computes in PyTorch: what the model does in JAX."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import flora_jax as flora
from flora_jax.models import functional
from flora_jax.weights.export import pytorch
from tests.helpers import modern
from tests.helpers.compressed import low_rank, slimmed
from tests.helpers.slimming import (
    SHIFTED_SWIN,
    TINY,
    TINY_HYBRID,
    TINY_SWIN,
    images_of,
    logits,
    random_model,
)

TINY_VIT = flora.ViTSpec(depth=3, **TINY)
KINDS = {
    "distilled": lambda: random_model(dataclasses.replace(TINY_VIT, distilled=True)),
    "no bias, grey": lambda: random_model(
        dataclasses.replace(TINY_VIT, qkv_bias=False, in_channels=1)
    ),
    "mean": lambda: random_model(dataclasses.replace(TINY_VIT, pool="mean")),
    "low rank, gated": lambda: low_rank(modern.model("timm_dinov3_swiglu")),
    "slim, tokens stay": lambda: slimmed(modern.shallow("timm_siglip_gap", 1)),
    "slim, rotary": lambda: slimmed(modern.shallow("hf_dinov3", 2)),
    "slim, registers": lambda: slimmed(modern.shallow("timm_dinov2_registers", 2)),
    "low rank on slim": lambda: low_rank(slimmed(TINY_VIT)),
    "swin, shifted": lambda: random_model(SHIFTED_SWIN),
    "swin, low rank on slim": lambda: low_rank(slimmed(TINY_SWIN)),
    "tiny_vit, low rank on slim": lambda: low_rank(
        slimmed(dataclasses.replace(TINY_HYBRID, num_classes=0, in_channels=1))
    ),
}


@pytest.fixture
def in_pytorch(tmp_path, monkeypatch):
    """A function: (model, images [B, H, W, C]) -> output and tokens of what is exported."""
    torch = pytest.importorskip("torch", reason="runs the exported model")
    monkeypatch.setattr(pytorch, "_check_computes_the_same", lambda *_: None)  # it is done here

    def run(model, images):
        flora.export_torch(model, tmp_path)
        network = pytorch._module_of(tmp_path / "model.py").load(tmp_path)
        images = torch.tensor(images.transpose(0, 3, 1, 2))
        with torch.inference_mode():
            output, tokens = network(images).numpy(), network.features(images).numpy()
            assert_close(network(images[:1]).numpy(), output[:1])
            with pytest.raises(ValueError, match=r"images have shape \(.*\), not \(B, "):
                network(images[..., 1:])
        return output, tokens

    return run


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize("name", modern.SPECS)
def test_the_kinds_of_today(name, in_pytorch):
    output, tokens = in_pytorch(modern.model(name), modern.images(name))
    golden = modern.golden(name)
    if "output" not in golden and "pooled" not in golden:
        assert_close(output, golden["tokens"][:, 0])
    else:
        assert_close(output, golden["output" if "output" in golden else "pooled"])
    if "tokens" in golden and name != "hf_clip":  # there they are not normalised yet
        assert_close(tokens, golden["tokens"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_computes_what_jax_does(kind, in_pytorch):
    model = KINDS[kind]()
    images = images_of(model.spec, 5)
    structure, parameters = functional.split(model)

    @jax.jit
    def forward(parameters):
        model = functional.merge(structure, parameters)
        return model(images), model.features(images)

    for actual, expected in zip(in_pytorch(model, images), forward(parameters), strict=True):
        assert_close(actual, np.asarray(expected))


ELSEWHERE = """
import sys
for name in ("jax", "jaxlib", "flax", "flora_jax", "numpy", "etils"):
    sys.modules[name] = None
import importlib
import json
from safetensors.torch import load_file
outputs = {}
for folder in sys.argv[1:]:
    sys.path[:0] = [folder]
    sys.modules.pop("model", None)
    model = importlib.import_module("model").load(folder)
    sys.path.remove(folder)
    outputs[folder] = model(load_file(f"{folder}/images")["images"]).tolist()
print(json.dumps(outputs))
"""


@pytest.mark.slow
def test_a_folder_runs_where_there_is_neither_jax_nor_numpy(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="runs the exported model")
    monkeypatch.setattr(pytorch, "_check_computes_the_same", lambda *_: None)
    expected = {}
    for model in (low_rank(modern.model("hf_dinov3")), random_model(TINY_SWIN)):
        images, folder = images_of(model.spec), tmp_path / model.spec.family
        flora.export_torch(model, folder)
        expected[folder.name] = np.asarray(logits(model, images))
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        save_file({"images": images}, folder / "images")
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-B", "-c", ELSEWHERE, *expected]
    run = functools.partial(subprocess.run, check=True, capture_output=True, timeout=120)
    for kind, output in json.loads(run(command, cwd=tmp_path, env=environment).stdout).items():
        assert_close(np.array(output), expected.pop(kind))
    assert not expected
