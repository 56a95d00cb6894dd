"""Random-access image sources: what can be read by index, without any state."""

import dataclasses
import functools
import io
import logging
import os
from typing import Protocol, TypedDict

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError

from flora_jax.errors import InputError
from flora_jax.io.paths import user_path

log = logging.getLogger(__name__)


class BadImageError(InputError):
    """An encoded image that cannot be decoded; the message names it."""


class Example(TypedDict):
    """An image uint8 [H, W, C], its label 0..num_classes-1, and the key that names it for ever."""

    image: np.ndarray
    label: int
    key: str


class Source(Protocol):
    """Examples by index, with labels and keys that are read without decoding an image.

    Attributes:
      num_classes: how many classes the labels are drawn from.
      labels: int32 [number of examples].
    """

    @property
    def num_classes(self) -> int: ...

    @property
    def labels(self) -> np.ndarray: ...

    def key(self, index: int) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def decode_rgb(encoded: bytes, name: str, least_side: int | None = None) -> np.ndarray:
    """The pixels of an encoded image of any kind that Pillow reads, uint8 [H, W, 3].

    As torchvision reads images, EXIF rotation and transparency are ignored. Unlike there, 16-bit
    grey is scaled to 8 bits, not clipped.

    Args:
      name: of the image, for the error.
      least_side: pixels that the short side needs. A JPEG that is twice, four or eight times as
        large is decoded at 1/2, 1/4 or 1/8 of its size, which is quicker; None: at full size.

    Raises:
      BadImageError: not an image, or a damaged one; the message starts with `name`.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as picture:
            if least_side:
                picture.draft(None, (least_side, least_side))
            if picture.mode.startswith("I"):
                grey = (np.asarray(picture) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            if picture.mode == "P":  # straight to RGB, Pillow warns of a transparent palette
                return np.asarray(picture.convert("RGBA").convert("RGB"))
            return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except Exception as error:  # a damaged file can raise anything in a decoder
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise BadImageError(f"{name} cannot be decoded: {reason}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Images held in memory: images uint8 [n, H, W, C], labels int32 [n]."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int

    def key(self, index: int) -> str:
        return f"{self.name}/{index:05d}"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {
            "image": self.images[index],
            "label": int(self.labels[index]),
            "key": self.key(index),
        }


def digits() -> ArraySource:
    """The 1,797 handwritten digits that come with scikit-learn, uint8 [8, 8, 1], 10 classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images[..., None] * (255 / 16)).astype(np.uint8)
    return ArraySource("digits", images, bunch.target.astype(np.int32), num_classes=10)


@dataclasses.dataclass(frozen=True, eq=False)
class SkippingSource:
    """`source`, with the next good example, in index order, in place of one that is bad.

    Attributes:
      skipped: keys of the bad images that this process has met, each logged once.
    """

    source: Source
    skipped: set[str] = dataclasses.field(default_factory=set)

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels

    def key(self, index: int) -> str:
        return self.source.key(index)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            try:
                return self.source[candidate]
            except BadImageError as error:
                self._count(self.key(candidate), error)
        raise BadImageError(f"none of the {len(self)} images can be decoded")

    def _count(self, key: str, error: BadImageError) -> None:
        if key not in self.skipped:
            self.skipped.add(key)
            log.warning("skipped, bad images so far %d: %s", len(self.skipped), error)


class TfdsSource:
    """A split of a TFDS dataset on disk. Images are decoded one by one, as they are asked for."""

    def __init__(self, name: str, split: str, records, least_side: int | None):
        self.name = name
        self.split = split
        self.num_classes = records.dataset_info.features["label"].num_classes
        self._records = records
        self._least_side = least_side

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The labels int32 [n], read in one pass over the records that decodes no image."""
        return np.array([record["label"] for record in self._records], np.int32)

    def key(self, index: int) -> str:
        return f"{self.name}/{self.split}/{index}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        image = decode_rgb(record["image"], self.key(index), self._least_side)
        return {"image": image, "label": int(record["label"]), "key": self.key(index)}


def tfds(
    name: str, split: str, data_dir: str | None = None, least_side: int | None = None
) -> TfdsSource:
    """A split of a TFDS image classification dataset that was built in ArrayRecord format.

    Args:
      name: TFDS name, e.g. "imagenet2012" or "imagenet2012:5.1.0".
      split: TFDS split, e.g. "train" or "train[:10%]".
      data_dir: folder that holds the datasets; None: TFDS_DATA_DIR or ~/tensorflow_datasets.
      least_side: as in `decode_rgb`.

    Returns:
      A source of uint8 [H, W, 3] images, each of its own size.

    Raises:
      InputError: the dataset is not on disk in ArrayRecord format, lacks the split, or has no
        "image" and "label" features.
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
        folder = epath.Path(data_dir or tensorflow_datasets.core.constants.DATA_DIR)
        raise InputError(
            f"no ArrayRecord dataset {name!r} in {folder}: expected "
            f"{folder / name.replace(':', '/')}/.../*.array_record-*; build it (needs "
            f"the packages tensorflow and importlib_resources) with: "
            f"tfds build {name} --file_format=array_record --data_dir={folder}"
        ) from error
    missing = {"image", "label"} - set(records.dataset_info.features)
    if missing:
        raise InputError(
            f"{name!r} is not an image classification dataset: it has the features "
            f"{sorted(records.dataset_info.features)}, without {sorted(missing)}"
        )
    return TfdsSource(name, split, records, least_side)
