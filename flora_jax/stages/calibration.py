"""The calibrate stage: what enters each layer, and the supernet whose factors it weighs."""

from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath
from safetensors import numpy as safetensors
from safetensors import safe_open

from flora_jax.closed_form.calibrate import (
    Arrays,
    Calibration,
    layer_groups,
    means,
    num_images,
    running_sums,
    zero_sums,
)
from flora_jax.cluster.processes import StopRequest, Timer, by_the_first, wait_for_all
from flora_jax.flora.svd import factorize
from flora_jax.io.files import on_disk, replacing
from flora_jax.models import functional
from flora_jax.models.linear_shape import LinearShape
from flora_jax.models.network import Network
from flora_jax.progress import Progress
from flora_jax.runs.images import Images
from flora_jax.stages.run import INHERITED, Run, load_base
from flora_jax.weights import folder

_SECONDS_BETWEEN_SAVES = 60.0
_COUNT = "batches"  # beside the sums in a file


def calibrate_factors(run: Run, images: Images) -> None:
    """Saves the supernet that inherits the dense or slimmed model, weighed on training images."""
    base, calibration = load_base(run), None
    if run.settings.calibration.images:
        calibration = _calibrate(run, images, base)
    space = run.settings.space.of(base.spec)
    folder.save_once(factorize(base, space, calibration=calibration), run.folder / INHERITED)
    _delete_once(epath.Path(run.folder / "calibrate"))


def _calibrate(run: Run, images: Images, base: Network) -> Calibration:
    """Moments of the base model in files, a group of layers each; goes on where it stopped."""
    settings, groups = run.settings.calibration, layer_groups(base.spec)
    batches = list(images.without_augmentation(settings.images, "calibrate"))
    files = [run.folder / f"calibrate/group_{i:03d}.safetensors" for i in range(len(groups))]
    total, places = num_images(batches), dict[str, epath.Path]()
    wait_for_all("groups of moments are looked for")
    done = sum(file.exists() for file in files)
    with (
        StopRequest() as stop_request,
        Progress("calibrate", len(groups) * total, done * total, "image") as progress,
    ):
        for layers, file in zip(groups, files, strict=True):
            places |= dict.fromkeys([layer.name for layer in layers], file)
            if not file.exists():
                sums = _sum_up(run, base, batches, layers, file, progress, stop_request)
                _write_once(file, means(sums, layers, total))
    moments = _Moments(places)
    return Calibration(
        base.spec,
        functional.checksum(functional.split(base)[1]),
        total,
        moments,
        settings.shrinkage,
    )


def _sum_up(
    run: Run,
    base: Network,
    batches: list[np.ndarray],
    layers: list[LinearShape],
    file: epath.Path,
    progress: Progress,
    stop_request: StopRequest,
) -> Arrays:
    """Sums over all batches for a group of layers; raises Stopped when what there is is saved."""
    partial = file.with_suffix(".partial")
    start, sums = _read_partial(partial) or (0, zero_sums(layers))
    progress.update(num_images(batches[:start]))
    timer, normalization = Timer(_SECONDS_BETWEEN_SAVES), run.settings.data.normalization
    summed = running_sums(base, batches[start:], sums, normalize=normalization)
    for count, batch in enumerate(summed, start=start + 1):
        progress.update(len(batch))
        is_told, is_due = stop_request.is_set(), timer.is_due()
        if is_told or is_due:
            _write_once(partial, sums | {_COUNT: np.array(count)})
        if is_told:
            raise stop_request.stopped(
                f"calibrate is saved at image {progress.done} of {progress.total}"
            )
    return sums


class _Moments(Mapping[str, np.ndarray]):
    """Reads the moment of a layer out of its group's file whenever it is asked for."""

    def __init__(self, files: dict[str, epath.Path]):
        self._files = files

    def __getitem__(self, name: str) -> np.ndarray:
        with on_disk(self._files[name]) as path, safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _read_partial(path: epath.Path) -> tuple[int, Arrays] | None:
    """Batches done and the sums over them, of a pass that was interrupted."""
    if not path.exists():
        return None
    sums = {name: array.copy() for name, array in safetensors.load(path.read_bytes()).items()}
    return int(sums.pop(_COUNT)), sums


@by_the_first
def _write_once(path: epath.Path, arrays: Arrays) -> None:
    with replacing(path) as partial:
        partial.write_bytes(safetensors.save(arrays))


@by_the_first
def _delete_once(directory: epath.Path) -> None:
    if directory.exists():
        directory.rmtree()
