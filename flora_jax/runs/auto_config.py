"""A config that leaves fields open: they follow from the weights and the images that it names.

Open is what is None; the config says that it may be by a field of its own, `image_size`. The rules
are in `flora_jax.runs.rules`.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import jax

from flora_jax.data.copies import MOST_COMPARED
from flora_jax.data.preprocessing import Preprocessing
from flora_jax.data.splits import load_splits
from flora_jax.errors import InputError
from flora_jax.evaluation.outputs import outputs_title, quality_of
from flora_jax.io.paths import absolute, user_path
from flora_jax.models.spec import Spec, whole_patches
from flora_jax.models.spec_json import spec_to_json
from flora_jax.runs.settings import Settings
from flora_jax.weights.hub import is_repository
from flora_jax.weights.metadata.class_names import positions, read_class_names
from flora_jax.weights.metadata.preprocessing import read_preprocessing
from flora_jax.weights.metadata.spec import read_spec, spec_of_config

log = logging.getLogger(__name__)

# Epochs and learning rate of each training that the rules pass through (docs/decisions.md).
_MEASURED = {"pretrain": (8.0, 1e-2), "supernet": (8.0, 3e-4), "finetune": (12.0, 4e-3)}
_MEASURED_ON_FEATURES = _MEASURED | {"supernet": (16.0, 3e-4)}
_STAGES = ("pretrain", "compress", "finetune", "evaluate", "report")
_OF_THE_PICTURES = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
_DECODING = ("max_megapixels", "background", "exif_orientation")
_MOST_THREADS = 16
_MEASURED_IMAGES, _MEASURED_BATCH = 2000, 64
_FEWEST_EPOCHS, _MOST_EPOCHS = 5.0, 40.0
_LEAST_IMAGES = 8
_BATCHES_AN_EPOCH = 8
_HELD_OUT_A_CLASS, _HELD_OUT_IN_ALL = 30, 300
_ENOUGH_FOR_TOP1 = 5000


def settings_of(config: Mapping) -> Settings:
    """The settings of a config, its open fields filled in, its paths whole: a run may go on from
    another directory. Raises as `Settings.from_config`."""
    settings = Settings.from_config(closed(config) if "image_size" in config else config)
    data, weights = settings.data, settings.pretrained
    kind, _, place = data.name.partition(":")
    data = dataclasses.replace(
        data,
        name=f"{kind}:{_whole(place)}" if place and kind in ("folder", "images") else data.name,
        data_dir=_whole(data.data_dir),
    )
    weights = weights if is_repository(weights) else _whole(weights)
    return dataclasses.replace(settings, data=data, pretrained=weights)


def _whole(path: str) -> str:
    return path and os.fspath(absolute(user_path(path)))


def closed(config: Mapping) -> dict[str, Any]:
    """The same config with a value for every open field; the log says which.

    Raises:
      InputError: it names no weights or images, or they cannot be read.
      MissingFileError: they are not there.
    """
    values = _as_dict(config)
    size = values.pop("image_size")
    needed = {"pretrained": "FOLDER", "data.name": "folder:PATH"}
    if missing := [f"--config.{n}={to}" for n, to in needed.items() if not _get(values, n)]:
        raise InputError(f"nothing to start from: give {' and '.join(missing)}")
    weights, preprocessing = _read_weights(values["pretrained"], values["model"])
    num_images, class_names = _count(values["data"])
    if keeps_outputs := not weights.classifies and weights.num_classes > 0:
        class_names = ()  # labels, numbers or an embedding are what the weights are for
    num_classes = len(class_names)
    size = size or whole_patches(preprocessing.image_size, weights.patch_size)
    if size != weights.image_size and any(block.tokens is not None for block in weights.blocks):
        raise InputError(
            f"image_size {size}: {values['pretrained']} has cut tokens out of images of "
            f"{weights.image_size} pixels, and has no others"
        )
    spec = dataclasses.replace(weights, image_size=size)
    if num_classes and num_classes != weights.num_classes:
        spec = spec.with_classes(num_classes)
    known = read_class_names(values["pretrained"])
    are_others = known and class_names and positions(class_names, known) is None
    has_classifier = weights.num_classes == spec.num_classes and not are_others
    share = values["data"]["heldout_fraction"] or _heldout_fraction(num_images, num_classes)
    num_train = round((1 - share) * num_images)
    if num_train < _LEAST_IMAGES:
        raise InputError(
            f"{values['data']['name']} leaves {num_train} images to train with, beside "
            f"{num_images - num_train} to choose by; at least {_LEAST_IMAGES} are needed"
        )
    shown = quality_of(spec).shown
    found: dict[str, Any] = {
        "stages": _STAGES,
        "train_pretrained": not has_classifier,
        "data.heldout_fraction": share,
        "data.heldout_by": _heldout_by(values["data"]["name"], num_images),
        "data.num_threads": min(os.cpu_count() or 1, _MOST_THREADS),
        "metric": _metric(num_images - num_train) if spec.classifies else shown.name,
    }
    for name in _OF_THE_PICTURES:
        found[f"data.{name}"] = getattr(preprocessing, name)
    measured = _MEASURED if spec.classifies else _MEASURED_ON_FEATURES
    for name, (epochs, rate) in measured.items():
        batch = values[name]["batch_size"] or _batch_size(num_train, jax.device_count())
        found[f"{name}.batch_size"] = batch
        found[f"{name}.epochs"] = _epochs(epochs, num_train)
        found[f"{name}.learning_rate"] = _learning_rate(rate, batch)
    chosen = {name: value for name, value in found.items() if _get(values, name) is None}
    for name, value in chosen.items():
        _set(values, name, value)
    log.info("%s: %s", values["pretrained"], _what(spec))
    if spec.classifies:
        new = "is a linear probe of its features, "
        new += "then trained" if values["train_pretrained"] else "which --config=yours trains on"
        log.info("  its classifier %s", "stays" if has_classifier else new)
    elif keeps_outputs:
        log.info("  it stays, whatever the classes of the images; --config=transfer changes that")
    trained = set(values["stages"]) - (set() if values["train_pretrained"] else {"pretrain"})
    for name, value in chosen.items():
        if name.partition(".")[0] not in {*measured} - trained:
            log.info("  %s = %s", name, value)
    values["model"] = spec_to_json(spec)
    return values


def _read_weights(path: str, name: str | None) -> tuple[Spec, Preprocessing]:
    """The network of the weights, and the preprocessing of its pictures."""
    spec = spec_of_config({"architecture": name}) if name else read_spec(path)
    if any(rank is not None for rank in spec.ranks):
        raise InputError(
            f"{path} has low-rank layers; to start from, all must be dense. As it is, "
            f"--config=transfer trains it on other classes"
        )
    preprocessing = read_preprocessing(path)
    if preprocessing is None:
        preprocessing = Preprocessing(spec.image_size)
        log.warning(
            "nothing beside the weights says how pictures are prepared for them; assumed are %s",
            ", ".join(f"{name} {getattr(preprocessing, name)}" for name in _OF_THE_PICTURES),
        )
    return spec, preprocessing


def _count(data: Mapping) -> tuple[int, tuple[str, ...]]:
    """The number of images to train and to search with, and the names of their classes."""
    splits = load_splits(
        data["name"],
        data_dir=data["data_dir"] or None,
        test_split=data["test_split"] or None,
        heldout_split=data["heldout_split"] or None,
        classes=tuple(data["classes"]),
        **{name: data[name] for name in _DECODING},  # as the run does, so copies are sought once
    )
    return len(splits.train) + len(splits.heldout), splits.class_names


def _what(spec: Spec) -> str:
    return (
        f"{len(spec.blocks)} blocks, {spec.num_params() / 1e6:.3g} M parameters, images of "
        f"{spec.image_size} x {spec.image_size} pixels, {outputs_title(spec)}"
    )


def _as_dict(config: Mapping) -> dict[str, Any]:
    return {
        name: _as_dict(value) if hasattr(value, "items") else value
        for name, value in config.items()
    }


def _get(values: Mapping, name: str):
    section, _, inner = name.rpartition(".")
    return (values[section] if section else values)[inner]


def _set(values: dict, name: str, value) -> None:
    section, _, inner = name.rpartition(".")
    (values[section] if section else values)[inner] = value


# The rules, by the number of images.


def _epochs(measured: float, num_images: int) -> float:
    """As the inverse square root of the number of images, so that few are seen more often."""
    wanted = measured * math.sqrt(_MEASURED_IMAGES / num_images)
    return round(min(max(wanted, _FEWEST_EPOCHS), _MOST_EPOCHS), 1)


def _batch_size(num_images: int, num_devices: int) -> int:
    """64, 256 from 20,000 images on, 1,024 from 200,000 on; at least eight batches an epoch.

    A multiple of the number of devices.
    """
    wanted = _MEASURED_BATCH
    for threshold, larger in ((20_000, 256), (200_000, 1024)):
        if num_images >= threshold:
            wanted = larger
    fits = 2 ** int(math.log2(max(num_images / _BATCHES_AN_EPOCH, _LEAST_IMAGES)))
    return -(-min(wanted, fits) // num_devices) * num_devices


def _learning_rate(measured: float, batch_size: int) -> float:
    """For 512 images; `measured` at a batch of 64.

    The rate of a step grows as the square root of a larger batch, as Adam wants it, and stays in a
    smaller one, for few images make few steps.
    """
    share = _MEASURED_BATCH / batch_size
    return float(f"{measured * (math.sqrt(share) if share < 1 else share):.2g}")


def _heldout_fraction(num_images: int, num_classes: int) -> float:
    """Thirty images a class and 300 in all, but a quarter at most and a fiftieth at least."""
    wanted = max(_HELD_OUT_A_CLASS * num_classes, _HELD_OUT_IN_ALL) / num_images
    return round(min(max(wanted, 0.02), 0.25), 3)


def _metric(num_heldout: int) -> str:
    """The likelihood, which says more on few images, until there are enough for top-1."""
    return "top1" if num_heldout >= _ENOUGH_FOR_TOP1 else "log_likelihood"


def _heldout_by(name: str, num_images: int) -> str:
    """By the contents of a folder of at most 50,000 images, whose comparison takes a minute."""
    return "content" if name.startswith("folder:") and num_images <= MOST_COMPARED else "name"
