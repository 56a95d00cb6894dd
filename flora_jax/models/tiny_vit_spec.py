"""TinyViT (Wu et al. 2022): its stages of convolutions and of windows, and their costs."""

import dataclasses
from typing import ClassVar

from flora_jax.errors import (
    InputError,
    check_at_least,
    check_known,
    hold_plain_values,
    unknown,
)
from flora_jax.models.spec import OUTPUTS, BlockInput, BlockSpec, Spec, later
from flora_jax.models.windows import Windows

KERNEL_SIZE = 3  # of convolutions
_TAPS = KERNEL_SIZE**2


def strided(grid_size: int, stride: int) -> int:
    """Side length of a feature map behind a 3 x 3 convolution, padded by one."""
    return -(-grid_size // stride)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of attention blocks at one resolution, behind a downsampling of `before` channels."""

    before: int
    width: int
    grid_before: int
    windows: Windows
    depth: int
    num_heads: int

    @property
    def tokens(self) -> int:
        return self.windows.grid_size**2


@dataclasses.dataclass(frozen=True)
class TinyViTSpec(Spec):
    """A TinyViT: a stage of convolutions, then stages of attention inside windows.

    Its searchable layers are those of the attention blocks. `blocks` lists these in order; left
    empty, it is filled with equal blocks a stage.

    Attributes:
      image_size: side length in pixels; windows that do not tile a feature map are padded.
      embed_dims, depths, num_heads, window_sizes: one a stage, as in timm; the first stage, of
        `depths[0]` MBConv blocks, has no heads and no windows, and its values there count nothing.
      mbconv_expand_ratio: width inside an MBConv over that around it.
      num_classes: outputs of its head. 0: it has none, and gives its pooled feature.
      outputs: what these mean: "classes", "labels", "numbers" or an "embedding" (`OUTPUTS`).

    Raises:
      InputError: a size is not positive, the four differ in length, a stage's width is not a
        multiple of its num_heads, `blocks` does not have sum(depths[1:]) entries, or a rank lies
        outside 1..full rank.
    """

    family: ClassVar[str] = "tiny_vit"
    title: ClassVar[str] = "TinyViT"
    patch_size = 4  # of the two convolutions that embed

    image_size: int = 224
    embed_dims: tuple[int, ...] = (96, 192, 384, 576)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 18)
    window_sizes: tuple[int, ...] = (7, 7, 14, 7)
    num_classes: int = 1000
    in_channels: int = 3
    mlp_ratio: float = 4
    mbconv_expand_ratio: float = 4
    layer_norm_eps: float = 1e-5
    blocks: tuple[BlockSpec, ...] = ()
    outputs: str = later("classes")

    def __post_init__(self):
        of_stages = ("embed_dims", "depths", "num_heads", "window_sizes")
        hold_plain_values(self)
        check_at_least(
            self, 1, "image_size", "in_channels", "mlp_ratio", "mbconv_expand_ratio", *of_stages
        )
        check_at_least(self, 0, "num_classes")
        check_known(self, "outputs", OUTPUTS)
        if len({len(getattr(self, name)) for name in of_stages}) > 1 or len(self.depths) < 2:
            listed = ", ".join(f"{name} {getattr(self, name)}" for name in of_stages)
            raise InputError(f"{listed} must have one entry a stage, and two stages or more")
        if self.embed_dims[0] % 2:
            raise InputError(
                f"embed_dims begin with {self.embed_dims[0]}, which must be even: the first "
                f"convolution has half as many channels; the nearest: {self.embed_dims[0] + 1}"
            )
        self._fill_stages(self.stages, 2, lambda width: int(self.mlp_ratio * width))

    @property
    def embedded_grid(self) -> int:
        """Side length of the feature map of the convolutional stage."""
        return strided(strided(self.image_size, 2), 2)

    @property
    def mbconv_dim(self) -> int:
        """Channels inside an MBConv."""
        return int(self.mbconv_expand_ratio * self.embed_dims[0])

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those of attention."""
        stages, grid_before, before = [], self.embedded_grid, self.embed_dims[0]
        for width, depth, num_heads, window_size in zip(
            *(self.embed_dims[1:], self.depths[1:], self.num_heads[1:], self.window_sizes[1:]),
            strict=True,
        ):
            windows = Windows(strided(grid_before, 2), window_size)
            stages.append(Stage(before, width, grid_before, windows, depth, num_heads))
            grid_before, before = windows.grid_size, width
        return tuple(stages)

    @property
    def why_tokens_stay(self) -> str:
        return "the convolutions and windows of a TinyViT need the whole feature map"

    @property
    def pooled_dim(self) -> int:
        """Width of the last stage."""
        return self.embed_dims[-1]

    @property
    def block_inputs(self) -> tuple[BlockInput, ...]:
        return tuple(
            BlockInput(
                stage.width,
                stage.tokens,
                stage.windows.window_size**2,
                stage.windows.num_padding_tokens,
            )
            for stage in self.stages
            for _ in range(stage.depth)
        )

    def _macs_around_blocks(self) -> int:
        width, inside = self.embed_dims[0], self.mbconv_dim
        half = strided(self.image_size, 2)
        total = half**2 * _TAPS * self.in_channels * (width // 2)
        tokens = self.embedded_grid**2
        total += tokens * _TAPS * (width // 2) * width
        total += self.depths[0] * tokens * (2 * width * inside + _TAPS * inside)
        for stage in self.stages:
            total += stage.grid_before**2 * stage.before * stage.width
            total += stage.tokens * (_TAPS * stage.width + stage.width**2)
            total += stage.depth * stage.tokens * _TAPS * stage.width  # local convolutions
        return total + self.pooled_dim + self.pooled_dim * self.num_classes

    def _params_around_blocks(self) -> int:
        width, inside = self.embed_dims[0], self.mbconv_dim
        total = (_TAPS * self.in_channels + 1) * (width // 2)
        total += (_TAPS * (width // 2) + 1) * width
        total += self.depths[0] * ((width + 1 + _TAPS + 1) * inside + (inside + 1) * width)
        blocks = iter(self.blocks)
        for stage in self.stages:
            total += (stage.before + 1 + _TAPS + 1 + stage.width + 1) * stage.width
            table = stage.windows.window_size**2
            for _ in range(stage.depth):
                total += (_TAPS + 1) * stage.width + table * next(blocks).num_heads
        return total + 2 * self.pooled_dim + (self.pooled_dim + 1) * self.num_classes


_SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # widths, heads
    "5m": ((64, 128, 160, 320), (2, 4, 5, 10)),
    "11m": ((64, 128, 256, 448), (2, 4, 8, 14)),
    "21m": ((96, 192, 384, 576), (3, 6, 12, 18)),
}


def tiny_vit(size: str, image_size: int = 224, **overrides) -> TinyViTSpec:
    """TinyViT of the published size: "5m", "11m" or "21m"; overrides replace any field.

    Windows grow with the image, as in those published for 384 and 512 pixels.
    """
    if size not in _SIZES:
        raise InputError(unknown("TinyViT size", size, _SIZES))
    embed_dims, num_heads = _SIZES[size]
    window_sizes = tuple(max(1, round(side * image_size / 224)) for side in (7, 7, 14, 7))
    fields = {"embed_dims": embed_dims, "num_heads": num_heads, "window_sizes": window_sizes}
    return TinyViTSpec(image_size=image_size, **fields | overrides)
