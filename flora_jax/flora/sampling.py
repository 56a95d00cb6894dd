"""Random subnets: low-rank aware and uniform draws, and draws inside a budget (FLORA, section 3).

Low-rank aware sampling draws a block's triple with probability proportional to

    1 / (rho_qkv * rho_fc1 * rho_fc2),    rho = rank / full rank,

blocks independent, one subnet a step. It trains the supernet; local supernets and the random
candidates of the search are drawn uniformly. As in the published code; draws inside a budget are
exact here, without rejection.
"""

import math
from collections.abc import Sequence

import numpy as np

from flora_jax.errors import InputError, unknown
from flora_jax.flora.cost import Cost
from flora_jax.models.spec import LinearShape

SAMPLINGS = ("low_rank_aware", "uniform")
_MAX_CELLS = 2**17


def triple_weights(
    sampling: str,
    layers: Sequence[LinearShape],
    ranks: Sequence[Sequence[int]],
    triples: np.ndarray,
) -> np.ndarray:
    """The weights by which a sampling draws a block's triples, float64 [K].

    Args:
      layers, ranks: the block's three layers, and the ranks that their genes stand for.
      triples: int32 [K, 3], genes.

    Raises:
      InputError: an unknown sampling.
    """
    if sampling not in SAMPLINGS:
        raise InputError(unknown("sampling", sampling, SAMPLINGS))
    weights = np.ones(len(triples))
    if sampling == "low_rank_aware":
        for layer, of_layer, genes in zip(layers, ranks, triples.T, strict=True):
            weights *= layer.full_rank / np.array(of_layer)[genes]
    return weights


class RangeSampler:
    """Uniform draws of genes with the total cost in a range, without rejection.

    Costs are counted in cells of their greatest common divisor; dynamic programming from the last
    block backwards gives the share of completions at every total, so a draw fixes the total first
    and then block after block. Above 2**17 cells a cell is made wider and a cost is rounded down
    to it; then only totals that lie in the range whatever was rounded off are drawn, so every
    draw is legal, and what is lost is a strip of at most one cell a block at either end.

    Args:
      kept: the gene triples to draw from, one int32 array [K_b, 3] a block.
      cost: of the genes.
    """

    def __init__(self, kept: tuple[np.ndarray, ...], cost: Cost):
        self._kept, self.cost = kept, cost
        self._least, self._most = cost.range_over(kept)
        blocks = [cost.of_block(b, triples) for b, triples in enumerate(kept)]
        extra = [block - block.min() for block in blocks]
        span = self._most - self._least
        divisor = int(np.gcd.reduce(np.concatenate(extra))) or 1
        is_exact = span <= divisor * _MAX_CELLS
        self._cell = divisor if is_exact else math.ceil(span / _MAX_CELLS)
        cells = [e // self._cell for e in extra]
        self._rounded_off = int(sum((e % self._cell).max() for e in extra))

        self._groups: list[tuple[np.ndarray, ...]] = []
        self._shares = [np.ones(1)]
        for cell in reversed(cells):
            members = np.argsort(cell, kind="stable")
            values, first, sizes = np.unique(cell[members], return_index=True, return_counts=True)
            later = self._shares[0]
            share = np.zeros(len(later) + int(values[-1]))
            for value, size in zip(values, sizes, strict=True):
                share[value : value + len(later)] += size / len(cell) * later
            self._groups.insert(0, (members, values, first, sizes))
            self._shares.insert(0, share)

    def draw(self, rng: np.random.Generator, n: int, lo: float, hi: float) -> np.ndarray:
        """Genes int32 [n, L]; InputError where nothing costs lo..hi."""
        if not lo <= hi:
            raise InputError(
                f"the {self.cost.unit} range [{lo}, {hi}] is empty: lo must not exceed hi"
            )
        if lo > self._most or hi < self._least:
            raise self._unreachable(lo, hi)
        first, last = 0, len(self._shares[0]) - 1
        if lo > self._least:
            first = -((self._least - math.ceil(lo)) // self._cell)
        if hi < self._most:
            last = (math.floor(hi) - self._least - self._rounded_off) // self._cell
        shares = self._shares[0][first : max(first, last + 1)]
        if not shares.any():
            raise self._unreachable(lo, hi)
        cumulative = np.cumsum(shares)
        # Thresholds in (0, sum] can only fall on a positive share.
        totals = np.searchsorted(cumulative, (1 - rng.random(n)) * cumulative[-1])
        return self._draw_totals(rng, first + totals)

    def _draw_totals(self, rng: np.random.Generator, remaining: np.ndarray) -> np.ndarray:
        genes = []
        for triples, (members, values, first, sizes), later in zip(
            self._kept, self._groups, self._shares[1:], strict=True
        ):
            rest = remaining[:, None] - values
            possible = (rest >= 0) & (rest < len(later))
            share = np.where(possible, sizes * later[np.where(possible, rest, 0)], 0)
            cumulative = np.cumsum(share, axis=1)
            threshold = (1 - rng.random(len(share))) * cumulative[:, -1]
            group = np.sum(cumulative < threshold[:, None], axis=1)
            genes.append(triples[members[first[group] + rng.integers(sizes[group])]])
            remaining = remaining - values[group]
        return np.concatenate(genes, axis=1)

    def _unreachable(self, lo: float, hi: float) -> InputError:
        reachable = np.flatnonzero(self._shares[0])
        costs = self._least + self._cell * reachable
        nearest = reachable[np.argmin(np.maximum(lo - costs, costs - hi))]
        genes = self._draw_totals(np.random.default_rng(0), np.array([nearest]))
        unit, advice = self.cost.unit, ""
        if self._rounded_off:
            width = self._cell + self._rounded_off
            advice = f"; use a range at least {width} {unit} wide"
        return InputError(
            f"no kept genes found inside the {unit} range [{lo}, {hi}]; the space reaches "
            f"{self._least}..{self._most}, the nearest found costs {self.cost(genes)[0]}{advice}"
        )
