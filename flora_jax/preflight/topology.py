"""Check that a run fits a TPU slice, from the compiler alone: no TPU is needed.

libtpu, on any machine, compiles a config's heaviest training step, its evaluation step and the step
of its calibration for a topology by name.
"""

import collections
import dataclasses
import importlib.metadata
import importlib.util
import logging
import math
import os
import re
from collections.abc import Callable

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from flora_jax.cluster.mesh import equal_share, make_mesh
from flora_jax.errors import InputError, MissingPackageError
from flora_jax.models import functional
from flora_jax.preflight.hlo import size_text
from flora_jax.preflight.programs import (
    DoesNotFitError,
    Program,
    Training,
    compile_calibration,
    compile_evaluation,
    compile_training,
    heaviest_training,
)
from flora_jax.report.table import aligned, human_count
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings

log = logging.getLogger(__name__)

GIB = 2**30
_IMAGENET = 1_281_167  # training images, which need not be here to be counted
_MOST_IMAGES = 4096  # a device; a network that takes more is not short of memory


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation.

    Attributes:
      hbm: bytes of a device's memory that a program can have: the limit that libtpu 0.0.42 names
        when a program is too large. Google's tables (docs.cloud.google.com/tpu/docs/v5e and so
        on) give a chip 32 (v3, two devices), 32, 16, 95 and 32 GB.
      implementation: of the supernet's layers, as `default_implementation` chooses there.
      example: a topology.
      options: of the compiler; without them a v4 chip would be two devices.
    """

    hbm: float
    implementation: str
    example: str
    options: dict[str, str] = dataclasses.field(default_factory=dict)


CHIPS = {
    "v3": Chip(15.48 * GIB, "masked", "v3:4x4"),
    "v4": Chip(30.75 * GIB, "masked", "v4:2x2x4", {"chip_config_name": "megacore"}),
    "v5e": Chip(15.75 * GIB, "tiled", "v5e:4x4"),
    "v5p": Chip(95.74 * GIB, "tiled", "v5p:2x2x4"),
    "v6e": Chip(31.25 * GIB, "tiled", "v6e:4x4"),
}


def use_compiler_only() -> None:
    """Keeps JAX and libtpu from looking for a TPU; to be called before JAX finds its devices."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # others may compile at this time
    jax.config.update("jax_platforms", jax.config.values["jax_platforms"] or "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read such programs back


def devices_of(topology: str) -> tuple[Chip, list[jax.Device]]:
    """The devices of a slice such as "v5e:4x4".

    Raises:
      MissingPackageError: libtpu, the compiler, is not installed.
      InputError: there is no such topology.
    """
    name, _, sides = topology.partition(":")
    chip = CHIPS.get(name)
    if chip is None or not re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology):
        examples = ", ".join(chip.example for chip in CHIPS.values())
        raise InputError(f"unknown topology {topology!r}; give one such as {examples}")
    if importlib.util.find_spec("libtpu") is None:
        raise MissingPackageError("the TPU compiler is not installed: pip install 'jax[tpu]'")
    one = {"chips_per_host_bounds": [1, 1, 1]} if sides == "1x1" else {}
    try:
        return chip, topologies.get_topology_desc(topology, "tpu", **chip.options, **one).devices
    except jax.errors.JaxRuntimeError as error:
        reason = f"its sides must be multiples of 2, as in {chip.example}"
        raise InputError(f"unknown topology {topology!r}; {reason} ({error})") from error


def check_topology(settings: Settings, topology: str) -> str:
    """A table of what training and evaluation need there, and the largest batch that fits.

    It takes at most three compilations of the training step.

    Raises:
      MissingPackageError, InputError: as `devices_of`; a batch or fsdp that cannot be shared by the
        devices; or a step needs more memory than there is, by how much and what to do.
    """
    chip, devices = devices_of(topology)
    mesh = make_mesh(settings.fsdp, devices)
    training = heaviest_training(settings, chip.implementation)
    name, recipe = f"{training.name}.batch_size", training.recipe
    images = equal_share(name, recipe.batch_size, mesh.size, recipe.accumulate)
    programs: dict[int, Program] = {}

    def needed(images: int) -> float:
        log.info("%s: compiling for %d images a device", training.name, images)
        try:
            programs[images] = compile_training(settings, training, mesh, images)
        except DoesNotFitError as error:
            return error.needed
        return programs[images].total

    needed_first = needed(images)
    largest = largest_batch(needed, images, needed_first, chip.hbm, recipe.accumulate)
    if images not in programs:
        raise InputError(_too_much(training, images, needed_first, largest, mesh, chip))
    log.info("evaluation and calibration: compiling")
    parameters = functional.split(training.network)[1].values()
    spec, num_params = training.spec, sum(math.prod(array.shape) for array in parameters)
    whole, num_heldout = make_mesh(1, devices), count_heldout(settings)
    evaluation = compile_evaluation(settings, training, whole, num_heldout or 0)
    rows = [
        (training.name, num_params, training.macs, programs[images]),
        ("evaluation", num_params, training.forward_macs, evaluation),
    ]
    if "calibrate" in settings.stages and settings.calibration.images:
        calibration = compile_calibration(settings, spec, whole)
        rows.append(("calibrate", spec.num_params(), spec.macs(), calibration))
    for name, _, _, program in rows[1:]:
        if program.total > chip.hbm:
            raise InputError(
                f"{name} needs {size_text(program.total)} of a device's {size_text(chip.hbm)}, "
                f"{size_text(program.resident)} of them for held-out images: choose a smaller "
                f"eval_batch_size or heldout_fraction, or more devices"
            )
    title = f"{training.name} on {topology}: {mesh.size} devices of {size_text(chip.hbm)}; "
    title += f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"
    columns = [_column(*row, mesh, chip.hbm) for row in rows]
    titles = sorted({t: None for c in columns for t in c}, key=lambda t: t == "compiled in")
    cells = [[title, *(column.get(title, "") for column in columns)] for title in titles]
    fits = f"{largest} images a device ({human_count(largest * mesh.size)} a step)"
    if largest == _MOST_IMAGES:
        fits = f"at least {fits}"
    elif largest in programs:
        fits += f", which need {size_text(programs[largest].total)}"
    lines = [title, aligned(cells), f"largest batch of those tried that fits: {fits}"]
    if num_heldout is None:
        lines.append(f"not counted: the held-out images of {settings.data.name}, which is not here")
    return "\n".join(lines)


