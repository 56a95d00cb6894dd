"""Calibration: second moments of what enters the layers of each block, which weigh its factors.

The plain SVD of a kernel W minimises the error of W itself. With G the mean of x x^T over the
tokens x that enter the layer, the error of its outputs on real images is that of W in the norm of
G, and the leading components of an SVD in that norm are the best of their rank (ASVD, arXiv
2312.05821; SVD-LLM, arXiv 2403.07378). No label and no training is needed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from safetensors import numpy as safetensors
from safetensors import safe_open

from flora_jax.cluster.mesh import AXES, SPLIT, WHOLE, make_mesh, on_each_device, replicate, spread
from flora_jax.cluster.processes import StopRequest, Timer, by_the_first, wait_for_all
from flora_jax.errors import InputError
from flora_jax.io.files import on_disk, replacing
from flora_jax.io.paths import user_path
from flora_jax.models import functional
from flora_jax.models.layers import check_images
from flora_jax.models.network import Network
from flora_jax.models.spec import LinearShape, Spec
from flora_jax.progress import Progress

SHRINKAGE = 0.05  # docs/decisions.md
BATCH_SIZE = 64  # images a device at most, where the caller gives no batches
DEVICE_BYTES = 2**30  # of moments that a device computes in one pass over the images
_SECONDS_BETWEEN_SAVES = 60.0
_COUNT = "batches"  # beside the sums in a file
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Second moments and means of what enters qkv, proj, fc1 and fc2 of each block of one model.

    Attributes:
      spec: of the model.
      checksum: of the model's weights (`flora_jax.models.functional`).
      num_images: that the moments are means over.
      moments: float32 [in, in] by the name of the layer: the mean of x x^T over the tokens x of all
        images; and float32 [in] by the name with ".mean": that of x. Any mapping will do, such as
        one that reads a file whenever it is asked.
      shrinkage: share of the moment that is replaced by the same mean square in every direction, in
        (0, 1]; 1 gives the plain SVD.

    Raises:
      InputError: the shrinkage lies outside (0, 1].
    """

    spec: Spec
    checksum: str
    num_images: int
    moments: Mapping[str, np.ndarray]
    shrinkage: float = SHRINKAGE

    def __post_init__(self):
        if not 0 < self.shrinkage <= 1:
            raise InputError(f"shrinkage must lie in (0, 1], got {self.shrinkage}")

    def moment_of(self, layer: LinearShape) -> np.ndarray:
        """The layer's moment, float64 [in, in]."""
        return self.moments[layer.name].astype(np.float64)

    def mean_of(self, name: str) -> np.ndarray:
        """The mean of what enters a layer, float64 [in]."""
        return self.moments[_mean(name)].astype(np.float64)

    def covariance_of(self, name: str) -> np.ndarray:
        """The covariance of what enters a layer, float64 [in, in]."""
        mean = self.mean_of(name)
        return self.moments[name].astype(np.float64) - np.outer(mean, mean)

    def shrunk(self, moment: np.ndarray) -> np.ndarray:
        """The moment that weighs a layer's factors, float64 [in, in], positive definite."""
        size = len(moment)
        mean_square = np.trace(moment) / size
        if mean_square == 0:  # nothing ever enters: every direction counts alike
            return np.eye(size)
        return (1 - self.shrinkage) * moment + self.shrinkage * mean_square * np.eye(size)

    def is_full_rank(self, layer: LinearShape, moment: np.ndarray) -> bool:
        """True where the tokens that entered the layer span all directions, up to rounding."""
        if self.num_images * layer.tokens < layer.in_features:
            return False
        rounding = np.finfo(np.float32).eps * np.diag(moment).max()
        try:
            np.linalg.cholesky(moment - rounding * np.eye(len(moment)))
        except np.linalg.LinAlgError:
            return False
        return True

    def check_fits(self, model: Network) -> None:
        """Raises InputError where this is the calibration of another model."""
        if model.spec != self.spec:
            raise InputError("the calibration is of another model: its spec is another one")
        if functional.checksum(functional.split(model)[1]) != self.checksum:
            raise InputError(
                "the calibration is of another model: the spec is the same, the weights are not; "
                "calibrate this one"
            )


