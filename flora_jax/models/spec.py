"""Shapes and costs of the networks: what a model is, before any weight exists.

A compressed model is just another spec, so every block carries its own shape.
MACs (multiply-adds) are counted for one image, as in the tables of FLORA (WACV 2024).
"""

import abc
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple, Self, TypeVar

from flora_jax.errors import InputError, check_at_least, hold_plain_values

_Field = TypeVar("_Field")


def later(default: _Field) -> _Field:
    """A field of a spec that others do not have: where it is at its default, it goes unsaid."""
    return dataclasses.field(default=default, metadata={"later": True})


Rank = int | None  # None: one dense matrix; an integer: a pair of factors of that rank
Ranks = tuple[Rank, Rank, Rank]  # of a block's (qkv, fc1, fc2)
LAYERS_PER_BLOCK = 3
# What the outputs of a head mean: classes that exclude each other, labels that each apply or not,
# numbers, or a vector in a space that other networks share, such as CLIP's of texts.
OUTPUTS = ("classes", "labels", "numbers", "embedding")


@dataclasses.dataclass(frozen=True)
class LinearShape:
    """A searchable Linear layer.

    Attributes:
      name: of the module, such as "blocks.0.attn.qkv".
      tokens: of an image, that pass through it.
      use_bias: False: it adds none.
      key_bias: False: of the (query, key, value) that it makes, the key has no bias.
      singular_values_into: the factor of a pair, "down" or "up", that inherits them from an SVD.
    """

    name: str
    in_features: int
    out_features: int
    tokens: int
    use_bias: bool = True
    key_bias: bool = True
    singular_values_into: Literal["down", "up"] = "down"

    @property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)

    @property
    def bias_features(self) -> int:
        """The size of its bias as stored; 0 for none."""
        features = self.out_features if self.key_bias else 2 * self.out_features // 3
        return features * self.use_bias

    def is_cheaper_dense(self, rank: int) -> bool:
        """True where the factor pair of this rank would cost at least the one dense matrix."""
        return rank * (self.in_features + self.out_features) >= self.in_features * self.out_features

    def extracted_rank(self, rank: int) -> Rank:
        """The rank as extracted: None where one dense matrix is cheaper."""
        return None if self.is_cheaper_dense(rank) else rank

    def rank_at(self, ratio: float, tile: int = 1) -> int:
        """The rank at a share of full rank; short of full rank a multiple of the tile."""
        rank = round(ratio * self.full_rank)
        if rank == self.full_rank:
            return rank
        return min(max(1, round(rank / tile)) * tile, self.full_rank)

    def num_weights(self, rank: Rank) -> int:
        """Weights without the bias, as stored: factors for an integer rank."""
        if rank is None:
            return self.in_features * self.out_features
        return rank * (self.in_features + self.out_features)

    def macs(self, rank: Rank) -> int:
        return self.tokens * self.num_weights(rank)


