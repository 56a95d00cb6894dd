"""What each stage does; every one reads and writes the folder of its run (`flora_jax.run`)."""

from collections.abc import Callable

from flora_jax.run import Run
from flora_jax.stages.dense import pretrain, transfer
from flora_jax.stages.flora import (
    extract_subnets,
    filter_candidates,
    finetune,
    search,
    train_supernet,
)
from flora_jax.stages.outcome import evaluate, report
from flora_jax.stages.slim import slim_down

# A config's stages come in this order.
STAGES: dict[str, Callable[[Run], None]] = {
    "pretrain": pretrain,
    "transfer": transfer,
    "slim": slim_down,
    "filter": filter_candidates,
    "supernet": train_supernet,
    "search": search,
    "extract": extract_subnets,
    "finetune": finetune,
    "evaluate": evaluate,
    "report": report,
}