def calibrate(
    model: Network,
    images: np.ndarray | Iterable[np.ndarray],
    *,
    directory: epath.PathLike | None = None,
    normalize: Callable[[jax.Array], jax.Array] | None = None,
) -> Calibration:
    """Second moments of what enters each searchable layer, over all images and devices.

    They are computed in float32 whatever the model's dtype is, summed over the tokens of a batch in
    float32 and over batches in float64. On the host they take 4 bytes for each of the squared input
    widths: 0.5 GB for DeiT-B. A device holds at most 1 GiB of them, or those of one layer; a model
    that has more is run several times over the images.

    Args:
      model: a dense model, slimmed or not.
      images: float32 [n, H, W, C], normalised, or batches of such; in several processes, all
        images in each of them.
      directory: receives the moments, a file for each group of layers, where an interrupted pass
        goes on; the result reads them there. None: they are held in memory.
      normalize: makes normalised images of batches uint8, on the device; hashable.

    Raises:
      InputError: the model is low-rank already, there is no image, images have another shape or
        are not floating point, or what enters a layer is not finite; names the layer.
      Stopped: the process was told to end; what is summed so far is in the directory.
    """
    if any(rank is not None for rank in model.spec.ranks):
        raise InputError("calibration needs a dense model, but this one has low-rank layers")
    batches = image_batches(images, model.spec) if normalize is None else list(images)
    groups, total = layer_groups(model.spec), num_images(batches)
    folder = None if directory is None else user_path(directory)
    files = [folder and folder / f"group_{i:03d}.safetensors" for i in range(len(groups))]
    wait_for_all("groups of moments are looked for")
    done = sum(file is not None and file.exists() for file in files)
    moments: Arrays = {}
    with (
        StopRequest() as stop_request,
        Progress("calibrate", len(groups) * total, done * total, "image") as progress,
    ):
        for layers, file in zip(groups, files, strict=True):
            if file is None or not file.exists():
                found = _moments(
                    *(model, batches, layers, file, normalize or jnp.asarray),
                    *(progress, stop_request),
                )
                if file is not None:
                    _write_once(file, found)
                else:
                    moments |= found
    checksum = functional.checksum(functional.split(model)[1])
    files_of = {
        own: file
        for layers, file in zip(groups, files, strict=True)
        for layer in layers
        for own in (layer.name, _mean(layer.name))
        if file
    }
    return Calibration(model.spec, checksum, total, _Moments(files_of) if folder else moments)


def _moments(
    model: Network,
    batches: list[np.ndarray],
    layers: list[LinearShape],
    file: epath.Path | None,
    normalize: Callable[[jax.Array], jax.Array],
    progress: Progress,
    stop_request: StopRequest,
) -> Arrays:
    """Moments of a group of layers; raises Stopped when what there is of the sums is saved.

    Every process passes the same batches, and all get the same sums.
    """
    mesh = make_mesh()
    structure, parameters = functional.split(model)
    parameters = replicate(parameters, mesh)
    names, partial, start = (
        tuple(la.name for la in layers),
        file and file.with_suffix(f".{len(batches[0])}.partial"),  # other devices, other batches
        0,
    )
    sums: Arrays = {}
    for layer in layers:
        sums[layer.name] = np.zeros((layer.in_features, layer.in_features))
        sums[_mean(layer.name)] = np.zeros(layer.in_features)
    if partial is not None and partial.exists():
        sums = {name: sum.copy() for name, sum in safetensors.load(partial.read_bytes()).items()}
        start = int(sums.pop(_COUNT))
    progress.update(num_images(batches[:start]))
    timer = Timer(_SECONDS_BETWEEN_SAVES)
    for count, batch in enumerate(batches[start:], start=start + 1):
        padded, mask = (spread(array, mesh) for array in shared_by(mesh.size, batch))
        found = batch_sums(structure, mesh, names, normalize, parameters, padded, mask)
        for name in names:
            of_batch = np.asarray(found[name])
            if not np.isfinite(np.trace(of_batch)):
                raise InputError(
                    f"what enters {name} is not finite on the calibration images: the weights "
                    f"before it or the images hold NaN or infinity"
                )
            for own in (name, _mean(name)):
                sums[own] += np.asarray(found[own])
        progress.update(len(batch))
        is_told, is_due = stop_request.is_set(), timer.is_due()
        if partial is not None and (is_told or is_due):
            _write_once(partial, sums | {_COUNT: np.array(count)})
        if is_told:
            raise stop_request.stopped(
                f"calibrate is saved at image {progress.done} of {progress.total}"
            )
    moments: Arrays = {}
    for layer in layers:
        for own in (layer.name, _mean(layer.name)):
            moments[own] = (sums[own] / (layer.tokens * num_images(batches))).astype(np.float32)
    return moments


class _Moments(Mapping[str, np.ndarray]):
    """Moments of layers, read from a file whenever they are asked for."""

    def __init__(self, files: Mapping[str, epath.Path]):
        self._files = files

    def __getitem__(self, name: str) -> np.ndarray:
        with on_disk(self._files[name]) as path, safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@by_the_first
