"""A teacher and its stored predictions."""

import contextlib
import itertools

import flora_jax as flora
from flora_jax.data.augment import Augmentation
from flora_jax.data.batches import train_batches
from flora_jax.data.normalize import Normalization
from flora_jax.data.sources import digits
from flora_jax.data.subsets import subset
from flora_jax.models import functional
from flora_jax.training.stored_predictions import StoredPredictions, describe, write_predictions

SPEC = flora.ViTSpec(
    image_size=8, patch_size=4, in_channels=1, embed_dim=8, depth=1, num_heads=2, num_classes=10
)
NORMALIZATION = Normalization((0.5,), (0.5,))
AUGMENTATION = {"name": "digits", "image_shape": SPEC.image_shape, "scale": (0.9, 1.1)}
BATCH_SIZE, STEPS, SEED = 16, 8, 3
SOURCE = subset(digits(), range(50))  # epochs of 4, 3 and 1 steps
PART = "epoch_0001.part_000_of_001.bin"


def a_model(seed):
    """Scaled up, so that its predictions are not all alike."""
    structure, parameters = functional.split(flora.create(SPEC, seed))
    return functional.merge(structure, {name: 2 * p for name, p in parameters.items()})


def a_description(teacher, **changes):
    fields = {"batch_size": BATCH_SIZE, "steps": STEPS, "seed": SEED, "k": 4, **changes}
    return describe("digits", SOURCE, teacher, augmentation=AUGMENTATION, **fields)


def batches(start, process_index=0, process_count=1):
    return train_batches(
        SOURCE,
        Augmentation("digits", {"scale": (0.9, 1.1)}).train(SPEC.image_shape),
        BATCH_SIZE,
        SEED,
        start,
        process_index,
        process_count,
    )


def first_batches(steps=STEPS, start=0):
    with contextlib.closing(batches(start)) as stream:
        return list(itertools.islice(stream, steps))


def write(folder, description, teacher, processes=1):
    for index in range(processes):
        write_predictions(
            folder,
            description,
            teacher,
            lambda start, index=index: batches(start, index, processes),
            index,
            processes,
        )


def read_all(folder, description, *process):
    reader = StoredPredictions(folder, description, *process)
    return [reader.read(step) for step in range(description.steps)]
