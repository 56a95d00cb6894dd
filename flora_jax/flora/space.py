"""The ranks a network may take: genes, their exact cost, and random draws (FLORA, section 3).

    rank of a layer = round(ratio * full rank),    ratio in 1/8, 2/8, .. 6/8, 1

Genes are indices into each layer's rank choices, int32 [..., L]. Searchable layers come block by
block as (qkv, fc1, fc2), so three genes of a block are a triple. Costs are those of the extracted
network: a layer whose factor pair would cost at least the dense matrix counts as dense.
"""

import bisect
import dataclasses
import functools
import itertools

import numpy as np

from flora_jax.errors import InputError
from flora_jax.flora.cost import Cost, Variants, kinds_of
from flora_jax.flora.sampling import RangeSampler, triple_weights
from flora_jax.models.spec import LAYERS_PER_BLOCK, Spec, by_block


@dataclasses.dataclass(frozen=True, eq=False)
class RankSpace:
    """Rank choices of every searchable layer and the candidates of every block.

    Attributes:
      spec: the dense network.
      choices: L tuples of ascending ranks; the last one is the layer's full rank.
      kept: the candidates: one int32 array [K_b, 3] of gene triples a block, in lexicographic
        order.

    Raises:
      InputError: the spec is not dense, choices do not ascend to full rank, or kept triples are
        missing, repeated or out of range.
    """

    spec: Spec
    choices: tuple[tuple[int, ...], ...]
    kept: tuple[np.ndarray, ...]

    def __post_init__(self):
        layers = self.spec.layers
        if any(rank is not None for rank in self.spec.ranks):
            raise InputError("a rank space needs a dense spec, but this one already has ranks")
        if len(self.choices) != len(layers):
            raise InputError(f"expected choices for {len(layers)} layers, got {len(self.choices)}")
        for layer, ranks in zip(layers, self.choices, strict=True):
            ascending = all(a < b for a, b in itertools.pairwise(ranks))
            if not (ranks and ascending and ranks[0] >= 1 and ranks[-1] == layer.full_rank):
                raise InputError(
                    f"rank choices {tuple(ranks)} of {layer.name} must ascend from at least 1 "
                    f"to its full rank {layer.full_rank}"
                )
        if len(self.kept) != self.num_blocks:
            raise InputError(
                f"expected kept triples for {self.num_blocks} blocks, got {len(self.kept)}"
            )
        kept = tuple(self._checked_triples(b, triples) for b, triples in enumerate(self.kept))
        object.__setattr__(self, "kept", kept)

    def _checked_triples(self, block: int, triples) -> np.ndarray:
        triples = np.asarray(triples)
        if triples.ndim != 2 or triples.shape[1] != LAYERS_PER_BLOCK or len(triples) == 0:
            raise InputError(
                f"kept triples of block {block} have shape {triples.shape}, expected (K, 3), K >= 1"
            )
        triples = self._checked_genes(triples, first_layer=LAYERS_PER_BLOCK * block)
        ordered = np.unique(triples, axis=0)
        if len(ordered) != len(triples):
            raise InputError(f"block {block} repeats some of its {len(triples)} kept triples")
        ordered.setflags(write=False)
        return ordered

    def _checked_genes(self, genes: np.ndarray, first_layer: int) -> np.ndarray:
        """`genes` [..., l] of the l layers from `first_layer` on, in range, as int32."""
        if not np.issubdtype(genes.dtype, np.integer):
            raise InputError(f"genes must be integers, got {genes.dtype}")
        if genes.size:
            flat = genes.reshape(-1, genes.shape[-1])
            extremes = np.stack([flat.min(axis=0), flat.max(axis=0)])
            num_choices = [len(ranks) for ranks in self.choices[first_layer:]][: genes.shape[-1]]
            outside = np.argwhere((extremes < 0) | (extremes >= num_choices))
            if len(outside):
                row, column = outside[0]
                raise InputError(
                    f"gene {extremes[row, column]} of {self.spec.layers[first_layer + column].name}"
                    f" lies outside 0..{num_choices[column] - 1}"
                )
        return genes.astype(np.int32, copy=False)

    @classmethod
    def regular(
        cls, spec: Spec, ratios=(1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 1), tile: int = 1
    ) -> "RankSpace":
        """The space of all triples over ranks `int(round(ratio * full_rank))`, at least 1.

        Ranks below full go to the nearest multiple of `tile`, at least one tile: hardware
        multiplies whole tiles. A layer to which two ratios give the same rank has it once.

        Raises:
          InputError: a ratio lies outside (0, 1] or is repeated, 1 is missing, or tile is below 1.
        """
        if tile < 1:
            raise InputError(f"tile must be at least 1, got {tile}")
        ratios = sorted(ratios)
        for ratio in ratios:
            if not 0 < ratio <= 1:
                raise InputError(f"ratio {ratio} lies outside (0, 1]")
        for smaller, larger in itertools.pairwise(ratios):
            if smaller == larger:
                raise InputError(f"ratio {smaller} is given twice")
        if not ratios or ratios[-1] != 1:
            raise InputError(f"ratios {ratios} must contain 1: full rank is always a choice")
        choices = tuple(
            tuple(sorted({layer.rank_at(ratio, tile) for ratio in ratios})) for layer in spec.layers
        )
        return cls(spec, choices, _every_triple(choices))

    def keep(self, kept) -> "RankSpace":
        """The same choices with only these gene triples, one integer array [K_b, 3] a block."""
        return dataclasses.replace(self, kept=tuple(kept))

    def to_json(self) -> dict:
        """Choices and candidates as plain lists; the spec is saved elsewhere."""
        return {
            "choices": [list(ranks) for ranks in self.choices],
            "kept": [triples.tolist() for triples in self.kept],
        }

    @classmethod
    def from_json(cls, spec: Spec, data: dict) -> "RankSpace":
        """The space that `to_json` described; raises InputError where it does not fit the spec."""
        if missing := {"choices", "kept"} - set(data):
            raise InputError(f"a rank space needs {' and '.join(sorted(missing))}")
        return cls(spec, tuple(tuple(ranks) for ranks in data["choices"]), tuple(data["kept"]))

    @property
    def num_layers(self) -> int:
        return len(self.choices)

    @property
    def num_blocks(self) -> int:
        return self.num_layers // LAYERS_PER_BLOCK

    @property
    def full_rank_triples(self) -> np.ndarray:
        """int32 [blocks, 3]: the genes of every block at full rank."""
        return self.full_rank_genes.reshape(-1, LAYERS_PER_BLOCK)

    @property
    def full_rank_genes(self) -> np.ndarray:
        """int32 [L]: the last choice everywhere."""
        return np.array([len(ranks) - 1 for ranks in self.choices], np.int32)

    @property
    def cheapest_genes(self) -> np.ndarray:
        """int32 [L]: the candidate of the least MACs in every block."""
        return np.concatenate(
            [triples[self.block_macs(b).argmin()] for b, triples in enumerate(self.kept)]
        )

    @property
    def middle_genes(self) -> np.ndarray:
        """int32 [L]: in every block the candidate nearest to the middle choice of each layer."""
        middle = self.full_rank_triples // 2
        distances = (abs(triples - m).sum(-1) for triples, m in zip(self.kept, middle, strict=True))
        return np.concatenate([t[d.argmin()] for t, d in zip(self.kept, distances, strict=True)])

    @functools.cached_property
    def _weights(self) -> tuple[np.ndarray, ...]:
        """The stored weights of each layer at each of its choices, int64."""
        return tuple(
            np.array([layer.num_weights(layer.extracted_rank(rank)) for rank in ranks], np.int64)
            for layer, ranks in zip(self.spec.layers, self.choices, strict=True)
        )

    @functools.cached_property
    def macs_cost(self) -> Cost:
        """MACs of the extracted network for one image."""
        layers = self.spec.layers
        tables = (layer.tokens * w for layer, w in zip(layers, self._weights, strict=True))
        fixed = self.spec.macs() - sum(layer.macs(None) for layer in layers)
        return Cost("MACs", fixed, tuple(tables))

    @property
    def fixed_macs(self) -> int:
        """MACs of everything that is not a searchable layer."""
        return self.macs_cost.fixed

    def validate(self, genes) -> np.ndarray:
        """genes [..., L] as int32; InputError on a wrong length, dtype or value."""
        genes = np.asarray(genes)
        if genes.ndim == 0 or genes.shape[-1] != self.num_layers:
            raise InputError(f"genes have shape {genes.shape}, expected (..., {self.num_layers})")
        return self._checked_genes(genes, first_layer=0)

    def ranks(self, genes) -> np.ndarray:
        """genes [..., L] -> ranks int64 [..., L]."""
        genes = self.validate(genes)
        columns = [np.array(c, np.int64)[genes[..., i]] for i, c in enumerate(self.choices)]
        return np.stack(columns, axis=-1)

    def extracted_spec(self, genes) -> Spec:
        """genes [L] -> the spec of the extracted network."""
        pairs = zip(self.spec.layers, self.ranks(genes).tolist(), strict=True)
        return self.spec.with_ranks(tuple(layer.extracted_rank(rank) for layer, rank in pairs))

    def macs(self, genes) -> np.ndarray:
        """genes [..., L] -> MACs of the extracted network for one image, int64 [...]."""
        return self.macs_cost(self.validate(genes))

    def params(self, genes) -> np.ndarray:
        """genes [..., L] -> parameters of the extracted network, int64 [...]."""
        fixed = self.spec.num_params() - sum(layer.num_weights(None) for layer in self.spec.layers)
        return Cost("parameters", fixed, self._weights)(self.validate(genes))

    def variants(self) -> Variants:
        """The extracted networks of all genes, for `weights.export.latency`."""
        blocks = zip(self.spec.blocks, self.spec.block_inputs, by_block(self.choices), strict=True)
        groups = ((*block, place) for block in blocks for place in range(LAYERS_PER_BLOCK))
        return Variants(self.macs_cost, kinds_of(groups), self.extracted_spec)

    def block_macs(self, block: int) -> np.ndarray:
        """int64 [K_b]: MACs of the three searchable layers for each candidate of a block."""
        return self.macs_cost.of_block(block, self.kept[block])

    def macs_range(self) -> tuple[int, int]:
        """Least and most MACs of any kept genes."""
        return self.macs_cost.range_over(self.kept)

    def contains(self, genes) -> np.ndarray:
        """genes [..., L] -> bool [...]: whether every block's triple is a kept one."""
        genes = self.validate(genes)
        inside = np.ones(genes.shape[:-1], bool)
        in_blocks = genes.reshape(*inside.shape, -1, LAYERS_PER_BLOCK)
        for b, (triples, choices) in enumerate(zip(self.kept, by_block(self.choices), strict=True)):
            is_kept = np.zeros([len(ranks) for ranks in choices], bool)
            is_kept[tuple(triples.T)] = True
            inside &= is_kept[tuple(np.moveaxis(in_blocks[..., b, :], -1, 0))]
        return inside

    def sample(self, rng: np.random.Generator, n: int, sampling: str = "uniform") -> np.ndarray:
        """`n` random genes int32 [n, L], blocks independent, over the candidates.

        "low_rank_aware" draws a triple with probability proportional to the product of 1/ratio over
        its layers, ratio = rank / full rank.

        Raises:
          InputError: an unknown sampling.
        """
        of_blocks = zip(self.kept, self.spec.block_layers, by_block(self.choices), strict=True)
        genes = []
        for triples, layers, ranks in of_blocks:
            weights = triple_weights(sampling, layers, ranks, triples)
            genes.append(triples[rng.choice(len(triples), size=n, p=weights / weights.sum())])
        return np.concatenate(genes, axis=1)

    def sample_within(self, rng: np.random.Generator, n: int, macs) -> np.ndarray:
        """`n` genes int32 [n, L], uniform over the kept ones with macs inside [lo, hi].

        See RangeSampler for how spaces with very many distinct costs are treated.

        Raises:
          InputError: no kept genes cost lo..hi; names the feasible range and the nearest MACs.
        """
        return self._range_sampler.draw(rng, n, *macs)

    @functools.cached_property
    def _range_sampler(self) -> RangeSampler:
        return RangeSampler(self.kept, self.macs_cost)

    def uniform_ranks_within(self, hi: int) -> tuple[int, ...]:
        """L ranks at the largest common ratio whose extracted network costs at most `hi` MACs.

        Ratios are k / R, R the largest full rank; ranks are not restricted to the choices.
        """
        layers = self.spec.layers
        largest = max(layer.full_rank for layer in layers)

        def ranks(k):
            return tuple(layer.rank_at(k / largest) for layer in layers)

        def macs(k):
            pairs = zip(layers, ranks(k), strict=True)
            return self.fixed_macs + sum(la.macs(la.extracted_rank(r)) for la, r in pairs)

        best = bisect.bisect_right(range(1, largest + 1), hi, key=macs)
        if best == 0:
            raise InputError(f"no uniform rank costs at most {hi} MACs; the least is {macs(1)}")
        return ranks(best)


def _every_triple(choices) -> tuple[np.ndarray, ...]:
    """All gene triples [K_b, 3] of each block."""
    return tuple(
        np.array(list(np.ndindex(*map(len, of_block))), np.int32) for of_block in by_block(choices)
    )
