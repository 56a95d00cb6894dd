"""The section of a run's settings about its images."""

import dataclasses
import math

from flora_jax.data.augment import Augmentation
from flora_jax.data.decoding import MAX_MEGAPIXELS
from flora_jax.data.normalize import Normalization
from flora_jax.data.preprocessing import Preprocessing
from flora_jax.errors import check_at_least, check_between

_PREPROCESSING = ("mean", "std", "crop_pct", "crop_mode", "interpolation", "background")

# timm turns the published colour jitter of 0.4 off where RandAugment is on.
_DEIT_AUGMENTATION = {
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "rand_augment": True,
    "magnitude": 9.0,
    "magnitude_std": 0.5,
    "num_operations": 2,
    "color_jitter": 0.0,
    "erase_probability": 0.25,
}


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which images a run uses, and how they are prepared.

    Attributes:
      name, data_dir, test_split, heldout_split, heldout_by, on_bad_image, heldout_fraction: as in
        `load_splits`; an empty data_dir or split stands for the default.
      max_megapixels: that an image may have after a large JPEG is decoded smaller; above it, it is
        a bad image.
      classes: some of the dataset's, numbered anew; empty: all.
      mean, std, crop_pct, crop_mode, interpolation, background: as in `Preprocessing`; what is not
        random is done to an image with them. The augmentations of small pictures, "digits" and
        "shift", have a crop mode of their own.
      num_threads: that prepare training batches.
      num_workers: processes that prepare training batches in place of threads.
    """

    name: str = "tfds:imagenet2012"
    data_dir: str = ""
    test_split: str = ""
    heldout_split: str = ""
    heldout_by: str = "name"
    on_bad_image: str = "raise"
    max_megapixels: float = MAX_MEGAPIXELS
    classes: tuple[int, ...] = ()
    heldout_fraction: float = 0.02
    augmentation: Augmentation = Augmentation("deit", _DEIT_AUGMENTATION)
    mean: tuple[float, ...] = Preprocessing.mean
    std: tuple[float, ...] = Preprocessing.std
    crop_pct: float = Preprocessing.crop_pct
    crop_mode: str = Preprocessing.crop_mode
    interpolation: str = Preprocessing.interpolation
    background: tuple[int, ...] = Preprocessing.background
    eval_batch_size: int = 256
    num_threads: int = 16
    num_workers: int = 0

    def __post_init__(self):
        check_between(self, 0, 1, "heldout_fraction")
        check_between(self, 0, math.inf, "max_megapixels")
        check_at_least(self, 1, "eval_batch_size")
        check_at_least(self, 0, "num_threads", "num_workers")
        self.preprocessing(1)  # checks what it takes

    def preprocessing(self, image_size: int) -> Preprocessing:
        """What becomes of a picture before a network that takes images of this size."""
        shared = {name: getattr(self, name) for name in _PREPROCESSING}
        if self.augmentation.crop_mode:
            shared["crop_mode"] = self.augmentation.crop_mode
        return Preprocessing(image_size, **shared)

    @property
    def normalization(self) -> Normalization:
        return Normalization(self.mean, self.std)
