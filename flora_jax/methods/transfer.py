"""Transfer (ours): any model, compressed or not, fine-tuned on other classes.

The shape is that of the model in the folder `pretrained`, which a run or `flora_jax.save` wrote, or
Hugging Face or timm; of the config's `model` section only num_classes counts. A file that stands
alone has the shape of that section.
"""

from flora_jax.methods import shared
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.runs.workdir import Run, SavedModel, Step
from flora_jax.training.settings import Recipe
from flora_jax.training.train import train
from flora_jax.weights import folder


def transfer(run: Run) -> None:
    """Fine-tune a finished model on other classes."""
    settings = run.settings
    model = run.step(
        "transfer",
        fine_tune_on_other_classes,
        *(run.spec, settings.pretrained, settings.probe_images, settings.finetune),
        run.metric_of(settings.finetune),
        saved=SavedModel("transfer"),
    )
    shared.finish(run, model)


def fine_tune_on_other_classes(
    step: Step, spec: Spec, pretrained: str, probe_images: int, recipe: Recipe, metric: str
) -> Network:
    """fine-tunes a finished model on other classes"""
    model = shared.read_weights(step, spec, pretrained, probe_images)
    folder.save_description_once(model, step.directory / "training")
    looks = step.images.looked_at()
    place = step.training("transfer/training")
    return train(model, step.images.train_set, recipe, **place, heldout=looks, metric=metric)
