"""A searchable Linear layer: what it is, and what it costs at a rank."""

import dataclasses
from typing import Literal, NamedTuple

Rank = int | None  # None: one dense matrix; an integer: a pair of factors of that rank


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
        """Whether the factor pair of this rank would cost at least the one dense matrix."""
        return rank * (self.in_features + self.out_features) >= self.in_features * self.out_features

    def extracted_rank(self, rank: int) -> Rank:
        """What extraction makes of a rank: None where one dense matrix is cheaper."""
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
