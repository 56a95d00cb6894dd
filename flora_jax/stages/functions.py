"""What each stage does; every one reads and writes the folder of its run (`stages/run.py`)."""

from collections.abc import Callable

from flora_jax.runs.images import Images
from flora_jax.stages.calibration import calibrate_factors
from flora_jax.stages.dense import pretrain, transfer
from flora_jax.stages.export import export
from flora_jax.stages.flora import (
    allocate,
    extract_subnets,
    filter_candidates,
    finetune,
    train_whole_supernet,
)
from flora_jax.stages.names import STAGES
from flora_jax.stages.outcome import evaluate
from flora_jax.stages.run import Run
from flora_jax.stages.search import search
from flora_jax.stages.slim import slim_down


def report(run: Run, images: Images | None) -> None:
    """The stage of `report/report.py`, which is imported late: Matplotlib takes 0.4 seconds."""
    from flora_jax.report import report

    report.report(run, images)


_FUNCTIONS = (
    pretrain,
    transfer,
    slim_down,
    calibrate_factors,
    filter_candidates,
    train_whole_supernet,
    allocate,
    search,
    extract_subnets,
    finetune,
    evaluate,
    export,
    report,
)
STAGE_FUNCTIONS: dict[str, Callable[[Run, Images], None]] = dict(
    zip(STAGES, _FUNCTIONS, strict=True)
)
