"""A tiny network, its batches and settings, and runs of them."""

import itertools
import json

import jax
import numpy as np

import flora_jax as flora
from flora_jax.cluster.mesh import make_mesh, replicate, shard_batch
from flora_jax.data.normalize import Normalization
from flora_jax.models import functional
from flora_jax.training.settings import TrainSettings
from flora_jax.training.step import initial_state, make_step
from flora_jax.training.train import run_steps as train
from tests.helpers.networks import ONE_BLOCK

SPEC = ONE_BLOCK
SPACE = flora.RankSpace.regular(SPEC, ratios=(1 / 2, 1))
NORMALIZATION = Normalization()
# The large epsilon keeps Adam from blowing up rounding differences to whole steps.
SETTINGS = TrainSettings(
    steps=7,
    batch_size=8,
    learning_rate=1e-2,
    epsilon=1e-2,
    ema_decay=0.5,
    label_smoothing=0.3,
    log_every=2,
    checkpoint_every=3,
)


def batch_of(step):
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (SETTINGS.batch_size, *SPEC.image_shape), np.uint8)
    return {"image": images, "label": rng.integers(0, 3, SETTINGS.batch_size).astype(np.int32)}


def interrupted_before(stop):
    """A stream of batches that ends a training before this step, once; and where it was begun."""
    starts = []

    def stream(start):
        starts.append(start)
        for step in itertools.count(start):
            if step == stop and len(starts) == 1:
                raise Interruption
            yield batch_of(step)

    return stream, starts


def batches(start):
    return map(batch_of, itertools.count(start))


def genes_of(step, space=SPACE):
    return space.sample(np.random.default_rng(step), 1)[0]


def a_network(implementation="sliced", seed=0):
    return flora.factorize(flora.create(SPEC, seed), SPACE, implementation=implementation).network


def run(directory, settings=SETTINGS, stream=batches, network=None, mesh=None, **others):
    return train(
        network or a_network(),
        stream,
        settings,
        directory=directory,
        name="test",
        normalization=NORMALIZATION,
        draw_genes=genes_of,
        mesh=mesh,
        **others,
    )


def states(settings, num_steps, network=None, teacher=None, space=SPACE):
    """The states and metrics after each step, by the compiled step alone."""
    network, mesh = network or a_network(), make_mesh()
    structure, parameters = functional.split(network)
    teacher_structure, teacher_parameters = functional.split(teacher) if teacher else (None, None)
    step = make_step(structure, settings, NORMALIZATION, mesh, teacher_structure)
    state = initial_state(structure, jax.tree.map(np.array, parameters), settings)
    found = []
    for i in range(num_steps):
        batch = shard_batch(batch_of(i), mesh)
        teacher_parameters = replicate(teacher_parameters, mesh)
        state, metrics = step(replicate(state, mesh), batch, genes_of(i, space), teacher_parameters)
        found.append(jax.tree.map(np.array, (state, metrics)))
    return found


def parameters_of(model):
    return {name: np.array(value) for name, value in functional.split(model)[1].items()}


def metrics_of(directory):
    """The records of a training, without the one value that is timing."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in records]


class Interruption(Exception):
    pass
