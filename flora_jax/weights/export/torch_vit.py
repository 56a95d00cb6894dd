"""A vision transformer in plain PyTorch. Copy this folder anywhere; it needs torch and safetensors.

    model = load(folder)    # spec.json says what the network is, model.safetensors has its weights
    logits = model(images)  # float32 [B, C, H, W], normalised -> [B, classes]

Without classes it gives a pooled feature [B, D]; `model.features(images)` is its tokens [B, N, D].
Low rank is two Linears in a row. B images, N tokens, D width, H heads, d width of a head.
"""

import json
import math
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


class Spec(SimpleNamespace):
    """What spec.json says of the network or of a block; what it leaves out is so."""

    num_registers, positions, rope_theta, rotary_pairs = 0, "all", None, None
    pre_norm, patch_bias, activation, gated_mlp, fc_norm = False, True, "gelu", False, True


def load(folder: str | Path) -> nn.Module:
    """The network of a folder, on the CPU, ready for inference."""
    text = (Path(folder) / "spec.json").read_text()
    model = ViT(json.loads(text, object_hook=lambda fields: Spec(**fields)))
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval()


class ViT(nn.Module):
    """Class token, registers and patches; blocks of attention and MLP; pooling; classifier."""

    def __init__(self, spec):
        super().__init__()
        self.spec, width, epsilon = spec, spec.embed_dim, spec.layer_norm_eps
        self.num_prefix = spec.class_token + spec.distilled + spec.num_registers
        every = list(range(self.num_prefix + (spec.image_size // spec.patch_size) ** 2))
        tokens = [every if block.tokens is None else block.tokens for block in spec.blocks]
        before, patches = tokens[0], tokens[0][self.num_prefix :]
        positions = {"all": len(before), "patches": len(patches), "none": 0}
        sizes = (spec.in_channels, width, spec.patch_size, spec.patch_size)
        self.patch_embed = nn.Conv2d(*sizes, bias=spec.patch_bias)
        self.kept_patches = Select(every[self.num_prefix :], patches)
        self.cls_token = embedding(spec.class_token, width)
        self.dist_token = embedding(spec.distilled, width)
        self.reg_token = embedding(spec.num_registers, width)
        self.pos_embed = embedding(positions[spec.positions], width)
        self.norm_pre = nn.LayerNorm(width, epsilon) if spec.pre_norm else nn.Identity()
        self.blocks = nn.Sequential()
        for block, own in zip(spec.blocks, tokens, strict=True):
            attention = Attention(spec, block, own, num_left=len(every) - len(own))
            self.blocks.append(Block(spec, block, Select(before, own), attention))
            before = own
        self.norm = nn.LayerNorm(width, epsilon)
        self.normalises_mean = spec.pool == "mean" and spec.fc_norm
        self.attn_pool = AttentionPool(spec) if spec.pool == "attention" else None
        pooled = 2 * width if spec.pool == "token_and_mean" else width
        self.head = classifier(pooled, spec.num_classes)
        self.head_dist = classifier(pooled, spec.num_classes) if spec.distilled else None

    def features(self, images):
        """Images [B, C, H, W] -> the tokens [B, N, D] that are pooled, those of patches last."""
        expected = (self.spec.in_channels, self.spec.image_size, self.spec.image_size)
        if images.shape[1:] != expected:
            raise ValueError(f"images have shape {tuple(images.shape)}, not (B, *{expected})")
        x = self.kept_patches(self.patch_embed(images).flatten(2).transpose(1, 2))
        if self.spec.positions == "patches":
            x = x + self.pos_embed
        prefix = [t for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)
        if self.spec.positions == "all":
            x = x + self.pos_embed
        x = self.blocks(self.norm_pre(x))
        return x if self.normalises_mean else self.norm(x)

    def forward(self, images):
        x = self.features(images)
        if self.head_dist is not None:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return self.head(self.pool(x))

    def pool(self, x):
        """[B, N, D] -> [B, D]; [B, 2 D] for the class token and the mean side by side."""
        if self.attn_pool is not None:
            return self.attn_pool(x)
        if self.spec.pool == "token":
            return x[:, 0]
        mean = x[:, self.num_prefix :].mean(1)
        if self.spec.pool == "token_and_mean":
            return torch.cat([x[:, 0], mean], dim=-1)
        return self.norm(mean) if self.normalises_mean else mean


class Block(nn.Module):
    """Pre-norm attention and MLP, on the tokens that go on from the block before."""

    def __init__(self, spec, block, select, attention):
        super().__init__()
        width = spec.embed_dim
        self.select, self.attn = select, attention
        self.norm1, self.norm2 = (nn.LayerNorm(width, spec.layer_norm_eps) for _ in range(2))
        self.mlp = Mlp(width, block.mlp_dim, spec.activation, spec.gated_mlp, block.ranks[1:])

    def forward(self, x):
        x = self.select(x)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Self-attention over the tokens [B, N, D] that have not left.

    Those that left would all be zero here. One zero token stands for them, with the logarithm of
    their number added to its logits, which is exact.
    """

    def __init__(self, spec, block, tokens, num_left):
        super().__init__()
        self.num_heads, attention_dim = block.num_heads, block.num_heads * block.head_dim
        self.qkv = linear(spec.embed_dim, 3 * attention_dim, block.ranks[0], spec.qkv_bias)
        self.proj = nn.Linear(attention_dim, spec.embed_dim)
        self.rotary = None if spec.rope_theta is None else Rotary(spec, block, tokens, num_left)
        bias = torch.tensor([[0.0] * len(tokens) + [math.log(num_left)]]) if num_left else None
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x):
        num_tokens = x.shape[1]
        if self.bias is not None:
            x = F.pad(x, (0, 0, 0, 1))
        query, key, value = split_heads(self.qkv(x), 3, self.num_heads)
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        return self.proj(attend(query[:, :, :num_tokens], key, value, self.bias))


class Rotary(nn.Module):
    """Turns the pairs (i, i + d/2) of queries or keys [B, H, N, d] by their patches' places.

    The first half of a head's pairs turns with y, the second with x; other tokens do not turn.
    """

    def __init__(self, spec, block, tokens, num_left):
        super().__init__()
        side, half = spec.image_size // spec.patch_size, spec.embed_dim // spec.num_heads // 4
        periods = spec.rope_theta ** (torch.arange(half, dtype=torch.float64) / half)
        places = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 - 1
        places = torch.cartesian_prod(places, places)  # y, x of each patch
        angles = (2 * math.pi * places[:, :, None] / periods).flatten(1)
        num_prefix = spec.class_token + spec.distilled + spec.num_registers
        angles = F.pad(angles, (0, 0, num_prefix, 1))[[*tokens, -1] if num_left else tokens]
        if block.rotary_pairs is not None:  # those of each head that are left
            angles = angles[:, torch.tensor(block.rotary_pairs)].transpose(0, 1)
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x):
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin


class AttentionPool(nn.Module):
    """Tokens [B, N, D] -> [B, D]: a learned query attends to all of them, then an MLP (SigLIP)."""

    def __init__(self, spec):
        super().__init__()
        self.num_heads, width = spec.num_heads, spec.embed_dim
        self.latent = embedding(1, width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, spec.layer_norm_eps)
        self.mlp = Mlp(width, round(spec.mlp_ratio * width), spec.activation)

    def forward(self, tokens):
        latent = self.latent.expand(len(tokens), -1, -1)
        (query,) = split_heads(self.q(latent), 1, self.num_heads)
        key, value = split_heads(self.kv(tokens), 2, self.num_heads)
        x = self.proj(attend(query, key, value)[:, 0])
        return x + self.mlp(self.norm(x))


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}


class Mlp(nn.Module):
    """x -> fc2(activation(fc1(x))); a gated one (SwiGLU) -> fc2(activation(gate) * value)."""

    def __init__(self, width, hidden, activation, gated=False, ranks=(None, None)):
        super().__init__()
        self.activation, self.gated = activation, gated
        self.fc1 = linear(width, 2 * hidden if gated else hidden, ranks[0])
        self.fc2 = linear(hidden, width, ranks[1])

    def forward(self, x):
        activate, x = ACTIVATIONS[self.activation], self.fc1(x)
        if not self.gated:
            return self.fc2(activate(x))
        gate, value = x.chunk(2, dim=-1)
        return self.fc2(activate(gate) * value)


class Select(nn.Module):
    """Tokens [B, N, D] numbered `before` -> those of them numbered `after`."""

    def __init__(self, before, after):
        super().__init__()
        index = None if before == after else torch.tensor([before.index(t) for t in after])
        self.register_buffer("index", index, persistent=False)

    def forward(self, x):
        return x if self.index is None else x[:, self.index]


def embedding(number, width):
    return nn.Parameter(torch.zeros(int(number), width)) if number else None


def classifier(features, num_classes):
    return nn.Linear(features, num_classes) if num_classes else nn.Identity()


def linear(in_features, out_features, rank, bias=True):
    """A dense layer, or a pair of low-rank factors where there is a rank."""
    if rank is None:
        return nn.Linear(in_features, out_features, bias)
    down, up = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias)
    return nn.Sequential(OrderedDict(down=down, up=up))


def split_heads(x, parts, num_heads):
    """[B, N, parts*H*d] -> [parts, B, H, N, d], such as query, key and value."""
    return x.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4)


def attend(query, key, value, bias=None):
    """[B, H, N, d] -> [B, N, H*d]; the bias is added to the logits."""
    return F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2).flatten(2)
