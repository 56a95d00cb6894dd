"""What becomes of a picture before a network sees it, where nothing is random."""

import dataclasses
from typing import Any

import numpy as np

from flora_jax.data.decoding import WHITE
from flora_jax.data.geometry import INTERPOLATIONS, match_channels
from flora_jax.data.normalize import Normalization
from flora_jax.data.pictures import resized_and_cut
from flora_jax.errors import InputError, check_known, hold_plain_values

CROP_MODES = ("center", "squash", "squash_center")
Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Crop:
    """Image uint8 [H, W, C], C 1 or that of `image_shape` -> uint8 `image_shape`.

    Attributes:
      image_shape: (size, size, channels).
      crop_pct, crop_mode: one of CROP_MODES, interpolation: one of INTERPOLATIONS; as in
        `resized_and_cut`.

    Raises:
      InputError: a value out of range or unknown; names it.
    """

    image_shape: Shape
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"

    def __post_init__(self):
        hold_plain_values(self)
        if self.image_shape[0] != self.image_shape[1]:
            raise InputError(f"image_shape must be square, got {self.image_shape}")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct must lie in (0, 1], got {self.crop_pct}")
        check_known(self, "crop_mode", CROP_MODES)
        check_known(self, "interpolation", INTERPOLATIONS)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        how = (self.crop_pct, self.crop_mode, self.interpolation)
        cut = resized_and_cut(image, self.image_shape[0], *how)
        return match_channels(cut, self.image_shape[2])


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """All that a model wants done to a picture; it goes with the model wherever that goes.

    Attributes:
      image_size: side in pixels of what the network takes.
      mean, std: of the pixels in 0..1, one a channel.
      crop_pct, crop_mode, interpolation: as in `Crop`.
      background: red, green and blue in 0..255 that show through transparent pixels; empty:
        transparency is ignored, as torchvision does.
      exif_orientation: whether a picture is turned as its EXIF data say.

    Raises:
      InputError: a value out of range or unknown; names it.
    """

    image_size: int
    mean: tuple[float, ...] = Normalization.mean
    std: tuple[float, ...] = Normalization.std
    crop_pct: float = Crop.crop_pct
    crop_mode: str = Crop.crop_mode
    interpolation: str = Crop.interpolation
    background: tuple[int, ...] = WHITE
    exif_orientation: bool = True

    def __post_init__(self):
        hold_plain_values(self)
        self.crop(3)  # checks what it takes
        Normalization(self.mean, self.std)
        if len(self.background) not in (0, 3) or not all(0 <= v <= 255 for v in self.background):
            raise InputError(
                f"background must be red, green and blue in 0..255, or () to ignore transparency; "
                f"got {self.background}"
            )

    @property
    def normalization(self) -> Normalization:
        return Normalization(self.mean, self.std)

    @property
    def decoding(self) -> dict[str, Any]:
        """What of it `decode_rgb` does."""
        return {"background": self.background, "exif_orientation": self.exif_orientation}

    def crop(self, in_channels: int) -> Crop:
        """The resizing and cutting, for a network of so many input channels."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, in_channels):
                raise InputError(
                    f"{name} {values} must have one value, or one for each of the network's "
                    f"{in_channels} channels"
                )
        shape = (self.image_size, self.image_size, in_channels)
        return Crop(shape, self.crop_pct, self.crop_mode, self.interpolation)
