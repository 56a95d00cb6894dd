"""Swin Transformer (Liu et al. 2021) and its version 2 (2022): stages, windows and costs."""

import dataclasses
from typing import ClassVar

from flora_jax.errors import (
    InputError,
    check_at_least,
    check_known,
    hold_plain_values,
    unknown,
)
from flora_jax.models.spec import (
    OUTPUTS,
    BlockInput,
    BlockSpec,
    Spec,
    check_multiple,
    later,
    nearest,
)
from flora_jax.models.windows import Windows

POSITION_DIM = 512  # hidden units of the MLP that makes a continuous position bias


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of blocks at one resolution. The window is the feature map's where that is smaller."""

    width: int
    grid_size: int
    window_size: int
    depth: int
    num_heads: int

    @property
    def tokens(self) -> int:
        return self.grid_size**2

    @property
    def shift(self) -> int:
        """Patches by which every second block moves its windows; 0 where one window covers all."""
        return self.window_size // 2 if self.window_size < self.grid_size else 0


@dataclasses.dataclass(frozen=True)
class SwinSpec(Spec):
    """A Swin: attention inside windows, patches merged 2 x 2 between stages.

    `blocks` lists the blocks of all stages in order; left empty, it is filled with equal blocks a
    stage.

    Attributes:
      image_size, patch_size: side lengths in pixels. window_size: side length in patches.
      depths, num_heads: one a stage.
      num_classes: outputs of its head. 0: it has none, and gives its pooled feature.
      outputs: what these mean: "classes", "labels", "numbers" or an "embedding" (`OUTPUTS`).
      k_bias: False: of qkv's bias, the key has none.
      post_norm: norms behind attention, MLP and merging, not before them; windows that do not tile
        a feature map are filled up with zeros at its right and lower edge.
      cosine_attention: logits are the cosine of query and key times a learned scale of each head,
        and a small MLP makes the bias of a relative position.
      pretrained_window_sizes: one a stage, the windows that this MLP was trained on; 0, or none at
        all: those of the spec. Swin V2 (https://arxiv.org/abs/2111.09883) has all of the last four
        (`swin_v2`).

    Raises:
      InputError: windows do not tile a stage's feature map, a stage's width is not a multiple of
        its num_heads, a size is not positive, depths and num_heads differ in length, `blocks` does
        not have sum(depths) entries, or a rank lies outside 1..full rank.
    """

    family: ClassVar[str] = "swin"
    title: ClassVar[str] = "Swin"

    image_size: int = 224
    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    num_classes: int = 1000
    in_channels: int = 3
    mlp_ratio: float = 4
    qkv_bias: bool = True
    patch_norm: bool = True
    absolute_pos_embed: bool = False
    layer_norm_eps: float = 1e-5
    blocks: tuple[BlockSpec, ...] = ()
    outputs: str = later("classes")
    k_bias: bool = later(True)
    post_norm: bool = later(False)
    cosine_attention: bool = later(False)
    pretrained_window_sizes: tuple[int, ...] = later(())

    def __post_init__(self):
        hold_plain_values(self)
        check_at_least(
            self,
            1,
            *("image_size", "patch_size", "embed_dim", "depths", "num_heads"),
            *("window_size", "in_channels", "mlp_ratio"),
        )
        check_at_least(self, 0, "num_classes", "pretrained_window_sizes")
        check_known(self, "outputs", OUTPUTS)
        if not self.depths or len(self.depths) != len(self.num_heads):
            raise InputError(
                f"depths {self.depths} and num_heads {self.num_heads} must have one entry a stage"
            )
        if self.pretrained_window_sizes and len(self.pretrained_window_sizes) != len(self.depths):
            raise InputError(
                f"pretrained_window_sizes {self.pretrained_window_sizes} must have one entry for "
                f"each of the {len(self.depths)} stages, or none"
            )
        check_multiple(self, "image_size", "patch_size")
        self._check_windows()
        self._fill_stages(self.stages, 1, lambda width: round(self.mlp_ratio * width))

    def _check_windows(self) -> None:
        for number in range(len(self.depths)):
            if self._tiles(self.image_size, self.window_size, number):
                continue
            choice = f"image_size: {nearest(self.image_size, self._tiles_everywhere)}"
            if self._tiles_everywhere(self.image_size, 1):
                window_size = nearest(
                    self.window_size, lambda size: self._tiles_everywhere(self.image_size, size)
                )
                choice += f", or window_size: {window_size}"
            raise InputError(
                f"windows of {self.window_size} x {self.window_size} patches do not tile stage "
                f"{number + 1} of an image of {self.image_size} pixels, which has "
                f"{self.image_size / self.patch_size / 2**number:g} patches a side; "
                f"the nearest {choice}"
            )

    def _tiles(self, image_size: int, window_size: int, number: int) -> bool:
        """True where stage `number` has a whole number of patches and of windows."""
        grid_size, rest = divmod(image_size, self.patch_size * 2**number)
        return not rest and (self.post_norm or grid_size % min(window_size, grid_size) == 0)

    def _tiles_everywhere(self, image_size: int, window_size: int | None = None) -> bool:
        window_size = window_size or self.window_size
        return all(
            self._tiles(image_size, window_size, number) for number in range(len(self.depths))
        )

    @property
    def stages(self) -> tuple[Stage, ...]:
        stages = []
        for number, (depth, num_heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            grid_size = self.grid_size // 2**number
            window_size = min(self.window_size, grid_size)
            stages.append(
                Stage(self.embed_dim * 2**number, grid_size, window_size, depth, num_heads)
            )
        return tuple(stages)

    @property
    def why_tokens_stay(self) -> str:
        return "the windows of a Swin need the whole feature map"

    @property
    def grid_size(self) -> int:
        """Patches a side after the patch embedding."""
        return self.image_size // self.patch_size

    @property
    def pooled_dim(self) -> int:
        """Width of the last stage."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    @property
    def block_inputs(self) -> tuple[BlockInput, ...]:
        return tuple(
            BlockInput(
                stage.width,
                stage.tokens,
                stage.window_size**2,
                Windows(stage.grid_size, stage.window_size).num_padding_tokens,
            )
            for stage in self.stages
            for _ in range(stage.depth)
        )

    def _macs_around_blocks(self) -> int:
        tokens = self.grid_size**2
        total = tokens * self.embed_dim * self.in_channels * self.patch_size**2
        total += tokens * self.embed_dim * self.patch_norm
        for stage in self.stages[:-1]:  # merging: norm, then 4C -> 2C for a quarter of the tokens
            total += stage.tokens * stage.width // (2 if self.post_norm else 1)
            total += stage.tokens // 4 * 4 * stage.width * 2 * stage.width
        # The published count of the last norm divides by 2 a stage, not by 4 a merging.
        total += self.pooled_dim * tokens // 2 ** len(self.depths)
        return total + self.pooled_dim * self.num_classes

    def _params_around_blocks(self) -> int:
        total = (self.in_channels * self.patch_size**2 + 1) * self.embed_dim
        total += 2 * self.embed_dim * self.patch_norm
        total += self.grid_size**2 * self.embed_dim * self.absolute_pos_embed
        for stage in self.stages[:-1]:
            total += 2 * (2 if self.post_norm else 4) * stage.width
            total += 4 * stage.width * 2 * stage.width
        blocks = iter(self.blocks)
        for stage in self.stages:
            each, shared = (2 * stage.window_size - 1) ** 2, 0  # of a head, and of all
            if self.cosine_attention:
                each, shared = POSITION_DIM + 1, 3 * POSITION_DIM
            total += sum(shared + each * next(blocks).num_heads for _ in range(stage.depth))
        return total + 2 * self.pooled_dim + (self.pooled_dim + 1) * self.num_classes


_SWIN_SIZES = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


def swin(size: str, **overrides) -> SwinSpec:
    """Swin of the published size, "tiny" to "large"; overrides replace any field."""
    if size not in _SWIN_SIZES:
        raise InputError(unknown("Swin size", size, _SWIN_SIZES))
    embed_dim, depths, num_heads = _SWIN_SIZES[size]
    return SwinSpec(
        **{"embed_dim": embed_dim, "depths": depths, "num_heads": num_heads, **overrides}
    )


def swin_v2(size: str, **overrides) -> SwinSpec:
    """Swin V2, "tiny" to "large", with windows of 8 for 256 pixels; overrides replace any field."""
    kind = {"post_norm": True, "cosine_attention": True, "k_bias": False}
    return swin(size, **{"image_size": 256, "window_size": 8, **kind, **overrides})
