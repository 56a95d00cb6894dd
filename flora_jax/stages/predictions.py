"""Are the predictions that a run has stored those of its teacher? A command, not a stage."""

from collections.abc import Iterator

from flora_jax.distillation import StoredTeacher
from flora_jax.run import Run
from flora_jax.stages.flora import filter_part

TOLERANCE = 1e-3  # float16 rounds a probability by 2.5e-4


def check_predictions(run: Run) -> None:
    """Prints how far each training's stored predictions are from a fresh pass of its teacher.

    Raises:
      FileNotFoundError: the run has stored none.
      ValueError: they are damaged, of other images or another teacher, or too far away.
    """
    found = False
    for name, stored in _stored_teachers(run):
        found, difference = True, stored.check()
        print(
            f"{name}: {stored.description.steps} steps stored, the largest difference of a "
            f"probability is {difference.largest:.1e}, the mean {difference.mean:.1e}"
        )
        if difference.largest > TOLERANCE:
            raise ValueError(
                f"{stored.folder} holds other probabilities than the teacher gives: they differ by "
                f"{difference.largest:.2g}, at most {TOLERANCE} is rounding; delete the folder"
            )
    if not found:
        raise FileNotFoundError(f"{run.folder} has stored no predictions")


def _stored_teachers(run: Run) -> Iterator[tuple[str, StoredTeacher]]:
    config = run.config
    for pattern, recipe in (
        ("slim/gates", config.slim.gates),
        ("slim/retrain", config.slim.retrain),
        ("filter/block_*", config.filter.train),
        ("supernet", config.supernet),
        ("finetune/subnet", config.finetune),
        ("finetune/uniform", config.finetune),
        ("finetune/uniform_alone", config.supernet),
    ):
        for folder in sorted(run.folder.glob(f"{pattern}/predictions")):
            name = str(folder.parent.relative_to(run.folder))
            source = filter_part(run) if name.startswith("filter/") else run.splits.train
            teacher = run.dense if name.startswith("slim/") else run.base
            yield name, run.stored_teacher(teacher, recipe, name, source)
