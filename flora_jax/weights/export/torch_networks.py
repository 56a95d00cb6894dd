"""Vision transformers in plain PyTorch. Copy this folder anywhere; it needs torch and safetensors.

    model = load(folder)    # spec.json says what the network is, model.safetensors has its weights
    images = torch.tensor(preprocess("cat.jpg"))[None]  # this with numpy and Pillow
    logits = model(images)  # float32 [B, C, H, W], normalised -> [B, classes]

The network is a ViT, a Swin or a TinyViT. `model.spec.outputs` says what it gives: logits of
"classes" or of independent "labels", "numbers", an "embedding"; without a head a pooled feature.
`model.features(images)` is its tokens [B, N, D]. Low rank is two Linears in a row; batch norms are
part of the convolutions before them. B images, N tokens, S of them a side of an image (N = S*S),
D width, H heads, d width of a head, n windows a side, T tokens of a window.
"""

import json
import math
import runpy
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


class Spec(SimpleNamespace):
    """Contents of spec.json, of the network or of a block; what it leaves out is so."""

    num_registers, positions, rope_theta, rotary_pairs = 0, "all", None, None
    pre_norm, patch_bias, activation, gated_mlp, fc_norm = False, True, "gelu", False, True
    outputs, head_bias = "classes", True
    rope_grid, rope_offset, mlp_norm, relative_positions = None, 0, False, False
    pool_num_heads, pool_mlp_ratio = None, None
    k_bias, post_norm, cosine_attention, pretrained_window_sizes = True, False, False, ()


def load(folder: str | Path) -> nn.Module:
    """The network of a folder, on the CPU, ready for inference."""
    content = (Path(folder) / "spec.json").read_bytes()
    spec = json.loads(content, object_hook=lambda fields: Spec(**fields))
    model = {"vit": ViT, "swin": Swin, "tiny_vit": TinyViT}[spec.family](spec)
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval()


def preprocess(picture):
    """A file, or an image that Pillow has opened, as preprocessing.json says: a NumPy array float32
    [C, H, W]."""
    code = runpy.run_path(str(Path(__file__).with_name("preprocess.py")))
    return code["preprocess"](picture)


# --- what all have in common ----------------------------------------------------------------------


class Network(nn.Module):
    """Images [B, C, H, W] -> logits [B, classes]; a family has its `tokens` and `classify`."""

    def features(self, images):
        """Images -> the tokens [B, N, D] that are pooled, row by row; those of patches last."""
        expected = (self.spec.in_channels, self.spec.image_size, self.spec.image_size)
        if not torch.jit.is_tracing() and images.shape[1:] != expected:
            raise ValueError(f"images have shape {tuple(images.shape)}, not (B, *{expected})")
        return self.tokens(images)

    def forward(self, images):
        return self.classify(self.features(images))


class Block(nn.Module):
    """Attention and MLP, with a norm before each, or behind it (Swin V2).

    `before` gives the tokens that go on from the block before. Where there are windows, attention
    is inside them. A TinyViT has a convolution in the middle.
    """

    def __init__(self, spec, block, width, before, attention, windows=None, local_conv=None):
        super().__init__()
        self.downsample, self.attn, self.windows = before, attention, windows
        self.norm1 = nn.LayerNorm(width, spec.layer_norm_eps)
        self.local_conv = nn.Identity() if local_conv is None else local_conv
        self.norm2 = nn.LayerNorm(width, spec.layer_norm_eps)
        gated, self.post_norm = spec.gated_mlp, spec.post_norm
        self.mlp = Mlp(width, block.mlp_dim, spec.activation, gated, block.ranks[1:])
        if spec.mlp_norm:
            uncut = round(spec.mlp_ratio * width)
            self.mlp.norm = PartialLayerNorm(block.mlp_dim, uncut, spec.layer_norm_eps)

    def forward(self, x):
        x = self.downsample(x)
        if self.windows is None:
            x = x + self.attn(self.norm1(x))
        elif self.post_norm:
            x = x + self.norm1(self.windows.join(self.attn(self.windows.cut(x))))
        else:
            x = x + self.windows.join(self.attn(self.norm1(self.windows.cut(x))))
        x = self.local_conv(x)
        return x + (self.norm2(self.mlp(x)) if self.post_norm else self.mlp(self.norm2(x)))


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
        self.activation, self.gated, self.norm = activation, gated, nn.Identity()
        self.fc1 = linear(width, 2 * hidden if gated else hidden, ranks[0])
        self.fc2 = linear(hidden, width, ranks[1])

    def forward(self, x):
        activate, x = ACTIVATIONS[self.activation], self.fc1(x)
        if not self.gated:
            return self.fc2(activate(x))
        gate, value = x.chunk(2, dim=-1)
        return self.fc2(self.norm(activate(gate) * value))


