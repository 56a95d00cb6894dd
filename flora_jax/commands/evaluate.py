"""flora_jax --evaluate=FOLDER --data=DATASET: accuracy of a model on labelled pictures."""

import collections
import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from flora_jax.commands.classifier import Classifier, batch_size
from flora_jax.data.batches import eval_batches
from flora_jax.data.image_folder import image_folder
from flora_jax.data.labels import check_labels
from flora_jax.data.sources import SkippingSource, Source, tfds
from flora_jax.data.splits import load_splits
from flora_jax.errors import InputError, few
from flora_jax.io.paths import as_text, user_path
from flora_jax.timing import describe_device
from flora_jax.weights.metadata.class_names import CLASSES_FILE, positions

log = logging.getLogger(__name__)

_TOP = 5
_MOST_PAIRS = 3
_MOST_LINES = 40  # of a table of classes
_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Accuracy of a model on labelled images; shares lie in 0..1.

    Attributes:
      images: how many were evaluated.
      skipped: how many could not be decoded.
      data_classes: how many of the model's classes the data has; all of them can be answered.
      top1: share whose class comes first.
      commonest: share of the commonest class, which is the top-1 of what always says that.
      top5: share whose class is among the first five; None where there are no more classes.
      log_likelihood: of the right class, the mean; None where class embeddings classify, whose
        cosines are no likelihoods.
      ms_per_image: milliseconds of the network on `device` in batches of `batch_size`.
      classes: {"name", "top1" (None without images), "images"} of each class of the model.
      confused: the commonest mistakes: {"class", "taken_for", "images"}.
    """

    images: int
    skipped: int
    data_classes: int
    top1: float
    commonest: float
    top5: float | None
    log_likelihood: float | None
    ms_per_image: float
    batch_size: int
    device: str
    classes: list[dict]
    confused: list[dict]


def evaluate(
    folder: epath.PathLike,
    data: str,
    split: str | None = None,
    as_json: bool = False,
    class_embeddings: epath.PathLike | None = None,
) -> None:
    """Prints how good the model in a folder is on a dataset.

    Args:
      folder, class_embeddings: of the model, as in `Classifier.open`.
      data: the dataset, as in `load_splits`.
      split: of it; None: its test split.
      as_json: print one JSON object.

    Raises:
      InputError: as `Classifier.open`, `load_splits` and `matched`.
    """
    classifier = Classifier.open(folder, class_embeddings)
    source = load_source(data, split, **classifier.preprocessing.decoding)
    found = evaluated(classifier, source, data)
    if as_json:
        about = {"model": str(folder), "data": data, "split": split}
        print(json.dumps(about | dataclasses.asdict(found)))
    else:
        print(_text(found))


def load_source(data: str, split: str | None = None, **decoding: Any) -> Source:
    """The labelled images of one split. Arguments and errors as in `load_splits`."""
    kind, _, place = data.partition(":")
    if kind == "tfds":
        return tfds(place, split or "validation", **decoding)
    if kind == "folder" and (split or (user_path(place) / "val").is_dir()):
        return image_folder(place, split or "val", **decoding)
    if split:
        raise InputError(f"--split needs a dataset with splits, tfds: or folder:, not {data}")
    return load_splits(data, **decoding).test


def evaluated(classifier: Classifier, source: Source, data: str) -> Evaluation:
    """Runs the model over every image of the source that can be decoded, once.

    Raises:
      InputError: the images have no labels, no image can be decoded, or as `matched`.
    """
    if not source.num_classes:
        raise InputError(f"{data} has no labels, so nothing can be right or wrong in it")
    is_by_texts = classifier.class_embeddings is not None
    if not is_by_texts:
        classifier.network.spec.check_classifies("accuracy on images of one class each")
    num_classes = classifier.num_classes
    label_of = matched(classifier.class_names, num_classes, source.class_names, data)
    if not classifier.class_names:
        classifier = dataclasses.replace(classifier, class_names=source.class_names)
    check_labels(source.labels, source.num_classes, data)
    run, size = classifier.scores(), batch_size(len(source))
    run(np.zeros((size, *classifier.transform.image_shape), np.uint8))  # compiles
    confusion = np.zeros((num_classes, num_classes), np.int64)
    log_likelihoods, ranks, seconds, num_batches = [], [], 0.0, 0
    source = SkippingSource(source)
    for batch in eval_batches(source, classifier.transform, size, _THREADS):
        started = time.perf_counter()
        rows = run(batch["image"])
        seconds, num_batches = seconds + time.perf_counter() - started, num_batches + 1
        is_image = batch["mask"] > 0
        rows, labels = rows[is_image], label_of[batch["label"][is_image]]
        right = np.take_along_axis(rows, labels[:, None], axis=1)
        log_likelihoods.append(right[:, 0])
        ranks.append((rows > right).sum(axis=1))
        np.add.at(confusion, (labels, rows.argmax(axis=1)), 1)
    num_images = int(confusion.sum())
    likelihood = float(np.concatenate(log_likelihoods).mean(dtype=np.float64))
    return Evaluation(
        images=num_images,
        skipped=len(source) - num_images,
        data_classes=source.num_classes,
        top1=float(confusion.trace() / num_images),
        commonest=float(confusion.sum(axis=1).max() / num_images),
        top5=float((np.concatenate(ranks) < _TOP).mean()) if num_classes > _TOP else None,
        log_likelihood=None if is_by_texts else likelihood,
        ms_per_image=1000 * seconds / (num_batches * size),
        batch_size=size,
        device=describe_device(),
        **_by_class(classifier, confusion),
    )


def _by_class(classifier: Classifier, confusion: np.ndarray) -> dict[str, list[dict]]:
    """Classes and commonest mistakes, of counts int [right class, class that comes first]."""
    name, totals, right = classifier.name, confusion.sum(axis=1).tolist(), confusion.diagonal()
    classes = [
        {"name": name(i), "top1": float(right[i] / n) if n else None, "images": n}
        for i, n in enumerate(totals)
    ]
    mistakes = confusion - np.diag(right)
    worst = np.argsort(-mistakes, axis=None, kind="stable")[:_MOST_PAIRS]
    confused = [
        {"class": name(a), "taken_for": name(b), "images": int(mistakes[a, b])}
        for a, b in zip(*np.unravel_index(worst, mistakes.shape), strict=True)
        if mistakes[a, b]
    ]
    return {"classes": classes, "confused": confused}


def _text(found: Evaluation) -> str:
    skipped = f", {found.skipped} more could not be decoded" if found.skipped else ""
    if found.data_classes < len(found.classes):
        of = f" of {found.data_classes} of the model's {len(found.classes)} classes"
    else:
        of = ""
    top5 = "" if found.top5 is None else f", top-5 {found.top5:.2%}"
    mean = found.log_likelihood
    likelihood = "" if mean is None else f", log-likelihood {mean:.4f}"
    lines = [
        f"{found.images} images{of}{skipped}",
        f"top-1 {found.top1:.2%}{top5}{likelihood}; the commonest class alone "
        f"{found.commonest:.2%}",
        f"{found.ms_per_image:.3g} ms an image in batches of {found.batch_size} on {found.device}",
        "",
    ]
    classes = [entry for entry in found.classes if entry["images"]]
    if len(classes) > _MOST_LINES:
        classes = sorted(classes, key=lambda entry: entry["top1"])[:_MOST_LINES]
        lines.append(f"the {_MOST_LINES} worst of {len(found.classes)} classes:")
    width = max(len(as_text(entry["name"])) for entry in classes)
    lines += [
        f"{as_text(entry['name']):<{width}}  {entry['top1']:7.2%} of {entry['images']}"
        for entry in classes
    ]
    text = "most often confused: {class} taken for {taken_for}, {images} times"
    lines += [as_text(text.format(**pair)) for pair in found.confused]
    return "\n".join(lines)


def matched(ours: Sequence[str], num_classes: int, theirs: Sequence[str], data: str) -> np.ndarray:
    """The model's class of each label of the data, int32 [len(theirs)].

    Args:
      ours: names of the model's classes; empty where they are unknown, and the order must serve.
      num_classes: of the model.
      theirs: names of the data's classes, all of the model's or some.
      data: what to call the data in an error.

    Raises:
      InputError: another number of classes without names, other names, or one that several of the
        model's classes have; shows the difference.
    """
    order = positions(theirs, ours or theirs)
    if order is not None and (ours or len(theirs) == num_classes):
        if not ours:
            log.warning("the model's classes have no names: taken to be in the order of %s", data)
        return np.array(order, np.int32)
    only = [set(ours) - set(theirs), set(theirs) - set(ours)]
    if not ours or only[1]:
        raise InputError(
            f"the model has {num_classes} classes and {data} {len(theirs)}; only in the model: "
            f"{few(only[0])}; only in the data: {few(only[1])}. A {CLASSES_FILE} in the folder of "
            f"the model, in its order, gives its classes the names that the data has"
        )
    counted = (collections.Counter(ours) | collections.Counter(theirs)).items()
    twice = [name for name, count in counted if count > 1]
    raise InputError(
        f"the classes of the model and of {data} are in another order, and several are called "
        f"{few(twice)}: they cannot be matched by name"
    )
