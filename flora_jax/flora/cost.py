"""The cost of an extracted network as a sum over its layers: MACs, parameters, nanoseconds."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from flora_jax.models.spec import Spec, by_block

Range = tuple[float, float]  # the least and the most that a subnet of a budget may cost


@dataclasses.dataclass(frozen=True, eq=False)
class Cost:
    """A fixed part, and what each searchable layer adds at each of its choices.

    Attributes:
      unit: what is counted, such as "MACs".
      fixed: of everything else in the network.
      layers: one int64 array [choices] a layer.
    """

    unit: str
    fixed: int
    layers: tuple[np.ndarray, ...]

    def __call__(self, genes: np.ndarray) -> np.ndarray:
        """genes int [..., L] -> int64 [...]."""
        parts = (layer[genes[..., i]] for i, layer in enumerate(self.layers))
        return sum(parts, np.asarray(self.fixed, np.int64))

    @property
    def least(self) -> int:
        """That of the cheapest choices."""
        return self.fixed + int(sum(choices.min() for choices in self.layers))

    def of_block(self, block: int, triples: np.ndarray) -> np.ndarray:
        """The cost of a block's three layers at each of its gene triples [K, 3], int64 [K]."""
        layers = by_block(self.layers)[block]
        costs = [layer[column] for layer, column in zip(layers, triples.T, strict=True)]
        return np.sum(costs, axis=0)

    def range_over(self, kept) -> tuple[int, int]:
        """The least and the most of any genes out of the triples [K_b, 3] of each block."""
        blocks = [self.of_block(b, triples) for b, triples in enumerate(kept)]
        return (
            self.fixed + int(sum(cost.min() for cost in blocks)),
            self.fixed + int(sum(cost.max() for cost in blocks)),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Variants:
    """The networks that choices make of one: a choice for each of G groups, such as the layers.

    Attributes:
      macs: the cost of every choice; the choices of a group ascend in it.
      kinds: of each group; those of a kind have the same choices in the same place of like blocks.
      spec_of: the spec at the choices int [G].
    """

    macs: Cost
    kinds: Sequence[int]
    spec_of: Callable[[np.ndarray], Spec]

    @property
    def largest(self) -> np.ndarray:
        """The last choice of every group, int [G]."""
        return np.array([len(costs) - 1 for costs in self.macs.layers])


def kinds_of(groups: Iterable[Hashable]) -> list[int]:
    """Numbers each group by the first one that equals it."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(group, number) for number, group in enumerate(groups)]