def _write_once(path: epath.Path, arrays: Arrays) -> None:
    with replacing(path) as partial:
        partial.write_bytes(safetensors.save(arrays))


def image_batches(images: np.ndarray | Iterable[np.ndarray], spec: Spec) -> list[np.ndarray]:
    """Lists batches [B, H, W, C] of the images, which are one array or batches already.

    Raises:
      InputError: there is no image, or one has another shape than the spec's or is not floating
        point.
    """
    if isinstance(images, np.ndarray | jax.Array):
        batches = in_batches(np.asarray(images), spec)
    else:
        batches = [np.asarray(batch) for batch in images]
    for batch in batches:
        check_images(batch, spec.image_shape)
    if not num_images(batches):
        raise InputError("calibration needs at least one image")
    return batches


def in_batches(images: np.ndarray, spec: Spec) -> list[np.ndarray]:
    """The images in batches for all devices there are."""
    size = batch_size(spec, jax.device_count())
    return [images[start : start + size] for start in range(0, len(images), size)]


def batch_size(spec: Spec, num_devices: int) -> int:
    """Images of a batch: on each device a power of two that keeps a layer's logits within 1 GiB."""
    logits = max(
        4 * block.num_heads * into.attending_tokens * into.attended_tokens
        for block, into in zip(spec.blocks, spec.block_inputs, strict=True)
    )
    most = min(BATCH_SIZE, max(1, DEVICE_BYTES // logits))
    return num_devices << most.bit_length() - 1


def num_images(batches: Sequence[np.ndarray]) -> int:
    return sum(map(len, batches))


def layer_groups(spec: Spec, device_bytes: int = DEVICE_BYTES) -> list[list[LinearShape]]:
    """The layers with moments in order, in groups whose float32 moments fit `device_bytes`.

    A layer that does not fit alone is a group of its own.
    """
    groups: list[list[LinearShape]] = []
    free = 0
    layers = (
        layer
        for (qkv, fc1, fc2), proj in zip(spec.block_layers, spec.projections, strict=True)
        for layer in (qkv, proj, fc1, fc2)
    )
    for layer in layers:
        needed = 4 * layer.in_features**2
        if needed > free:
            groups.append([])
            free = device_bytes
        groups[-1].append(layer)
        free -= needed
    return groups


def layer_inputs(network: Network, images: jax.Array) -> Iterator[tuple[str, jax.Array]]:
    """What enters each block's qkv, proj, fc1 and fc2, by name, [B*N, in]."""
    x = network.embed(images)
    for number, block in enumerate(network.blocks):
        x = block.entered(x)
        yield f"blocks.{number}.attn.qkv", (enters := block.attention_input(x))
        yield f"blocks.{number}.attn.proj", (context := block.attn.context(enters))
        x = block.convolved(block.after_attention(x, block.attn.proj(context)))
        yield f"blocks.{number}.mlp.fc1", (enters := block.mlp_input(x))
        yield f"blocks.{number}.mlp.fc2", (hidden := block.mlp.hidden(enters))
        x = block.after_mlp(x, block.mlp.fc2(hidden))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def batch_sums(structure, mesh: Mesh, names, normalize, parameters, images, mask):
    def on_one_device(parameters, images, mask):
        parameters = jax.tree.map(lambda p: p.astype(jnp.float32), parameters)
        network = functional.merge(structure, parameters)
        sums = {}
        for name, x in layer_inputs(network, normalize(images).astype(jnp.float32)):
            if name in names:
                sums |= {name: _second_moment(x, mask), _mean(name): _sum(x, mask)}
        return jax.lax.psum(sums, AXES)

    in_specs = (WHOLE, SPLIT, SPLIT)
    return on_each_device(on_one_device, mesh, in_specs, WHOLE)(parameters, images, mask)


def _second_moment(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums x^T x over tokens x [B*N, D], image by image, where mask [B] is 1: float32 [D, D]."""
    x = (x.reshape(len(mask), -1, x.shape[-1]) * mask[:, None, None]).reshape(x.shape)
    return jnp.matmul(x.T, x, precision="highest")


def _sum(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums x [B*N, D] over tokens of the images where mask [B] is 1: float32 [D]."""
    return mask @ x.reshape(len(mask), -1, x.shape[-1]).sum(1)


def _mean(name: str) -> str:
    """The name of a layer's mean beside its moment."""
    return f"{name}.mean"


def shared_by(num_devices: int, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fills a batch up to equal shares; the mask float32 [B] is 0 for what fills it."""
    filling = -len(batch) % num_devices
    mask = np.array([1.0] * len(batch) + [0.0] * filling, np.float32)
    return np.concatenate([batch, np.zeros((filling, *batch.shape[1:]), batch.dtype)]), mask
