"""A TinyViT in plain PyTorch. Copy this folder anywhere; it needs torch and safetensors.

    model = load(folder)    # spec.json says what the network is, model.safetensors has its weights
    logits = model(images)  # float32 [B, C, H, W], normalised -> [B, classes]

Without classes it gives a pooled feature [B, D]; `model.features(images)` is its tokens [B, N, D].
Low rank is two Linears in a row; batch norms are part of the convolutions before them. B images,
S tokens a side of an image (N = S*S), D width, n windows a side, T tokens of a window, H heads,
d width of a head.
"""

import json
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

Spec = SimpleNamespace  # what spec.json says of the network or of a block


def load(folder: str | Path) -> nn.Module:
    """The network of a folder, on the CPU, ready for inference."""
    text = (Path(folder) / "spec.json").read_text()
    model = TinyViT(json.loads(text, object_hook=lambda fields: Spec(**fields)))
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval()


class TinyViT(nn.Module):
    """Convolutions; stages of blocks, each with fewer tokens than the one before; mean; classifier.

    Maps of tokens are [B, D, S, S] between the blocks.
    """

    def __init__(self, spec):
        super().__init__()
        self.spec, epsilon, width = spec, spec.layer_norm_eps, spec.embed_dims[0]
        hidden = int(spec.mbconv_expand_ratio * width)
        self.patch_embed = Embed(spec.in_channels, width)
        self.mbconvs = nn.Sequential()
        for _ in range(spec.depths[0]):
            self.mbconvs.append(MBConv(width, hidden, width))
        self.blocks, blocks = nn.Sequential(), iter(spec.blocks)
        stages = zip(spec.embed_dims[1:], spec.depths[1:], spec.window_sizes[1:], strict=True)
        for wider, depth, window in stages:
            downsample, width = PointDepthPoint(width, wider, wider, stride=2), wider
            for _ in range(depth):
                self.blocks.append(Block(next(blocks), width, epsilon, window, downsample))
                downsample = nn.Identity()
        self.norm = nn.LayerNorm(width, epsilon)
        self.head = nn.Linear(width, spec.num_classes) if spec.num_classes else nn.Identity()

    def features(self, images):
        """Images [B, C, H, W] -> the tokens [B, N, D] that are pooled, row by row."""
        expected = (self.spec.in_channels, self.spec.image_size, self.spec.image_size)
        if images.shape[1:] != expected:
            raise ValueError(f"images have shape {tuple(images.shape)}, not (B, *{expected})")
        x = self.blocks(self.mbconvs(self.patch_embed(images)))
        return x.flatten(2).transpose(1, 2)

    def forward(self, images):
        return self.head(self.norm(self.features(images).mean(1)))


class Embed(nn.Module):
    """Images [B, C, H, W] -> maps [B, D, H/4, W/4]."""

    def __init__(self, channels, width):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width // 2, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width // 2, width, 3, stride=2, padding=1)

    def forward(self, images):
        return self.conv2(F.gelu(self.conv1(images)))


class PointDepthPoint(nn.Module):
    """A 1 x 1, a depthwise 3 x 3 and a 1 x 1 convolution."""

    def __init__(self, before, inside, after, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(before, inside, 1)
        self.conv2 = depthwise(inside, stride)
        self.conv3 = nn.Conv2d(inside, after, 1)

    def forward(self, x):
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class MBConv(PointDepthPoint):
    """The same, with a shortcut."""

    def forward(self, x):
        return F.gelu(x + super().forward(x))


class Block(nn.Module):
    """Pre-norm attention inside windows, a convolution, MLP; a stage's first one halves S."""

    def __init__(self, block, width, epsilon, window, downsample):
        super().__init__()
        self.window, self.downsample = window, downsample
        self.norm1 = nn.LayerNorm(width, epsilon)
        self.attn = WindowAttention(block, width, window)
        self.local_conv = depthwise(width)
        self.norm2 = nn.LayerNorm(width, epsilon)
        self.mlp = Mlp(width, block.mlp_dim, block.ranks[1:])

    def forward(self, x):
        x = self.downsample(x).permute(0, 2, 3, 1)
        mixed = self.attn(self.norm1(into_windows(x, self.window)))
        x = x + out_of_windows(mixed, self.window, x.shape[1])
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)


class WindowAttention(nn.Module):
    """Self-attention over [B, n, n, T, D], with a bias for each distance of rows and columns."""

    def __init__(self, block, width, window):
        super().__init__()
        self.num_heads, attention_dim = block.num_heads, block.num_heads * block.head_dim
        self.qkv = linear(width, 3 * attention_dim, block.ranks[0])
        self.proj = nn.Linear(attention_dim, width)
        self.attention_biases = nn.Parameter(torch.zeros(window**2, block.num_heads))
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        rows, columns = (place[:, None] - place).abs().unbind(-1)
        self.register_buffer("index", rows * window + columns, persistent=False)

    def forward(self, x):
        bias = self.attention_biases[self.index].permute(2, 0, 1)  # [H, T, T]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(4, 0, 1, 2, 5, 3, 6)  # each [B, n, n, H, T, d]
        mixed = F.scaled_dot_product_attention(query, key, value, bias)
        return self.proj(mixed.transpose(3, 4).flatten(4))


def into_windows(x, window):
    """[B, S, S, D] -> [B, n, n, T, D]; those at the edges are filled up with zeros."""
    padding = -x.shape[1] % window
    x = F.pad(x, (0, 0, 0, padding, 0, padding))
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(3, 4)


def out_of_windows(x, window, side):
    """[B, n, n, T, D] -> [B, S, S, D]"""
    x = x.unflatten(3, (window, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :side, :side]


class Mlp(nn.Module):
    """x -> fc2(gelu(fc1(x)))"""

    def __init__(self, width, hidden, ranks):
        super().__init__()
        self.fc1 = linear(width, hidden, ranks[0])
        self.fc2 = linear(hidden, width, ranks[1])

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def depthwise(width, stride=1):
    return nn.Conv2d(width, width, 3, stride, padding=1, groups=width)


def linear(in_features, out_features, rank):
    """A dense layer, or a pair of low-rank factors where there is a rank."""
    if rank is None:
        return nn.Linear(in_features, out_features)
    down, up = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features)
    return nn.Sequential(OrderedDict(down=down, up=up))
