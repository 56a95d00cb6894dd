"""What a run has to show, as the picture and the page draw it."""

import dataclasses
from collections.abc import Mapping, Sequence

from flora_jax.evaluation.quality import TOP1, Metric

Curve = tuple[Sequence[int], Sequence[float]]  # steps [T], values [T]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """The numbers behind the plots of a run; what is empty is not drawn.

    Attributes:
      title: of the whole.
      metric: that models are shown by.
      cost: what budgets are of: "macs", or "ms", milliseconds.
      points: {model: (cost, quality on the test images)}, top-1 in 0..1.
      candidates: {cost: [P], name of the metric: [P] on the held-out images, "generation": [P]},
        all that the search scored.
      windows: the cost (low, high) of each budget.
      ranks: {subnet: [L] ranks, block by block}; None is a dense layer.
      full_ranks: [L] the ranks at which nothing is lost.
      uniform_ratios: of each subnet, the share of full rank that every layer would get at the same
        budget.
      curves: {stage: steps and training loss}, in the order in which they ran.
      accuracies: {stage: {subnet: steps and held-out quality}}, under "" of a plain model.
    """

    title: str = ""
    metric: Metric = TOP1
    cost: str = "macs"
    points: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    candidates: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    windows: Sequence[tuple[float, float]] = ()
    ranks: Mapping[str, Sequence[int | None]] = dataclasses.field(default_factory=dict)
    full_ranks: Sequence[int] = ()
    uniform_ratios: Sequence[float] | None = None
    curves: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    accuracies: Mapping[str, Mapping[str, Curve]] = dataclasses.field(default_factory=dict)

    @property
    def is_searched(self) -> bool:
        """Whether a search has scored anything."""
        return bool(self.candidates and self.candidates["generation"])