def _column(
    name: str, parameters: int, macs: int, program: Program, mesh: Mesh, memory: float
) -> dict[str, str]:
    """The cells of a column by their titles, from top to bottom; `memory` is a device's, bytes."""
    cells = {
        "": name,
        "parameters": human_count(parameters),
        "images a step": str(program.images * mesh.size),
        "images a device": str(program.images),
        "multiply-adds an image": human_count(macs),
        "multiply-adds a device": human_count(macs * program.images),
        "arguments": size_text(program.arguments),
        "temporaries": size_text(program.temporaries),
        "program": size_text(program.code),
        **({"held-out images": size_text(program.resident)} if program.resident else {}),
        "all together": size_text(program.total),
        "of the memory": f"{100 * program.total / memory:.0f} %",
        "Pallas kernels": str(program.kernels),
    }
    by_kind = collections.defaultdict(list)
    for collective in program.collectives:
        kind = collective.kind + (" in a branch" if collective.in_branch else "")
        by_kind[kind].append(collective.num_bytes)
    cells |= {kind: f"{len(sizes)} of {size_text(sum(sizes))}" for kind, sizes in by_kind.items()}
    return cells | {"compiled in": f"{program.seconds:.0f} s"}


def count_heldout(settings: Settings) -> int | None:
    """The number of images held out; None where the dataset is not on this machine."""
    if settings.data.name.partition(":")[2].startswith("imagenet2012"):
        return round(settings.data.heldout_fraction * _IMAGENET)
    try:
        return len(Images(settings).splits.heldout)
    except InputError:
        return None


def largest_batch(
    needed: Callable[[int], float], images: int, first: float, available: float, multiple: int
) -> int:
    """The most images of those tried that fit, 0 for none; by at most two more trials.

    What a program needs grows at most linearly: the compiler saves where memory is short, so that
    still larger batches may fit. The first guess is as if all of it grew, or the next larger batch;
    the second is on the line through both.

    Args:
      needed: images of a device -> bytes.
      images, first: a batch and what it needs.
      available: bytes.
      multiple: batches are multiples of it and, from 8 images on, of 8.
    """
    tried = {images: first}
    for _ in range(2):
        # On the line through the last two points, or one and zero.
        (x0, y0), (x1, y1) = [(0, 0.0), *tried.items()][-2:]
        ends = _MOST_IMAGES if y1 == y0 else x0 + (available - y0) * (x1 - x0) / (y1 - y0)
        guess = _whole(ends, multiple)
        if guess >= _MOST_IMAGES and max(tried.values()) <= available:
            return _MOST_IMAGES
        if tried.keys() == {guess}:
            guess = _whole(guess + math.lcm(8, multiple), multiple)
        if guess in tried or not guess:
            break
        tried[guess] = needed(guess)
    return max((images for images, size in tried.items() if size <= available), default=0)


def _whole(images: float, multiple: int) -> int:
    step = math.lcm(8, multiple)
    step = step if images >= step else multiple
    return max(0, math.floor(images / step) * step)


def _too_much(
    training: Training, images: int, needed: float, largest: int, mesh: Mesh, chip: Chip
) -> str:
    name, recipe, fsdp = training.name, training.recipe, mesh.shape["fsdp"]
    ways = []
    if 0 < largest < images:
        parts = recipe.accumulate * 2 ** math.ceil(math.log2(images / largest))
        ways.append(f"--config.{name}.accumulate={parts}")
    if not recipe.rematerialize:
        ways.append(f"--config.{name}.rematerialize=True")
    ways.append(f"--config.fsdp={2 * fsdp}")
    fits = f"{largest} images fit" if largest else "no batch that was tried fits"
    return (
        f"{name} at {images} images a device needs at least {size_text(needed)}, "
        f"{size_text(needed - chip.hbm)} more than the {size_text(chip.hbm)} of its memory; "
        f"{fits}. Choose a smaller batch_size, more devices, {', '.join(ways)}"
    )