class BlockLayers(NamedTuple):
    """The searchable layers of one block, in the order of its ranks and genes."""

    qkv: LinearShape
    fc1: LinearShape
    fc2: LinearShape


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One transformer block.

    Attributes:
      mlp_dim: hidden units of its MLP; a gated one computes each out of two products.
      ranks: of its (qkv, fc1, fc2).
      tokens: numbers of the tokens that it works on, ascending, counted in the uncut image; None
        for all of them.
      rotary_pairs: where positions turn queries and keys: for each head, numbers of the pairs
        (i, i + d/2) of dimensions that it has, counted in the uncut head; None for all in order.
    """

    num_heads: int
    head_dim: int
    mlp_dim: int
    ranks: Ranks = (None, None, None)
    tokens: tuple[int, ...] | None = None
    rotary_pairs: tuple[tuple[int, ...], ...] | None = later(None)

    def __post_init__(self):
        hold_plain_values(self)
        check_at_least(self, 1, "num_heads", "head_dim", "mlp_dim")
        if len(self.ranks) != LAYERS_PER_BLOCK:
            raise InputError(f"a block has 3 ranks (qkv, fc1, fc2), got {self.ranks}")

    @property
    def attention_dim(self) -> int:
        return self.num_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class BlockInput:
    """The input of a block: tokens of one image, their width, and how many each attends to.

    `padding` counts tokens that fill up windows: they attend, and are attended to, as all others.
    """

    width: int
    tokens: int
    attended_tokens: int
    padding: int = 0

    @property
    def attending_tokens(self) -> int:
        return self.tokens + self.padding


class Spec(abc.ABC):
    """A network's shape. A family adds its fields and what lies around its blocks."""

    family: ClassVar[str]
    title: ClassVar[str]  # of the family, for people
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]  # every family's spec is one

    image_size: int
    patch_size: int
    in_channels: int
    num_classes: int
    outputs: str
    qkv_bias: bool = True  # these eight are fields of some families only
    k_bias: bool = True
    post_norm: bool = False
    cosine_attention: bool = False
    head_bias: bool = True
    gated_mlp: bool = False
    mlp_norm: bool = False
    rope_theta: float | None = None
    blocks: tuple[BlockSpec, ...]

    @property
    @abc.abstractmethod
    def block_inputs(self) -> tuple[BlockInput, ...]:
        """The input of each block."""

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before those of the patches."""
        return 0

    @property
    def pools_prefix(self) -> bool:
        """True where what is pooled is a normalised prefix token, or the mean of two."""
        return False

    @property
    def num_read_tokens(self) -> int:
        """Tokens in front that outputs are made of, where the patches are not."""
        return 0

    @property
    @abc.abstractmethod
    def pooled_dim(self) -> int:
        """Width of what the head takes."""

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
    def block_layers(self) -> tuple[BlockLayers, ...]:
        """The searchable layers of every block (FLORA section 3).

        As published, the singular values go into the output side of fc2 only.
        """
        found = []
        for i, (block, into) in enumerate(zip(self.blocks, self.block_inputs, strict=True)):
            width, hidden, tokens = into.width, block.mlp_dim, into.tokens
            attending = into.attending_tokens
            qkv, fc1 = 3 * block.attention_dim, hidden * (1 + self.gated_mlp)
            bias = (self.qkv_bias, self.k_bias)
            found.append(
                BlockLayers(
                    qkv=LinearShape(f"blocks.{i}.attn.qkv", width, qkv, attending, *bias),
                    fc1=LinearShape(f"blocks.{i}.mlp.fc1", width, fc1, tokens),
                    fc2=LinearShape(
                        f"blocks.{i}.mlp.fc2", hidden, width, tokens, singular_values_into="up"
                    ),
                )
            )
        return tuple(found)

    @property
    def projections(self) -> tuple[LinearShape, ...]:
        """The output projection of every block's attention, which is no searchable layer."""
        blocks = enumerate(zip(self.blocks, self.block_inputs, strict=True))
        return tuple(
            LinearShape(
                f"blocks.{i}.attn.proj", block.attention_dim, into.width, into.attending_tokens
            )
            for i, (block, into) in blocks
        )

    @property
    def layers(self) -> tuple[LinearShape, ...]:
        """The searchable layers, block by block."""
        return tuple(layer for layers in self.block_layers for layer in layers)

    @property
    def ranks(self) -> tuple[Rank, ...]:
        return tuple(rank for block in self.blocks for rank in block.ranks)

    def with_ranks(self, ranks: tuple[Rank, ...]) -> Self:
        """The same network with these ranks, one a searchable layer."""
        if len(ranks) != len(self.layers):
            raise InputError(f"expected {len(self.layers)} ranks, got {len(ranks)}")
        blocks = tuple(
            dataclasses.replace(block, ranks=own_ranks)
            for block, own_ranks in zip(self.blocks, by_block(ranks), strict=True)
        )
        return dataclasses.replace(self, blocks=blocks)

    @property
    def kind(self) -> str:
        """What the network gives: one of OUTPUTS, or "features" without a head.

        One output alone is a number: as the share of one class among one it would always be 1.
        """
        if not self.num_classes:
            return "features"
        is_one = self.outputs == "classes" and self.num_classes == 1
        return "numbers" if is_one else self.outputs

    @property
    def classifies(self) -> bool:
        """Whether the outputs are logits of classes that exclude each other."""
        return self.kind == "classes"

    def with_classes(self, num_classes: int) -> Self:
        """The same network with a classifier of so many classes in the place of its head."""
        bias = {} if self.head_bias else {"head_bias": True}
        return dataclasses.replace(self, num_classes=num_classes, outputs="classes", **bias)

    def check_classifies(self, what: str, instead: str = "") -> None:
        """Raises InputError where the network has no classifier; `what` needs one.

        Args:
          instead: what can be done without one.
        """
        if not self.classifies:
            found = f"outputs are {self.num_classes} {self.kind}, not exclusive classes"
            raise InputError(
                f"{what} needs a classifier, but this network gives "
                + (found if self.num_classes else "features: num_classes is 0")
                + (f"; {instead}" if instead else "")
            )

    def macs(self) -> int:
        """Multiply-adds for one image: of every product, and one for each value of a norm.

        Biases, activations, gates, softmax, the turning by rotary positions, the lengths that a
        cosine divides by, and what depends on weights alone count nothing. Tokens that pad windows
        count as all others.
        """
        total = self._macs_around_blocks()
        for block, into in zip(self.blocks, self.block_inputs, strict=True):
            attending = into.attending_tokens
            normalised = into.tokens if self.post_norm else attending
            total += (normalised + into.tokens) * into.width  # the two norms
            total += self.mlp_norm * into.tokens * block.mlp_dim
            # q @ k and attention @ v
            total += 2 * attending * into.attended_tokens * block.attention_dim
            total += attending * block.attention_dim * into.width  # output projection
        pairs = zip(self.layers, self.ranks, strict=True)
        return total + sum(layer.macs(rank) for layer, rank in pairs)

    def num_params(self) -> int:
        """Every parameter of the model, as stored."""
        total = self._params_around_blocks()
        for block, into in zip(self.blocks, self.block_inputs, strict=True):
            total += 4 * into.width  # the two norms
            total += self.mlp_norm * 2 * block.mlp_dim
            total += (block.attention_dim + 1) * into.width  # output projection
        for layer, rank in zip(self.layers, self.ranks, strict=True):
            total += layer.num_weights(rank) + layer.bias_features
        return total

    def _fill_stages(self, stages, first: int, mlp_dim: Callable[[int], int]) -> None:
        """Fills `blocks`, where none are given, with equal ones a stage, and checks them.

        Args:
          stages: with their `depth`, `width` and `num_heads`.
          first: number of the first of them, by which an error names them.
          mlp_dim: of the width.

        Raises:
          InputError: a width is not a multiple of num_heads, there are too many or too few blocks,
            tokens that leave, or a rank that lies outside 1..full rank.
        """
        depth = sum(stage.depth for stage in stages)
        blocks: list[BlockSpec] = []
        for number, stage in enumerate(() if self.blocks else stages, start=first):
            width, num_heads = stage.width, stage.num_heads
            if width % num_heads:
                divisors = [n for n in range(1, width + 1) if width % n == 0]
                raise InputError(
                    f"stage {number} has width {width}, not a multiple of its num_heads "
                    f"{num_heads}; the nearest that divides it: "
                    f"{nearest(num_heads, divisors.__contains__)}"
                )
            block = BlockSpec(num_heads, width // num_heads, mlp_dim(width))
            blocks += [block] * stage.depth
        if not self.blocks:
            object.__setattr__(self, "blocks", tuple(blocks))
        if len(self.blocks) != depth:
            raise InputError(
                f"the depths make {depth} blocks with attention, but {len(self.blocks)} were given"
            )
        if any(block.tokens is not None for block in self.blocks):
            raise InputError(f"no token can leave: {self.why_tokens_stay}")
        self._check_ranks()

    def _check_ranks(self) -> None:
        for layer, rank in zip(self.layers, self.ranks, strict=True):
            if rank is not None and not 1 <= rank <= layer.full_rank:
                raise InputError(
                    f"rank {rank} of {layer.name} lies outside 1..{layer.full_rank} "
                    f"(None keeps the layer dense)"
                )


_Each = TypeVar("_Each")


def by_block(each: Sequence[_Each]) -> list[tuple[_Each, _Each, _Each]]:
    """The values of all searchable layers, as one triple a block."""
    return list(zip(each[0::3], each[1::3], each[2::3], strict=True))


def whole_patches(image_size: int, patch_size: int) -> int:
    """The side without the pixels that fill no patch: a convolution leaves them out."""
    return image_size // patch_size * patch_size


def check_multiple(spec: Spec, name: str, divisor_name: str) -> None:
    value, divisor = getattr(spec, name), getattr(spec, divisor_name)
    if value % divisor:
        nearest = max(1, round(value / divisor)) * divisor
        raise InputError(
            f"{name} {value} is not a multiple of {divisor_name} {divisor}; "
            f"the nearest that is: {nearest}"
        )


def nearest(value: int, is_legal: Callable[[int], bool]) -> int:
    """The positive integer closest to `value` that is legal, which one must be."""
    outward = (value + sign * distance for distance in itertools.count() for sign in (-1, 1))
    return next(number for number in outward if number > 0 and is_legal(number))


def macs(spec: Spec) -> int:
    """Multiply-adds for one image of a model of this spec."""
    return spec.macs()


def num_params(spec: Spec) -> int:
    """Every parameter of a model of this spec."""
    return spec.num_params()
