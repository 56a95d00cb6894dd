"""A Swin Transformer in plain PyTorch. Copy this folder anywhere; it needs torch and safetensors.

    model = load(folder)    # spec.json says what the network is, model.safetensors has its weights
    logits = model(images)  # float32 [B, C, H, W], normalised -> [B, classes]

Without classes it gives a pooled feature [B, D]; `model.features(images)` is its tokens [B, N, D].
Low rank is two Linears in a row. B images, S tokens a side of an image (N = S*S), D width,
n windows a side, T tokens of a window, H heads, d width of a head.
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
    model = Swin(json.loads(text, object_hook=lambda fields: Spec(**fields)))
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval()


class Swin(nn.Module):
    """Stages of blocks, each with fewer and wider tokens than the one before; mean; classifier."""

    def __init__(self, spec):
        super().__init__()
        self.spec, width, epsilon = spec, spec.embed_dim, spec.layer_norm_eps
        side = spec.image_size // spec.patch_size
        self.patch_embed = nn.Conv2d(spec.in_channels, width, spec.patch_size, spec.patch_size)
        self.patch_norm = nn.LayerNorm(width, epsilon) if spec.patch_norm else nn.Identity()
        self.absolute_pos_embed = None
        if spec.absolute_pos_embed:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(side**2, width))
        self.blocks, blocks = nn.Sequential(), iter(spec.blocks)
        for stage, depth in enumerate(spec.depths):
            downsample = nn.Identity()
            if stage > 0:
                downsample = PatchMerging(width, epsilon)
                width, side = 2 * width, side // 2
            window = min(spec.window_size, side)
            for i in range(depth):
                shift = window // 2 if i % 2 and window < side else 0
                block = next(blocks)
                attention = WindowAttention(block, width, spec.qkv_bias, side, window, shift)
                self.blocks.append(Block(block, width, epsilon, attention, downsample))
                downsample = nn.Identity()
        self.norm = nn.LayerNorm(width, epsilon)
        self.head = nn.Linear(width, spec.num_classes) if spec.num_classes else nn.Identity()

    def features(self, images):
        """Images [B, C, H, W] -> the tokens [B, N, D] that are pooled, row by row."""
        expected = (self.spec.in_channels, self.spec.image_size, self.spec.image_size)
        if images.shape[1:] != expected:
            raise ValueError(f"images have shape {tuple(images.shape)}, not (B, *{expected})")
        x = self.patch_norm(self.patch_embed(images).permute(0, 2, 3, 1))
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed.unflatten(0, x.shape[1:3])
        return self.norm(self.blocks(x)).flatten(1, 2)

    def forward(self, images):
        return self.head(self.features(images).mean(1))


class Block(nn.Module):
    """Pre-norm attention and MLP, on tokens [B, S, S, D]; the first of a stage merges them."""

    def __init__(self, block, width, epsilon, attention, downsample):
        super().__init__()
        self.downsample, self.attn = downsample, attention
        self.norm1 = nn.LayerNorm(width, epsilon)
        self.norm2 = nn.LayerNorm(width, epsilon)
        self.mlp = Mlp(width, block.mlp_dim, block.ranks[1:])

    def forward(self, x):
        x = self.downsample(x)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Each 2 x 2 tokens become one of twice the width: [B, S, S, D] -> [B, S/2, S/2, 2 D]."""

    def __init__(self, width, epsilon):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, epsilon)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.flatten(3)))  # left column first, each from the top


class WindowAttention(nn.Module):
    """Self-attention inside windows of the tokens [B, S, S, D], with a bias by relative position.

    Shifted windows wrap around the edges; tokens that only meet by wrapping do not see each other.
    """

    def __init__(self, block, width, qkv_bias, side, window, shift):
        super().__init__()
        self.num_heads, attention_dim = block.num_heads, block.num_heads * block.head_dim
        self.window, self.shift = window, shift
        self.qkv = linear(width, 3 * attention_dim, block.ranks[0], qkv_bias)
        self.proj = nn.Linear(attention_dim, width)
        table = torch.zeros((2 * window - 1) ** 2, block.num_heads)
        self.relative_position_bias_table = nn.Parameter(table)
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        row, column = (place[:, None] - place + window - 1).unbind(-1)
        self.register_buffer("index", row * (2 * window - 1) + column, persistent=False)
        mask = None
        if shift:
            place = torch.arange(side)
            region = (place >= side - window).long() + (place >= side - shift)
            regions = into_windows((3 * region[:, None] + region)[None, :, :, None], window)
            mask = -100.0 * (regions != regions.mT)[0, :, :, None]  # [n, n, 1, T, T]
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x):
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)  # [H, T, T]
        if self.mask is not None:
            bias = bias + self.mask
            x = x.roll((-self.shift, -self.shift), (1, 2))
        qkv = self.qkv(into_windows(x, self.window)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(4, 0, 1, 2, 5, 3, 6)  # each [B, n, n, H, T, d]
        mixed = F.scaled_dot_product_attention(query, key, value, bias)
        x = self.proj(mixed.transpose(3, 4).flatten(4))
        x = x.unflatten(3, (self.window, self.window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x if self.mask is None else x.roll((self.shift, self.shift), (1, 2))


def into_windows(x, window):
    """[B, S, S, D] -> [B, n, n, T, D]"""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(3, 4)


class Mlp(nn.Module):
    """x -> fc2(gelu(fc1(x)))"""

    def __init__(self, width, hidden, ranks):
        super().__init__()
        self.fc1 = linear(width, hidden, ranks[0])
        self.fc2 = linear(hidden, width, ranks[1])

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def linear(in_features, out_features, rank, bias=True):
    """A dense layer, or a pair of low-rank factors where there is a rank."""
    if rank is None:
        return nn.Linear(in_features, out_features, bias)
    down, up = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias)
    return nn.Sequential(OrderedDict(down=down, up=up))
