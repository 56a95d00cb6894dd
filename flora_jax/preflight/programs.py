"""A run's steps, compiled from shapes alone: what they need of a device and what they communicate.

The arrays of a step have their places from a mesh, whose devices need not exist.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from flora_jax.closed_form.calibrate import batch_size, batch_sums, layer_groups
from flora_jax.cluster.mesh import SPLIT, WHOLE, parameter_partition
from flora_jax.errors import InputError
from flora_jax.evaluation.evaluate import sum_model_metrics
from flora_jax.evaluation.outputs import quality_of
from flora_jax.flora.supernet import abstract_supernet
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.preflight import hlo
from flora_jax.runs.settings import Settings, network_spec
from flora_jax.slim.gates import SparsityPenalty, abstract_gated
from flora_jax.training.settings import Recipe
from flora_jax.training.step import initial_state, make_step
from flora_jax.training.stored_predictions import TOP

_Shape = jax.ShapeDtypeStruct


class DoesNotFitError(ValueError):
    """A program needs `needed` bytes of a device's memory, more than there is."""

    def __init__(self, needed: float, message: str):
        super().__init__(message)
        self.needed = needed


@dataclasses.dataclass(frozen=True)
class Program:
    """A program compiled for a topology; bytes are those of one device.

    Attributes:
      images: that a device takes at once.
      total: bytes of arguments, temporaries, code, results, and of what is resident.
      seconds: of compiling.
      kernels: calls of Pallas kernels.
      resident: of what stays on the device beside the program: the held-out images.
    """

    images: int
    arguments: int
    temporaries: int
    code: int
    total: int
    seconds: float
    kernels: int
    collectives: list[hlo.Collective]
    resident: int = 0


@dataclasses.dataclass(frozen=True)
class Training:
    """The training stage of a config that asks most of a device.

    Attributes:
      name: of its recipe in the config.
      network: its parameters are shapes.
      genes: that a step takes, int32 [layers]; None for a plain model.
      forward_macs: multiply-adds for one image; of a supernet, the mean over the subnets that
        training draws.
    """

    name: str
    network: Network
    spec: Spec
    genes: jax.ShapeDtypeStruct | None
    recipe: Recipe
    penalty: SparsityPenalty | None
    forward_macs: int

    @property
    def has_teacher(self) -> bool:
        return self.recipe.distill and not self.recipe.stored_predictions

    @property
    def macs(self) -> int:
        """Multiply-adds of a step for one image, forward, backward and of the teacher."""
        passes = 4 if self.recipe.rematerialize else 3
        return passes * self.forward_macs + self.has_teacher * self.spec.macs()


def heaviest_training(settings: Settings, implementation: str) -> Training:
    """The training of the supernet where the config has one, otherwise of gates or a plain model.

    The dense model stands for what becomes of it by slimming: that shape is not known yet. Raises
    InputError where the config trains nothing.
    """
    spec, stages = network_spec(settings), settings.stages
    genes = penalty = None
    if "supernet" in stages:
        space = settings.space.of(spec)
        name, recipe = "supernet", settings.supernet
        genes = _Shape((space.num_layers,), jnp.int32)
        network = abstract_supernet(space, implementation).network
        draws = space.sample(np.random.default_rng(0), 1000, "low_rank_aware")
        macs = round(space.macs(draws).mean())
    elif "slim" in stages:
        name, recipe = "slim.gates", settings.slim.gates
        network = abstract_gated(spec, settings.slim.attention, settings.slim.tokens).network
        penalty, macs = settings.slim.penalty, spec.macs()
    elif {"pretrain", "transfer", "finetune"} & set(stages):
        name = "pretrain" if "pretrain" in stages else "finetune"
        recipe, network, macs = getattr(settings, name), create_abstract(spec), spec.macs()
    else:
        raise InputError(f"none of the stages {list(stages)} trains a model")
    return Training(name, network, spec, genes, recipe, penalty, macs)


