"""Shapes and costs of the networks: what a model is, before any weight exists.

A compressed model is just another spec, so every block carries its own shape.
MACs (multiply-adds) are counted for one image, as in the tables of FLORA (WACV 2024).
"""

import dataclasses
from typing import ClassVar

Rank = int | None  # None: one dense matrix; an integer: a pair of factors of that rank


@dataclasses.dataclass(frozen=True)
class LinearShape:
    """A searchable Linear layer: its sizes, and how many tokens of an image pass through it."""

    name: str
    in_features: int
    out_features: int
    tokens: int

    @property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)

    def is_cheaper_dense(self, rank: int) -> bool:
        """Whether the factor pair of this rank would cost at least the one dense matrix."""
        return rank * (self.in_features + self.out_features) >= self.in_features * self.out_features

    def num_weights(self, rank: Rank) -> int:
        """Weights without the bias, as stored: factors for an integer rank."""
        if rank is None:
            return self.in_features * self.out_features
        return rank * (self.in_features + self.out_features)

    def macs(self, rank: Rank) -> int:
        return self.tokens * self.num_weights(rank)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One transformer block. `ranks` belong to its (qkv, fc1, fc2)."""

    num_heads: int
    head_dim: int
    mlp_dim: int
    ranks: tuple[Rank, Rank, Rank] = (None, None, None)

    def __post_init__(self):
        for name in ("num_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a block must be at least 1, got {getattr(self, name)}")
        if len(self.ranks) != 3:
            raise ValueError(f"a block has 3 ranks (qkv, fc1, fc2), got {self.ranks}")


@dataclasses.dataclass(frozen=True)
class ViTSpec:
    """A DeiT: class token, learned position embedding, pre-norm blocks.

    `blocks` is filled with `depth` equal blocks of `num_heads` heads when it is left empty.

    Raises:
      ValueError: image_size is not a multiple of patch_size, embed_dim is not a multiple of
        num_heads, a size is not positive, `blocks` does not have `depth` entries, or a rank
        lies outside 1..full rank.
    """

    family: ClassVar[str] = "vit"

    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    num_classes: int = 1000
    in_channels: int = 3
    mlp_ratio: int = 4
    blocks: tuple[BlockSpec, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "blocks" and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.image_size % self.patch_size:
            nearest = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                f"the nearest that is: {nearest}"
            )
        if not self.blocks:
            if self.embed_dim % self.num_heads:
                nearest = max(1, round(self.embed_dim / self.num_heads)) * self.num_heads
                raise ValueError(
                    f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}; "
                    f"the nearest that is: {nearest}"
                )
            block = BlockSpec(
                self.num_heads, self.embed_dim // self.num_heads, self.mlp_ratio * self.embed_dim
            )
            object.__setattr__(self, "blocks", (block,) * self.depth)
        if len(self.blocks) != self.depth:
            raise ValueError(f"depth is {self.depth} but {len(self.blocks)} blocks were given")
        for layer, rank in zip(self.layers, self.ranks, strict=True):
            if rank is not None and not 1 <= rank <= layer.full_rank:
                raise ValueError(
                    f"rank {rank} of {layer.name} lies outside 1..{layer.full_rank} "
                    f"(None keeps the layer dense)"
                )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Patches and the class token."""
        return self.num_patches + 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, self.in_channels)

    @property
    def layers(self) -> tuple[LinearShape, ...]:
        """The searchable layers, block by block (qkv, fc1, fc2). FLORA section 3."""
        layers = []
        for i, block in enumerate(self.blocks):
            attention_dim = block.num_heads * block.head_dim
            layers += [
                LinearShape(
                    f"blocks.{i}.attn.qkv", self.embed_dim, 3 * attention_dim, self.num_tokens
                ),
                LinearShape(f"blocks.{i}.mlp.fc1", self.embed_dim, block.mlp_dim, self.num_tokens),
                LinearShape(f"blocks.{i}.mlp.fc2", block.mlp_dim, self.embed_dim, self.num_tokens),
            ]
        return tuple(layers)

    @property
    def ranks(self) -> tuple[Rank, ...]:
        return tuple(rank for block in self.blocks for rank in block.ranks)

    def with_ranks(self, ranks: tuple[Rank, ...]) -> "ViTSpec":
        """The same network with these ranks, one a searchable layer."""
        if len(ranks) != len(self.layers):
            raise ValueError(f"expected {len(self.layers)} ranks, got {len(ranks)}")
        blocks = tuple(
            dataclasses.replace(block, ranks=tuple(ranks[3 * i : 3 * i + 3]))
            for i, block in enumerate(self.blocks)
        )
        return dataclasses.replace(self, blocks=blocks)

    def macs(self) -> int:
        """Multiply-adds for one image."""
        tokens, width = self.num_tokens, self.embed_dim
        total = self.num_patches * width * self.in_channels * self.patch_size**2
        for block in self.blocks:
            attention_dim = block.num_heads * block.head_dim
            total += 2 * tokens * width  # the two norms
            total += 2 * tokens * tokens * attention_dim  # q @ k and attention @ v
            total += tokens * attention_dim * width  # output projection
        total += sum(layer.macs(rank) for layer, rank in zip(self.layers, self.ranks, strict=True))
        return total + width + width * self.num_classes  # last norm and head: class token only

    def num_params(self) -> int:
        """Every parameter of the model, as stored."""
        width = self.embed_dim
        total = width * (self.in_channels * self.patch_size**2 + 1)
        total += width + self.num_tokens * width  # class token, position embedding
        for block in self.blocks:
            attention_dim = block.num_heads * block.head_dim
            total += 4 * width  # the two norms
            total += attention_dim * width + width  # output projection
        for layer, rank in zip(self.layers, self.ranks, strict=True):
            total += layer.num_weights(rank) + layer.out_features
        return total + 2 * width + (width + 1) * self.num_classes


_DEIT_WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


def deit(size: str, **overrides) -> ViTSpec:
    """DeiT of the published size: "tiny", "small" or "base"; overrides replace any field."""
    if size not in _DEIT_WIDTHS:
        raise ValueError(f"unknown DeiT size {size!r}; choose one of {', '.join(_DEIT_WIDTHS)}")
    embed_dim, num_heads = _DEIT_WIDTHS[size]
    return ViTSpec(**{"embed_dim": embed_dim, "num_heads": num_heads, **overrides})