class PartialLayerNorm(nn.LayerNorm):
    """A norm of features, some of whose `uncut` ones have left: they count as zeros."""

    def __init__(self, features, uncut, epsilon):
        super().__init__(features, epsilon)
        self.left = uncut - features

    def forward(self, x):
        if not self.left:
            return super().forward(x)
        whole, size = F.pad(x, (0, self.left)), x.shape[-1]
        normal = F.layer_norm(whole, whole.shape[-1:], eps=self.eps)[..., :size]
        return normal * self.weight + self.bias


def embedding(number, width):
    return nn.Parameter(torch.zeros(int(number), width)) if number else None


def classifier(features, num_classes, bias=True):
    return nn.Linear(features, num_classes, bias) if num_classes else nn.Identity()


def linear(in_features, out_features, rank, bias=True):
    """A dense layer, or a pair of low-rank factors where there is a rank."""
    if rank is None:
        return nn.Linear(in_features, out_features, bias)
    down, up = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias)
    return nn.Sequential(OrderedDict(down=down, up=up))


def split_heads(x, parts, num_heads):
    """[..., N, parts*H*d] -> parts of [..., H, N, d], such as query, key and value."""
    return [p.unflatten(-1, (num_heads, -1)).transpose(-3, -2) for p in x.chunk(parts, dim=-1)]


def attend(query, key, value, bias=None):
    """[..., H, N, d] -> [..., N, H*d]; the bias is added to the logits."""
    return F.scaled_dot_product_attention(query, key, value, bias).transpose(-3, -2).flatten(-2)


# --- ViT ------------------------------------------------------------------------------------------


