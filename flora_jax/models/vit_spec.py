"""DeiT (Touvron et al. 2021) and the plain ViTs that share its blocks."""

import dataclasses
from typing import ClassVar

from flora_jax.errors import InputError, check_at_least, check_known, hold_plain_values, unknown
from flora_jax.models.layers import ACTIVATIONS
from flora_jax.models.spec import OUTPUTS, BlockInput, BlockSpec, Spec, check_multiple, later

POOLS = ("token", "mean", "token_and_mean", "attention")
POSITIONS = ("all", "patches", "none")


@dataclasses.dataclass(frozen=True)
class ViTSpec(Spec):
    """A plain ViT: pre-norm blocks over all tokens of the image. The defaults make a DeiT.

    `blocks` is filled with `depth` equal blocks of `num_heads` heads when it is left empty.

    Attributes:
      image_size, patch_size: side lengths in pixels.
      num_classes: outputs of its head. 0: it has none, and gives its pooled feature.
      outputs: what these mean: "classes", "labels", "numbers" or an "embedding" (`OUTPUTS`).
      mlp_ratio: hidden units of an MLP as a multiple of embed_dim.
      distilled: a second token and a second head (DeiT section 4); the logits are their average.
      class_token: False leaves it out; then pool must be "mean" or "attention".
      pool: what is classified: the class "token"; the "mean" of all patches; "token_and_mean", side
        by side; or what one learned query finds by "attention" to all tokens (SigLIP).
      num_registers: tokens behind the class token that nobody classifies (Darcet et al. 2024).
      positions: learned ones, for "all" tokens, for the "patches" alone, or "none".
      rope_theta: the longest period of rotary positions, which turn the patches' queries and keys
        (DINOv3: 100); None for no such positions.
      rope_grid, rope_offset: rotary positions are counted: the first patch of a row or column is at
        rope_offset, and a side is rope_grid long (EVA-02: 0 and 16, the patches of pretraining).
        None: they go from -2 pi to 2 pi.
      pre_norm: a norm before the first block (CLIP).
      patch_bias, qkv_bias, k_bias, head_bias: whether the patch embedding, qkv, in it the key, and
        the head have one.
      activation: of the MLPs: "gelu", "gelu_tanh", "quick_gelu" or "silu".
      gated_mlp: the activation of one product gates another (SwiGLU, where it is "silu"); fc1 is
        both, gate first.
      pool_num_heads, pool_mlp_ratio: of the pool by "attention"; None: as those of the blocks.
      relative_positions: a learned bias of each block's attention for each distance of two patches,
        and three that the class token has part in (BEiT).
      mlp_norm: a norm of a gated MLP's hidden units (EVA-02). Units that have left count as zeros
        in it.
      fc_norm: with pool "mean": normalise the mean, and not every token before it.
      layer_scale: files of other libraries scale the outputs of each block's halves. Reading folds
        that into the weights, whatever this field says; True: writing gives scales of one.

    A block may work on fewer tokens than the one before (ViT-Slim section 3): what leaves is gone
    for the rest of the network, and stands in the attention of later blocks as one constant.

    Raises:
      InputError: image_size is not a multiple of patch_size, embed_dim is not a multiple of
        num_heads, a size is not positive, a choice is unknown, tokens and pool contradict each
        other, `blocks` does not have `depth` entries, a block's tokens are not among those of the
        block before, its rotary pairs do not fit its heads, or a rank lies outside 1..full rank.
    """

    family: ClassVar[str] = "vit"
    title: ClassVar[str] = "ViT"

    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    num_classes: int = 1000
    in_channels: int = 3
    mlp_ratio: float = 4
    qkv_bias: bool = True
    distilled: bool = False
    class_token: bool = True
    pool: str = "token"
    layer_norm_eps: float = 1e-6
    blocks: tuple[BlockSpec, ...] = ()
    num_registers: int = later(0)
    positions: str = later("all")
    rope_theta: float | None = later(None)
    pre_norm: bool = later(False)
    patch_bias: bool = later(True)
    k_bias: bool = later(True)
    activation: str = later("gelu")
    gated_mlp: bool = later(False)
    fc_norm: bool = later(True)
    layer_scale: bool = later(False)
    outputs: str = later("classes")
    head_bias: bool = later(True)
    rope_grid: float | None = later(None)
    rope_offset: float = later(0)
    mlp_norm: bool = later(False)
    relative_positions: bool = later(False)
    pool_num_heads: int | None = later(None)
    pool_mlp_ratio: float | None = later(None)

    def __post_init__(self):
        hold_plain_values(self)
        check_at_least(
            self,
            1,
            *("image_size", "patch_size", "embed_dim", "depth", "num_heads"),
            *("in_channels", "mlp_ratio"),
        )
        check_at_least(self, 0, "num_classes", "num_registers")
        check_multiple(self, "image_size", "patch_size")
        check_known(self, "outputs", OUTPUTS)
        check_known(self, "positions", POSITIONS)
        check_known(self, "activation", tuple(ACTIVATIONS))
        self._check_pool()
        if self.relative_positions and (not self.class_token or self.num_prefix_tokens > 1):
            raise InputError(
                "relative_positions=True is of the patches and a class token: it needs "
                "class_token=True, and neither registers nor distilled=True"
            )
        if self.mlp_norm and not self.gated_mlp:
            raise InputError("mlp_norm=True needs gated_mlp=True: only such an MLP has a norm here")
        if not self.blocks or self.rope_theta is not None or self.pool == "attention":
            check_multiple(self, "embed_dim", "num_heads")
        if not self.blocks:
            block = BlockSpec(self.num_heads, self.embed_dim // self.num_heads, self.mlp_dim)
            object.__setattr__(self, "blocks", (block,) * self.depth)
        if len(self.blocks) != self.depth:
            raise InputError(f"depth is {self.depth} but {len(self.blocks)} blocks were given")
        self._check_tokens()
        self._check_rotary()
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
                raise InputError(
                    f"block {i} must keep the tokens that are classified and registers"
                )
            if self.why_tokens_stay and len(tokens) < self.num_tokens:
                raise InputError(f"no token can leave: {self.why_tokens_stay}")
            before = tokens

    def _check_pool(self) -> None:
        check_known(self, "pool", POOLS)
        if "token" in self.pool and not self.class_token:
            raise InputError(
                f"pool {self.pool!r} needs class_token=True; without it choose pool 'mean' or "
                f"'attention'"
            )
        for name in ("pool_num_heads", "pool_mlp_ratio"):
            if getattr(self, name) is not None:
                check_at_least(self, 1, name)
        if self.pool_num_heads is not None:
            check_multiple(self, "embed_dim", "pool_num_heads")
        if self.distilled and self.pool != "token":
            raise InputError("distilled=True classifies its two tokens: pool must be 'token'")

    def _check_rotary(self) -> None:
        head_dim = self.embed_dim // self.num_heads
        if self.rope_theta is None:
            if any(block.rotary_pairs is not None for block in self.blocks):
                raise InputError("blocks have rotary_pairs, but rope_theta is None")
            return
        check_at_least(self, 1, "rope_theta")
        check_at_least(self, 0, "rope_offset")
        if self.rope_grid is not None:
            check_at_least(self, 1, "rope_grid")
        if head_dim % 4:
            raise InputError(
                f"rotary positions need heads of a width that 4 divides, but embed_dim "
                f"{self.embed_dim} and num_heads {self.num_heads} make {head_dim}"
            )
        for i, block in enumerate(self.blocks):
            if block.rotary_pairs is None:
                fits = block.head_dim == head_dim
            else:
                of_heads = [sorted(set(pairs)) for pairs in block.rotary_pairs]
                fits = [2 * len(pairs) for pairs in of_heads] == [block.head_dim] * block.num_heads
                fits &= all(0 <= pair < head_dim // 2 for pairs in of_heads for pair in pairs)
            if not fits:
                raise InputError(
                    f"block {i} has {block.num_heads} heads of {block.head_dim} dimensions: each "
                    f"needs rotary_pairs, half as many, all different and in 0..{head_dim // 2 - 1}"
                )

    @property
    def why_tokens_stay(self) -> str | None:
        if "mean" in self.pool:
            return "the mean over all patches needs every one of them to the end"
        if self.pool == "attention":
            return "the pool attends to every patch at the end"
        if self.relative_positions:
            return "each token that left would have another bias, by its distance"
        if self.rope_theta is not None and self.qkv_bias and self.k_bias:
            return (
                "rotary positions turn the keys' bias, so the tokens that leave are not all alike; "
                "without that bias (k_bias=False) they can"
            )
        return None

    @property
    def mlp_dim(self) -> int:
        """Hidden units of an uncut MLP."""
        return round(self.mlp_ratio * self.embed_dim)

    @property
    def pool_mlp_dim(self) -> int:
        """Hidden units of the attention pool's MLP."""
        return round((self.pool_mlp_ratio or self.mlp_ratio) * self.embed_dim)

    @property
    def normalises_pooled(self) -> bool:
        """True where the last norm comes after the pooling of all patches."""
        return self.pool == "mean" and self.fc_norm

    @property
    def pools_prefix(self) -> bool:
        return self.pool == "token"

    @property
    def num_read_tokens(self) -> int:
        return 1 + self.distilled if self.pools_prefix else 0

    @property
    def pooled_dim(self) -> int:
        """Width of what is classified."""
        return self.embed_dim * (2 if self.pool == "token_and_mean" else 1)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """Class token, distillation token and registers, before the patches."""
        return self.class_token + self.distilled + self.num_registers

    @property
    def num_tokens(self) -> int:
        """Tokens of the uncut image."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def num_positions(self) -> int:
        """Learned positions, of the tokens that are embedded."""
        num_patches = self.num_embedded_tokens - self.num_prefix_tokens
        return {"all": self.num_embedded_tokens, "patches": num_patches, "none": 0}[self.positions]

    @property
    def num_relative_positions(self) -> int:
        """Distances of two tokens that have a bias of their own, of each head."""
        side = 2 * (self.image_size // self.patch_size) - 1
        return (side**2 + 3) * self.relative_positions

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
        total = num_patches * width * self.in_channels * self.patch_size**2
        total += self.pre_norm * self.num_embedded_tokens * width
        if self.pool == "token":
            total += num_heads * width  # the last norm, of what is classified alone
        else:
            total += width * (1 if self.normalises_pooled else self.num_tokens)
        if self.pool == "attention":
            total += 2 * self.num_tokens * width * width  # keys and values
            total += 2 * self.num_tokens * width  # of one query, and the mean of the values
            total += 2 * width * width + width  # query and projection, norm
            total += 2 * width * self.pool_mlp_dim
        return total + num_heads * self.pooled_dim * self.num_classes

    def _params_around_blocks(self) -> int:
        width, num_heads = self.embed_dim, 1 + self.distilled
        total = (self.in_channels * self.patch_size**2 + self.patch_bias) * width
        total += (self.num_prefix_tokens + self.num_positions) * width
        total += (1 + self.pre_norm) * 2 * width
        total += self.num_relative_positions * sum(block.num_heads for block in self.blocks)
        if self.pool == "attention":
            total += width + 4 * (width + 1) * width + 2 * width  # latent, q, kv, proj, norm
            total += (width + 1) * self.pool_mlp_dim + (self.pool_mlp_dim + 1) * width
        return total + num_heads * (self.pooled_dim + self.head_bias) * self.num_classes


_DEIT_WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


def deit(size: str, **overrides) -> ViTSpec:
    """DeiT of the published size: "tiny", "small" or "base"; overrides replace any field."""
    if size not in _DEIT_WIDTHS:
        raise InputError(unknown("DeiT size", size, _DEIT_WIDTHS))
    embed_dim, num_heads = _DEIT_WIDTHS[size]
    return ViTSpec(**{"embed_dim": embed_dim, "num_heads": num_heads, **overrides})
