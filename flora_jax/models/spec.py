"""Shapes and costs of the networks: what a model is, before any weight exists.

A compressed model is just another spec, so every block carries its own shape.
MACs (multiply-adds) are counted for one image, as in the tables of FLORA (WACV 2024).
"""

import abc
import dataclasses
import itertools
from collections.abc import Callable
from typing import ClassVar, Self

Rank = int | None  # None: one dense matrix; an integer: a pair of factors of that rank


@dataclasses.dataclass(frozen=True)
class LinearShape:
    """A searchable Linear layer: its sizes, and how many tokens of an image pass through it."""

    name: str
    in_features: int
    out_features: int
    tokens: int
    use_bias: bool = True

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
    """One transformer block.

    Attributes:
      ranks: of its (qkv, fc1, fc2).
      tokens: numbers of the tokens that it works on, ascending, counted in the uncut image; None
        for all of them.
    """

    num_heads: int
    head_dim: int
    mlp_dim: int
    ranks: tuple[Rank, Rank, Rank] = (None, None, None)
    tokens: tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("num_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a block must be at least 1, got {getattr(self, name)}")
        if len(self.ranks) != 3:
            raise ValueError(f"a block has 3 ranks (qkv, fc1, fc2), got {self.ranks}")

    @property
    def attention_dim(self) -> int:
        return self.num_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class BlockInput:
    """What a block works on: tokens of one image, their width, and how many each attends to."""

    width: int
    tokens: int
    attended_tokens: int


class Spec(abc.ABC):
    """What every family's spec can do. A family adds its fields and what lies around its blocks."""

    family: ClassVar[str]

    image_size: int
    in_channels: int
    num_classes: int
    qkv_bias: bool
    blocks: tuple[BlockSpec, ...]

    @property
    @abc.abstractmethod
    def block_inputs(self) -> tuple[BlockInput, ...]:
        """One a block."""

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before those of the patches."""
        return 0

    @property
    @abc.abstractmethod
    def why_tokens_stay(self) -> str | None:
        """Why no token may leave between blocks; None where they may."""

    @abc.abstractmethod
    def _macs_around_blocks(self) -> int: ...

    @abc.abstractmethod
    def _params_around_blocks(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, self.in_channels)

    @property
    def layers(self) -> tuple[LinearShape, ...]:
        """The searchable layers, block by block (qkv, fc1, fc2). FLORA section 3."""
        layers = []
        for i, (block, into) in enumerate(zip(self.blocks, self.block_inputs, strict=True)):
            width, hidden, tokens = into.width, block.mlp_dim, into.tokens
            qkv = 3 * block.attention_dim
            layers += [
                LinearShape(f"blocks.{i}.attn.qkv", width, qkv, tokens, self.qkv_bias),
                LinearShape(f"blocks.{i}.mlp.fc1", width, hidden, tokens),
                LinearShape(f"blocks.{i}.mlp.fc2", hidden, width, tokens),
            ]
        return tuple(layers)

    @property
    def ranks(self) -> tuple[Rank, ...]:
        return tuple(rank for block in self.blocks for rank in block.ranks)

    def with_ranks(self, ranks: tuple[Rank, ...]) -> Self:
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
        total = self._macs_around_blocks()
        for block, into in zip(self.blocks, self.block_inputs, strict=True):
            total += 2 * into.tokens * into.width  # the two norms
            # q @ k and attention @ v
            total += 2 * into.tokens * into.attended_tokens * block.attention_dim
            total += into.tokens * block.attention_dim * into.width  # output projection
        pairs = zip(self.layers, self.ranks, strict=True)
        return total + sum(layer.macs(rank) for layer, rank in pairs)

    def num_params(self) -> int:
        """Every parameter of the model, as stored."""
        total = self._params_around_blocks()
        for block, into in zip(self.blocks, self.block_inputs, strict=True):
            total += 4 * into.width  # the two norms
            total += (block.attention_dim + 1) * into.width  # output projection
        for layer, rank in zip(self.layers, self.ranks, strict=True):
            total += layer.num_weights(rank) + layer.out_features * layer.use_bias
        return total

    def _check_ranks(self) -> None:
        for layer, rank in zip(self.layers, self.ranks, strict=True):
            if rank is not None and not 1 <= rank <= layer.full_rank:
                raise ValueError(
                    f"rank {rank} of {layer.name} lies outside 1..{layer.full_rank} "
                    f"(None keeps the layer dense)"
                )


def check_positive(spec: Spec, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def check_multiple(spec: Spec, name: str, divisor_name: str) -> None:
    value, divisor = getattr(spec, name), getattr(spec, divisor_name)
    if value % divisor:
        nearest = max(1, round(value / divisor)) * divisor
        raise ValueError(
            f"{name} {value} is not a multiple of {divisor_name} {divisor}; "
            f"the nearest that is: {nearest}"
        )


def nearest(value: int, is_legal: Callable[[int], bool]) -> int:
    """The positive integer closest to `value` that is legal, which one must be."""
    outward = (value + sign * distance for distance in itertools.count() for sign in (-1, 1))
    return next(number for number in outward if number > 0 and is_legal(number))