class ViT(Network):
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
            self.blocks.append(Block(spec, block, width, Select(before, own), attention))
            before = own
        self.norm = nn.LayerNorm(width, epsilon)
        self.normalises_mean = spec.pool == "mean" and spec.fc_norm
        self.attn_pool = AttentionPool(spec) if spec.pool == "attention" else None
        pooled = 2 * width if spec.pool == "token_and_mean" else width
        sizes = (pooled, spec.num_classes, spec.head_bias)
        self.head = classifier(*sizes)
        self.head_dist = classifier(*sizes) if spec.distilled else None

    def tokens(self, images):
        x = self.kept_patches(self.patch_embed(images).flatten(2).transpose(1, 2))
        if self.spec.positions == "patches":
            x = x + self.pos_embed
        prefix = [t for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        # Not len(x), which a trace or an export would take for a constant.
        x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
        if self.spec.positions == "all":
            x = x + self.pos_embed
        x = self.blocks(self.norm_pre(x))
        return x if self.normalises_mean else self.norm(x)

    def classify(self, x):
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
        self.register_buffer("distance", None, persistent=False)
        if spec.relative_positions:
            self._add_table(spec.image_size // spec.patch_size)

    def _add_table(self, side):
        """Biases by the distance of two patches, from the class token, to it, and its own."""
        last = (2 * side - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(last + 3, self.num_heads))
        place = torch.cartesian_prod(*[torch.arange(side)] * 2)
        index = ShiftedWindowAttention.index_of(place[:, None] - place, side)
        index = F.pad(index, (1, 0, 1, 0))
        index[0, :], index[:, 0], index[0, 0] = last, last + 1, last + 2
        self.register_buffer("distance", index, persistent=False)

    def forward(self, x):
        num_tokens = x.shape[1]
        if self.bias is not None:
            x = F.pad(x, (0, 0, 0, 1))
        query, key, value = split_heads(self.qkv(x), 3, self.num_heads)
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        bias = self.bias
        if self.distance is not None:
            bias = self.relative_position_bias_table[self.distance].permute(2, 0, 1)
        return self.proj(attend(query[:, :, :num_tokens], key, value, bias))


class Rotary(nn.Module):
    """Turns the pairs (i, i + d/2) of queries or keys [B, H, N, d] by their patches' places.

    The first half of a head's pairs turns with y, the second with x; other tokens do not turn.
    A side goes from -2 pi to 2 pi, or is rope_grid long from rope_offset on.
    """

    def __init__(self, spec, block, tokens, num_left):
        super().__init__()
        side, half = spec.image_size // spec.patch_size, spec.embed_dim // spec.num_heads // 4
        periods = spec.rope_theta ** (torch.arange(half, dtype=torch.float64) / half)
        places = torch.arange(side, dtype=torch.float64)
        if spec.rope_grid is None:
            places = 2 * math.pi * ((places + 0.5) / side * 2 - 1)
        else:
            places = (places + spec.rope_offset) / side * spec.rope_grid
        places = torch.cartesian_prod(places, places)  # y, x of each patch
        angles = (places[:, :, None] / periods).flatten(1)
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
        self.num_heads, width = spec.pool_num_heads or spec.num_heads, spec.embed_dim
        self.latent = embedding(1, width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, spec.layer_norm_eps)
        ratio = spec.pool_mlp_ratio or spec.mlp_ratio
        self.mlp = Mlp(width, round(ratio * width), spec.activation)

    def forward(self, tokens):
        latent = self.latent.expand(tokens.shape[0], -1, -1)
        (query,) = split_heads(self.q(latent), 1, self.num_heads)
        key, value = split_heads(self.kv(tokens), 2, self.num_heads)
        x = self.proj(attend(query, key, value)[:, 0])
        return x + self.mlp(self.norm(x))


class Select(nn.Module):
    """Tokens [B, N, D] numbered `before` -> those of them numbered `after`."""

    def __init__(self, before, after):
        super().__init__()
        index = None if before == after else torch.tensor([before.index(t) for t in after])
        self.register_buffer("index", index, persistent=False)

    def forward(self, x):
        return x if self.index is None else x[:, self.index]


# --- windows: Swin and TinyViT --------------------------------------------------------------------


class Windows:
    """Square windows of a map of tokens; shifted ones wrap around its edges."""

    def __init__(self, side, size, shift=0):
        self.side, self.size, self.shift = side, size, shift

    def cut(self, x):
        """[B, S, S, D] -> [B, n, n, T, D]; those at the edges are filled up with zeros."""
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        if padding := -self.side % self.size:
            x = F.pad(x, (0, 0, 0, padding, 0, padding))
        x = x.unflatten(2, (-1, self.size)).unflatten(1, (-1, self.size))
        return x.transpose(2, 3).flatten(3, 4)

    def join(self, x):
        """[B, n, n, T, D] -> [B, S, S, D]"""
        x = x.unflatten(3, (self.size, self.size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = x[:, : self.side, : self.side]
        return x.roll((self.shift, self.shift), (1, 2)) if self.shift else x


class WindowAttention(nn.Module):
    """Self-attention inside windows [B, n, n, T, D], with a bias [H, T, T] by relative position."""

    def __init__(self, block, width, windows, qkv_bias=True):
        super().__init__()
        self.num_heads, attention_dim = block.num_heads, block.num_heads * block.head_dim
        self.qkv = linear(width, 3 * attention_dim, block.ranks[0], qkv_bias)
        self.proj = nn.Linear(attention_dim, width)
        place = torch.cartesian_prod(*[torch.arange(windows.size)] * 2)
        index = self.index_of(place[:, None] - place, windows.size)
        self.register_buffer("index", index, persistent=False)

    def forward(self, x):
        query, key, value = split_heads(self.qkv(x), 3, self.num_heads)
        query, key = self.compared(query, key)
        return self.proj(attend(query, key, value, self.bias()))

    def compared(self, query, key):
        return query, key


class Swin(Network):
    """Stages of blocks, each with fewer and wider tokens than the one before; mean; classifier.

    Maps of tokens are [B, S, S, D] between the blocks.
    """

    def __init__(self, spec):
        super().__init__()
        self.spec, width, epsilon = spec, spec.embed_dim, spec.layer_norm_eps
        side = spec.image_size // spec.patch_size
        self.patch_embed = nn.Conv2d(spec.in_channels, width, spec.patch_size, spec.patch_size)
        self.patch_norm = nn.LayerNorm(width, epsilon) if spec.patch_norm else nn.Identity()
        self.absolute_pos_embed = embedding(spec.absolute_pos_embed and side**2, width)
        self.blocks, blocks = nn.Sequential(), iter(spec.blocks)
        pretrained = spec.pretrained_window_sizes or [0] * len(spec.depths)
        for stage, (depth, known) in enumerate(zip(spec.depths, pretrained, strict=True)):
            before = nn.Identity()
            if stage > 0:
                before = PatchMerging(width, epsilon, spec.post_norm)
                width, side = 2 * width, side // 2
            size = min(spec.window_size, side)
            for i in range(depth):
                block = next(blocks)
                windows = Windows(side, size, size // 2 if i % 2 and size < side else 0)
                if spec.cosine_attention:
                    known = known or size
                    attention = CosineWindowAttention(block, width, windows, spec.qkv_bias, known)
                else:
                    attention = ShiftedWindowAttention(block, width, windows, spec.qkv_bias)
                self.blocks.append(Block(spec, block, width, before, attention, windows))
                before = nn.Identity()
        self.norm = nn.LayerNorm(width, epsilon)
        self.head = classifier(width, spec.num_classes)

    def tokens(self, images):
        x = self.patch_norm(self.patch_embed(images).permute(0, 2, 3, 1))
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed.unflatten(0, x.shape[1:3])
        return self.norm(self.blocks(x)).flatten(1, 2)

    def classify(self, x):
        return self.head(x.mean(1))


class PatchMerging(nn.Module):
    """Each 2 x 2 tokens become one of twice the width: [B, S, S, D] -> [B, S/2, S/2, 2 D]."""

    def __init__(self, width, epsilon, post_norm=False):
        super().__init__()
        self.post_norm = post_norm
        self.norm = nn.LayerNorm((2 if post_norm else 4) * width, epsilon)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        x = x.flatten(3)  # left column first, each from the top
        return self.norm(self.reduction(x)) if self.post_norm else self.reduction(self.norm(x))


class ShiftedWindowAttention(WindowAttention):
    """A bias for each distance of rows and columns, with its sign.

    Tokens that only meet by wrapping around the edges do not see each other.
    """

    def __init__(self, block, width, windows, qkv_bias):
        super().__init__(block, width, windows, qkv_bias)
        self.make_table(block.num_heads, windows.size)
        mask = None
        if windows.shift:
            side = windows.side + -windows.side % windows.size
            place = torch.arange(side)
            region = (place >= side - windows.size).long() + (place >= side - windows.shift)
            regions = (3 * region[:, None] + region)[None, :, :, None]
            regions = Windows(side, windows.size).cut(regions)
            mask = -100.0 * (regions != regions.mT)[0, :, :, None]  # [n, n, 1, T, T]
        self.register_buffer("mask", mask, persistent=False)

    def make_table(self, num_heads, size):
        table = torch.zeros((2 * size - 1) ** 2, num_heads)
        self.relative_position_bias_table = nn.Parameter(table)

    @staticmethod
    def index_of(distance, size):
        row, column = (distance + size - 1).unbind(-1)
        return row * (2 * size - 1) + column

    def table(self):
        return self.relative_position_bias_table

    def bias(self):
        bias = self.table()[self.index].permute(2, 0, 1)
        return bias if self.mask is None else bias + self.mask


class CosineWindowAttention(ShiftedWindowAttention):
    """Logits are the cosine of query and key times a learned scale, and a small MLP makes the bias.

    The MLP takes distances on a logarithmic scale, in which a window of `known` is of one size.
    """

    def __init__(self, block, width, windows, qkv_bias, known):
        super().__init__(block, width, windows, qkv_bias)
        apart = 8 * torch.arange(1.0 - windows.size, windows.size) / max(known - 1, 1)
        apart = apart.sign() * (apart.abs() + 1).log2() / math.log2(8)
        self.register_buffer("positions", torch.cartesian_prod(apart, apart), persistent=False)

    def make_table(self, num_heads, size):
        self.logit_scale = nn.Parameter(torch.zeros(num_heads))
        fc1, fc2 = nn.Linear(2, 512), nn.Linear(512, num_heads, bias=False)
        self.cpb_mlp = nn.Sequential(OrderedDict(fc1=fc1, relu=nn.ReLU(), fc2=fc2))

    def table(self):
        return 16 * self.cpb_mlp(self.positions).sigmoid()

    def compared(self, query, key):
        scale = self.logit_scale.clamp(max=math.log(100)).exp() * math.sqrt(query.shape[-1])
        return F.normalize(query, dim=-1) * scale[:, None, None], F.normalize(key, dim=-1)


class TinyViT(Network):
    """Convolutions; stages of blocks, each with fewer tokens than the one before; mean; classifier.

    Maps of tokens are [B, D, S, S] in convolutions and [B, S, S, D] between the blocks.
    """

    def __init__(self, spec):
        super().__init__()
        self.spec, width, side = spec, spec.embed_dims[0], -(-spec.image_size // 4)
        hidden = int(spec.mbconv_expand_ratio * width)
        self.patch_embed = Embed(spec.in_channels, width)
        self.mbconvs = nn.Sequential()
        for _ in range(spec.depths[0]):
            self.mbconvs.append(MBConv(width, hidden, width))
        self.blocks, blocks = nn.Sequential(), iter(spec.blocks)
        stages = zip(spec.embed_dims[1:], spec.depths[1:], spec.window_sizes[1:], strict=True)
        for wider, depth, size in stages:
            before = Downsampling(width, wider, wider, stride=2)
            width, side = wider, -(-side // 2)
            windows = Windows(side, size)
            for _ in range(depth):
                block, local = next(blocks), LocalConvolution(width)
                attention = MirroredWindowAttention(block, width, windows)
                self.blocks.append(Block(spec, block, width, before, attention, windows, local))
                before = nn.Identity()
        self.norm = nn.LayerNorm(width, spec.layer_norm_eps)
        self.head = classifier(width, spec.num_classes)

    def tokens(self, images):
        x = self.mbconvs(self.patch_embed(images))
        return self.blocks(x.permute(0, 2, 3, 1)).flatten(1, 2)

    def classify(self, x):
        return self.head(self.norm(x.mean(1)))


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
        self.conv2 = nn.Conv2d(inside, inside, 3, stride, padding=1, groups=inside)
        self.conv3 = nn.Conv2d(inside, after, 1)

    def forward(self, x):
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class MBConv(PointDepthPoint):
    """The same, with a shortcut."""

    def forward(self, x):
        return F.gelu(x + super().forward(x))


class Downsampling(PointDepthPoint):
    """The same of tokens: [B, S, S, D] -> [B, S/2, S/2, D]."""

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class LocalConvolution(nn.Conv2d):
    """A depthwise 3 x 3 convolution of tokens [B, S, S, D]."""

    def __init__(self, width):
        super().__init__(width, width, 3, padding=1, groups=width)

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MirroredWindowAttention(WindowAttention):
    """A bias for each distance of rows and columns, without its sign."""

    def __init__(self, block, width, windows):
        super().__init__(block, width, windows)
        self.attention_biases = nn.Parameter(torch.zeros(windows.size**2, block.num_heads))

    @staticmethod
    def index_of(distance, size):
        rows, columns = distance.abs().unbind(-1)
        return rows * size + columns

    def bias(self):
        return self.attention_biases[self.index].permute(2, 0, 1)
