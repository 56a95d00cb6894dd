"""Exported weights in PyTorch: in the published subnets' names, and in timm's own models."""

import numpy as np
import pytest

import flora_jax as flora
from flora_jax.weights.export.timm import export_timm
from flora_jax.weights.pretrained import from_state_dict
from tests.helpers.torch_models import TOLERANCE, images, randomise, torch, torch_logits

load_file = pytest.importorskip("safetensors.torch").load_file
functions = torch.nn.functional

pytestmark = pytest.mark.slow


def named(**modules):
    """A module of these children and nothing else."""
    return torch.nn.ModuleDict(modules)


class PlainDeit(torch.nn.Module):
    """A DeiT of nn.Linear alone, with the names of the published subnets."""

    def __init__(self, spec):
        super().__init__()
        self.spec, width = spec, spec.embed_dim
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, spec.num_tokens, width))
        patches = torch.nn.Conv2d(spec.in_channels, width, spec.patch_size, spec.patch_size)
        self.patch_embed = named(proj=patches)
        self.blocks = torch.nn.ModuleList(self.block(block) for block in spec.blocks)
        self.norm = torch.nn.LayerNorm(width, spec.layer_norm_eps)
        self.head = torch.nn.Linear(width, spec.num_classes)

    def block(self, block):
        width, epsilon = self.spec.embed_dim, self.spec.layer_norm_eps
        qkv, fc1, fc2 = block.ranks
        return named(
            norm1=torch.nn.LayerNorm(width, epsilon),
            attn=named(
                qkv=self.searchable(width, 3 * block.attention_dim, qkv),
                proj=torch.nn.Linear(block.attention_dim, width),
            ),
            norm2=torch.nn.LayerNorm(width, epsilon),
            mlp=named(
                fc1=self.searchable(width, block.mlp_dim, fc1),
                fc2=self.searchable(block.mlp_dim, width, fc2),
            ),
        )

    @staticmethod
    def searchable(in_features, out_features, rank):
        if rank is None:
            return named(fc=torch.nn.Linear(in_features, out_features))
        down = torch.nn.Linear(in_features, rank, bias=False)
        return named(VT=down, U=torch.nn.Linear(rank, out_features))

    @staticmethod
    def apply_to(x, layer):
        return layer["fc"](x) if "fc" in layer else layer["U"](layer["VT"](x))

    def attend(self, x, attention):
        batch, tokens, _ = x.shape
        heads, head_dim = self.spec.blocks[0].num_heads, self.spec.blocks[0].head_dim
        qkv = self.apply_to(x, attention["qkv"]).reshape(batch, tokens, 3, heads, head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functions.scaled_dot_product_attention(query, key, value)
        return attention["proj"](mixed.transpose(1, 2).reshape(batch, tokens, -1))

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = x + self.attend(block["norm1"](x), block["attn"])
            hidden = functions.gelu(self.apply_to(block["norm2"](x), block["mlp"]["fc1"]))
            x = x + self.apply_to(hidden, block["mlp"]["fc2"])
        return self.head(self.norm(x)[:, 0])


@pytest.mark.parametrize("config", range(7))  # the golden's last one is dense throughout
def test_exported_subnet_in_pytorch(micro_model, micro_space, micro_genes, tmp_path, config):
    subnet = flora.extract(flora.factorize(micro_model, micro_space), micro_genes[config])
    assert any(rank is not None for rank in subnet.spec.ranks)
    export_timm(subnet, tmp_path / "subnet.safetensors")
    plain = PlainDeit(subnet.spec)
    plain.load_state_dict(load_file(tmp_path / "subnet.safetensors"), strict=True)
    batch = images(subnet.spec, 3)
    np.testing.assert_allclose(subnet(batch), torch_logits(plain, batch), **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "options", "spec"),
    [
        ("deit_tiny_patch16_224", {"qkv_bias": False}, flora.deit("tiny", qkv_bias=False)),
        ("deit_tiny_distilled_patch16_224", {}, flora.deit("tiny", distilled=True)),
        (
            "vit_tiny_patch16_224",
            {"global_pool": "avg", "class_token": False},
            flora.deit("tiny", pool="mean", class_token=False),
        ),
        ("swin_tiny_patch4_window7_224", {}, flora.swin("tiny")),
    ],
)
def test_exported_model_in_timm(tmp_path, name, options, spec):
    """In from timm's names, out to a file that timm takes, the same logits each way."""
    timm = pytest.importorskip("timm", reason="compares with the models of timm")
    reference = timm.create_model(name, **options)
    randomise(reference)
    batch = images(spec, 1)
    expected = torch_logits(reference, batch)
    model = from_state_dict({n: t.numpy() for n, t in reference.state_dict().items()}, spec)
    np.testing.assert_allclose(model(batch), expected, **TOLERANCE)

    export_timm(model, tmp_path / "exported.safetensors")
    again = timm.create_model(name, **options)
    again.load_state_dict(load_file(tmp_path / "exported.safetensors"), strict=True)
    np.testing.assert_array_equal(torch_logits(again, batch), expected)
