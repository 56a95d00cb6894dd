"""Random-access image sources: what can be read by index, without any state."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypedDict

import numpy as np

from flora_jax.data.decoding import BadImageError, decode_rgb
from flora_jax.data.labels import stored_labels
from flora_jax.errors import InputError
from flora_jax.io.paths import user_path

log = logging.getLogger(__name__)


class Example(TypedDict):
    """An image uint8 [H, W, C], its label 0..num_classes-1, and the key that names it for ever."""

    image: np.ndarray
    label: int
    key: str


class Source(Protocol):
    """Examples by index, with labels and keys that are read without decoding an image.

    Attributes:
      num_classes: how many classes the labels are drawn from.
      class_names: of the labels 0, 1, ...; empty where there are no classes.
      labels: int32 [number of examples].
      left_out: how many things that lie beside the images are none, by kind.
    """

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def left_out(self) -> dict[str, int]: ...

    @property
    def labels(self) -> np.ndarray: ...

    def key(self, index: int) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Images held in memory: images uint8 [n, H, W, C], labels int32 [n]."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int

    left_out: ClassVar[dict[str, int]] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.num_classes)))

    def key(self, index: int) -> str:
        return f"{self.name}/{index:05d}"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        label, key = int(self.labels[index]), self.key(index)
        return {"image": self.images[index], "label": label, "key": key}


def digits() -> ArraySource:
    """The 1,797 handwritten digits that come with scikit-learn, uint8 [8, 8, 1], 10 classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images[..., None] * (255 / 16)).astype(np.uint8)
    return ArraySource("digits", images, bunch.target.astype(np.int32), num_classes=10)


class SkippingSource:
    """`source`, with the next good example, in index order, in place of one that is bad.

    An example that stands in for another has its own key: `key(i)` is not that of the example i.

    Attributes:
      skipped: keys of the bad images that this process has met, each logged once.
    """

    def __init__(self, source: Source):
        self.source, self.skipped = source, set[str]()
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.left_out, self.key = source.left_out, source.key

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            if self.key(candidate) in self.skipped:
                continue
            try:
                return self.source[candidate]
            except BadImageError as error:
                self.skipped.add(self.key(candidate))
                log.warning("skipped, bad images so far %d: %s", len(self.skipped), error)
        raise BadImageError(f"none of the {len(self)} images can be decoded")


class TfdsSource:
    """A split of a TFDS dataset on disk. Images are decoded one by one, as they are asked for."""

    def __init__(self, name: str, records: Any, **decoding: Any):
        self.name, self._records = name, records
        self._decode: Callable[..., np.ndarray] = functools.partial(decode_rgb, **decoding)
        label = records.dataset_info.features["label"]
        self.num_classes, self.class_names = label.num_classes, tuple(label.names)
        self.left_out: dict[str, int] = {}

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The labels int32 [n], which are read in one pass over the records once, and kept."""
        return stored_labels(self.name, self._records)

    def key(self, index: int) -> str:
        return f"{self.name}/{index}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record, key = self._records[index], self.key(index)
        image = self._decode(record["image"], key)
        return {"image": image, "label": int(record["label"]), "key": key}


def tfds(name: str, split: str, data_dir: str | None = None, **decoding: Any) -> TfdsSource:
    """A split of a TFDS image classification dataset that was built in ArrayRecord format.

    Args:
      name: TFDS name, e.g. "imagenet2012" or "imagenet2012:5.1.0".
      split: TFDS split, e.g. "train" or "train[:10%]".
      data_dir: folder that holds the datasets; None: TFDS_DATA_DIR or ~/tensorflow_datasets.
      **decoding: as in `decode_rgb`.

    Returns:
      A source of uint8 [H, W, 3] images, each of its own size.

    Raises:
      InputError: the dataset is not on disk in ArrayRecord format, lacks the split, or has no
        "image" and "label" features, the latter one class an image.
    """
    import tensorflow_datasets

    try:
        # The images are left encoded: TFDS would decode them with TensorFlow or OpenCV if present.
        records = tensorflow_datasets.data_source(
            name,
            split=split,
            data_dir=os.fspath(user_path(data_dir)) if data_dir else None,
            download=False,
            decoders={"image": tensorflow_datasets.decode.SkipDecoding()},
        )
    # TFDS raises NotImplementedError for files in another format, KeyError for an unknown split.
    except (tensorflow_datasets.core.DatasetNotFoundError, NotImplementedError, KeyError) as error:
        folder = data_dir or tensorflow_datasets.core.constants.DATA_DIR
        raise InputError(
            f"no ArrayRecord dataset {name!r} with a split {split!r} in {folder} ({error}); build "
            f"it (needs the packages tensorflow and importlib_resources) with: "
            f"tfds build {name} --file_format=array_record --data_dir={folder}"
        ) from error
    features = dict(records.dataset_info.features.items())
    kind = tensorflow_datasets.features.ClassLabel
    if "image" not in features or not isinstance(features.get("label"), kind):
        raise InputError(
            f"{name!r} is no image classification dataset: it needs the features image and label, "
            f"a ClassLabel; got {features}"
        )
    return TfdsSource(f"{name}/{split}", records, **decoding)
