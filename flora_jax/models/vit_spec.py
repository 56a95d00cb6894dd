"""DeiT (Touvron et al. 2021) and the plain ViTs that share its blocks."""

import dataclasses
from typing import ClassVar

from flora_jax.errors import InputError, check_at_least, check_known, unknown
from flora_jax.models.spec import BlockInput, BlockSpec, Spec, check_multiple

POOLS = ("token", "mean")


@dataclasses.dataclass(frozen=True)
class ViTSpec(Spec):
    """A DeiT: learned position embedding, pre-norm blocks over all tokens of the image.

    `blocks` is filled with `depth` equal blocks of `num_heads` heads when it is left empty.

    Attributes:
      image_size, patch_size: side lengths in pixels.
      distilled: a second token and a second head (DeiT section 4); the logits are their average.
      class_token: False leaves it out; then pool must be "mean".
      pool: what is classified: the class "token", or the "mean" of all patches, normalised after
        averaging.

    A block may work on fewer tokens than the one before (ViT-Slim section 3): what leaves is gone
    for the rest of the network, and stands in the attention of later blocks as one constant.

    Raises:
      InputError: image_size is not a multiple of patch_size, embed_dim is not a multiple of
        num_heads, a size is not positive, tokens and pool contradict each other, `blocks` does not
        have `depth` entries, a block's tokens are not among those of the block before, or a rank
        lies outside 1..full rank.
    """

    family: ClassVar[str] = "vit"

    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    num_classes: int = 1000
    in_channels: int = 3
    mlp_ratio: int = 4
    qkv_bias: bool = True
    distilled: bool = False
    class_token: bool = True
    pool: str = "token"
    layer_norm_eps: float = 1e-6
    blocks: tuple[BlockSpec, ...] = ()

    def __post_init__(self):
        check_at_least(
            self,
            1,
            *("image_size", "patch_size", "embed_dim", "depth", "num_heads"),
            *("num_classes", "in_channels", "mlp_ratio"),
        )
        check_multiple(self, "image_size", "patch_size")
        self._check_pool()
        if not self.blocks:
            check_multiple(self, "embed_dim", "num_heads")
            block = BlockSpec(
                self.num_heads, self.embed_dim // self.num_heads, self.mlp_ratio * self.embed_dim
            )
            object.__setattr__(self, "blocks", (block,) * self.depth)
        if len(self.blocks) != self.depth:
            raise InputError(f"depth is {self.depth} but {len(self.blocks)} blocks were given")
        self._check_tokens()
        self._check_ranks()

    def _check_tokens(self) -> None:
        before = tuple(range(self.num_tokens))
        for i, block in enumerate(self.blocks):
            tokens = before if block.tokens is None else block.tokens
            if list(tokens) != sorted(set(tokens) & set(before)):
                raise InputError(
                    f"tokens of block {i} must ascend and be among those of the block before"
                )
            if block.tokens is None and len(before) < self.num_tokens:
                raise InputError(f"block {i} cannot work on all tokens: some left before it")
            if list(tokens[: self.num_prefix_tokens]) != list(range(self.num_prefix_tokens)):
                raise InputError(f"block {i} must keep the tokens that are classified")
            if self.why_tokens_stay and len(tokens) < self.num_tokens:
                raise InputError(f"no token can leave: {self.why_tokens_stay}")
            before = tokens

    def _check_pool(self) -> None:
        check_known(self, "pool", POOLS)
        if self.pool == "token" and not self.class_token:
            raise InputError("pool 'token' needs class_token=True; without it choose pool 'mean'")
        if self.distilled and self.pool != "token":
            raise InputError("distilled=True classifies its two tokens: pool must be 'token'")

    @property
    def why_tokens_stay(self) -> str | None:
        is_mean = self.pool == "mean"
        return "the mean over all patches needs every one of them to the end" if is_mean else None

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """Class and distillation token, before the patches."""
        return self.class_token + self.distilled

    @property
    def num_tokens(self) -> int:
        """How many tokens the uncut image has."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def block_tokens(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the tokens that each block works on."""
        every = tuple(range(self.num_tokens))
        return tuple(every if block.tokens is None else block.tokens for block in self.blocks)

    @property
    def block_inputs(self) -> tuple[BlockInput, ...]:
        inputs = []
        for tokens in self.block_tokens:
            has_left = len(tokens) < self.num_tokens  # then one constant stands for what has left
            inputs.append(BlockInput(self.embed_dim, len(tokens), len(tokens) + has_left))
        return tuple(inputs)

    @property
    def num_embedded_tokens(self) -> int:
        """Tokens that the first block works on: the others are not even embedded."""
        return len(self.block_tokens[0])

    def _macs_around_blocks(self) -> int:
        width, num_heads = self.embed_dim, 1 + self.distilled
        num_patches = self.num_embedded_tokens - self.num_prefix_tokens
        patch_embed = num_patches * width * self.in_channels * self.patch_size**2
        return patch_embed + num_heads * (width + width * self.num_classes)  # norm and head

    def _params_around_blocks(self) -> int:
        width, num_heads = self.embed_dim, 1 + self.distilled
        patch_embed = (self.in_channels * self.patch_size**2 + 1) * width
        tokens = (self.num_prefix_tokens + self.num_embedded_tokens) * width
        return patch_embed + tokens + 2 * width + num_heads * (width + 1) * self.num_classes


_DEIT_WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


def deit(size: str, **overrides) -> ViTSpec:
    """DeiT of the published size: "tiny", "small" or "base"; overrides replace any field."""
    if size not in _DEIT_WIDTHS:
        raise InputError(unknown("DeiT size", size, _DEIT_WIDTHS))
    embed_dim, num_heads = _DEIT_WIDTHS[size]
    return ViTSpec(**{"embed_dim": embed_dim, "num_heads": num_heads, **overrides})