def compile_training(settings: Settings, training: Training, mesh: Mesh, images: int) -> Program:
    """The training step at `images` a device, exactly as `flora_jax.train` runs it.

    Raises DoesNotFitError where it needs more memory than a device has.
    """
    spec, batch_size = training.spec, images * mesh.size
    recipe = dataclasses.replace(training.recipe, batch_size=batch_size)
    step_settings = recipe.settings(batch_size, loop_over_blocks=True)  # as on TPU
    structure, parameters = functional.split(training.network)
    teacher_structure, teacher = None, None
    if training.has_teacher:
        teacher_structure, teacher = functional.split(create_abstract(spec))
    batch = {"image": _Shape((batch_size, *spec.image_shape), jnp.uint8)}
    batch["label"] = _Shape((batch_size,), jnp.int32)
    if recipe.distill and recipe.stored_predictions:
        stored = (batch_size, min(TOP, spec.num_classes))
        batch["target_probs"] = _Shape(stored, jnp.float16)
        batch["target_index"] = _Shape(stored, jnp.int16)
    teaching = (teacher_structure, training.penalty)
    step = make_step(structure, step_settings, settings.data.normalization, mesh, *teaching)
    state = jax.eval_shape(lambda p: initial_state(structure, p, step_settings), parameters)
    state = _placed(state, mesh, lambda shape: parameter_partition(shape, mesh))
    batch, genes = _split(batch, mesh), _whole(training.genes, mesh)
    return _compile(step.lower(state, batch, genes, _whole(teacher, mesh)), images)


def compile_evaluation(
    settings: Settings, training: Training, mesh: Mesh, num_heldout: int
) -> Program:
    """The evaluation step, each device with whole parameters and its share of held-out images."""
    structure, parameters = functional.split(training.network)
    images = -(-settings.data.eval_batch_size // mesh.size)
    size = images * mesh.size
    pixels = _Shape((size, *training.spec.image_shape), jnp.float32)
    quality, target = quality_of(training.spec), _Shape((size,), jnp.int32)
    if not quality.by_labels:
        dense, weights = functional.split(create_abstract(training.spec))
        target = jax.eval_shape(
            lambda w, x: quality.of(functional.merge(dense, w), x), weights, pixels
        )
    parameters, genes = _whole((parameters, training.genes), mesh)
    batch = _split((pixels, target, _Shape((size,), jnp.float32)), mesh)
    lowered = sum_model_metrics.lower(structure, quality, mesh, parameters, batch, genes)
    program = _compile(lowered, images)
    resident = -(-num_heldout // size) * images * math.prod(training.spec.image_shape)
    return dataclasses.replace(program, resident=resident, total=program.total + resident)


def compile_calibration(settings: Settings, spec: Spec, mesh: Mesh) -> Program:
    """The step that sums what enters the layers of the dense network, for the largest group."""
    structure, _ = functional.split(create_abstract(spec))
    parameters = functional.split(create_abstract(spec))[1]
    group = max(layer_groups(spec), key=lambda layers: sum(la.in_features**2 for la in layers))
    size = batch_size(spec, mesh.size)
    images = size // mesh.size
    batch, mask = _Shape((size, *spec.image_shape), jnp.uint8), _Shape((size,), jnp.float32)
    arguments = (_whole(parameters, mesh), *_split((batch, mask), mesh))
    names = tuple(layer.name for layer in group)
    lowered = batch_sums.lower(structure, mesh, names, settings.data.normalization, *arguments)
    return _compile(lowered, images)


def _whole(tree, mesh: Mesh):
    return _placed(tree, mesh, lambda _: WHOLE)


def _split(tree, mesh: Mesh):
    return _placed(tree, mesh, lambda _: SPLIT)


def _placed(tree, mesh: Mesh, partition: Callable):
    """Arrays' shapes with the place that each array would have; `partition` takes a shape."""
    return jax.tree.map(
        lambda x: _Shape(x.shape, x.dtype, sharding=NamedSharding(mesh, partition(x.shape))), tree
    )


_NEEDED = re.compile(r"(?:temporaries \(|Used )([\d.]+)([KMG])")


def _compile(lowered, images: int) -> Program:
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        match = _NEEDED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not match:
            raise
        needed = float(match[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[match[2]]
        raise DoesNotFitError(needed, str(error)) from error
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    parts = (
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
    total = sum(parts) + memory.output_size_in_bytes - memory.alias_size_in_bytes
    counted = hlo.num_kernels(text), hlo.collectives(text)
    return Program(images, *parts, total, seconds, *counted)
