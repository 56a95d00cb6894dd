"""flora_jax --predict=FOLDER pictures...: the likeliest classes of pictures."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from etils import epath

from flora_jax.commands.classifier import Classifier, batch_size
from flora_jax.data.decoding import BadImageError, decode_rgb
from flora_jax.data.listing import read_index
from flora_jax.errors import InputError
from flora_jax.evaluation.outputs import OUTPUTS
from flora_jax.io.paths import absolute, as_text, user_path

MOST_CLASSES = 5
_THREADS = 8


class Prediction(NamedTuple):
    """The likeliest "classes" or "labels" (`kind`) of a picture with their probabilities, the first
    of them first, or all its "numbers"."""

    picture: epath.Path
    values: list[tuple[str, float]]
    kind: str


def predict(folder: epath.PathLike, pictures: Sequence[str], as_json: bool = False) -> int:
    """Prints a line a picture: its name and its likeliest classes, or its labels or numbers.

    A picture that cannot be decoded is a line on stderr.

    Args:
      folder: of the model, as in `Classifier.open`.
      pictures: files, and folders that are searched for pictures.
      as_json: print JSON objects.

    Returns:
      How many pictures could not be decoded.

    Raises:
      InputError: no picture is given, or a folder without any; or as `Classifier.open`.
    """
    paths = list(_files(pictures))
    if not paths:
        raise InputError(
            f"no pictures: give files or folders, such as --predict={folder} photos/ cat.jpg"
        )
    num_bad = 0
    for found in predictions(Classifier.open(folder), paths):
        if isinstance(found, BadImageError):
            num_bad += 1
            print(f"error: {found}", file=sys.stderr, flush=True)
        else:
            print(_text(found, as_json), flush=True)
    return num_bad


def predictions(
    classifier: Classifier, paths: Sequence[epath.Path]
) -> Iterator[Prediction | BadImageError]:
    """Predicts each picture, in their order; a bad one gives its error."""
    transform, kind = classifier.transform, classifier.network.spec.kind
    outputs = OUTPUTS[kind]
    run = classifier.readings(outputs.read)
    size = batch_size(len(paths))
    decoding = classifier.preprocessing.decoding

    def read(path: epath.Path) -> np.ndarray | BadImageError:
        try:
            return transform(decode_rgb(path.read_bytes(), os.fspath(path), **decoding))
        except BadImageError as error:
            return error
        except OSError as error:
            return BadImageError(f"{path} cannot be read: {error.strerror or error}")

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(paths), size):
            part = paths[start : start + size]
            images = list(pool.map(read, part))
            batch = np.zeros((size, *transform.image_shape), np.uint8)
            for place, image in zip(batch, images, strict=False):
                if not isinstance(image, BadImageError):
                    place[:] = image
            rows = run(batch)
            for path, image, row in zip(part, images, rows, strict=False):
                best = np.argsort(-row, kind="stable")[:MOST_CLASSES].tolist()
                shown = best if outputs.are_logits else range(len(row))
                found = Prediction(path, [(classifier.name(i), float(row[i])) for i in shown], kind)
                yield image if isinstance(image, BadImageError) else found


def _files(pictures: Sequence[str]) -> Iterator[epath.Path]:
    for path in map(user_path, pictures):
        if path.is_dir():
            for inside, names in sorted(read_index(absolute(path), False, None).images.items()):
                yield from (path / inside / name for name in names)
        else:
            yield path


def _text(found: Prediction, as_json: bool) -> str:
    picture, outputs = as_text(os.fspath(found.picture)), OUTPUTS[found.kind]
    if not as_json:
        texts = (f"{name} {value:{outputs.shown}}" for name, value in found.values)
        return f"{picture}: {', '.join(texts)}"
    unit = "probability" if outputs.are_logits else "value"
    values = [{"name": name, unit: round(value, 6)} for name, value in found.values]
    return json.dumps({"picture": picture, found.kind: values})
