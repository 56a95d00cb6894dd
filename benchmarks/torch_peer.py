"""The same supernet in plain eager PyTorch: what somebody would write without this library.

Low-rank layers slice their factors, and multiply them first where that is cheaper, so that both
sides do the same multiply-adds.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class LowRankLinear(nn.Module):
    """x [..., in] -> [..., out] through the leading `rank` components."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        full_rank = min(in_features, out_features)
        self.down = nn.Parameter(torch.randn(full_rank, in_features) * in_features**-0.5)
        self.up = nn.Parameter(torch.randn(out_features, full_rank) * full_rank**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        down, up = self.down[:rank], self.up[:, :rank]
        tokens = x.numel() // x.shape[-1]
        kernel = down.shape[1] * up.shape[0]
        if kernel * (rank + tokens) < tokens * rank * (down.shape[1] + up.shape[0]):
            return F.linear(x, up @ down, self.bias)
        return F.linear(F.linear(x, down), up, self.bias)


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv = LowRankLinear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = LowRankLinear(width, 4 * width), LowRankLinear(4 * width, width)

    def forward(self, x: torch.Tensor, ranks) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x), ranks[0])
        qkv = qkv.reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x), ranks[1])), ranks[2])


class DeiT(nn.Module):
    """images [B, 3, H, W], ranks int [L] -> logits [B, classes]."""

    def __init__(self, image_size, patch_size, width, depth, num_heads, num_classes):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        tokens = (image_size // patch_size) ** 2 + 1
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor, ranks) -> torch.Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        x = tokens + self.pos_embed
        for i, block in enumerate(self.blocks):
            x = block(x, ranks[3 * i : 3 * i + 3])
        return self.head(self.norm(x[:, 0]))


def build(spec) -> DeiT:
    sizes = spec.image_size, spec.patch_size, spec.embed_dim, spec.depth, spec.num_heads
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return DeiT(*sizes, spec.num_classes).to(device)


def make_step(model: DeiT, images: np.ndarray, labels: np.ndarray, bfloat16: bool):
    """images float32 [B, H, W, 3] -> step(ranks): forward, backward, clipping and AdamW."""
    device = model.cls_token.device
    images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
    labels = torch.from_numpy(labels).long().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.5e-5, weight_decay=0.01)

    def step(ranks) -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(model(images, ranks), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        return loss.item()

    return step


def make_forward(model: DeiT, images: np.ndarray):
    """images float32 [B, H, W, 3] -> forward(ranks): the logits' classes, on the host."""
    images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(model.cls_token.device)

    @torch.inference_mode()
    def forward(ranks) -> np.ndarray:
        return model(images, ranks).argmax(-1).cpu().numpy()

    return forward
