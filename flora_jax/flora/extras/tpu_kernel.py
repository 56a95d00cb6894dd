"""The supernet's low-rank product as a Pallas kernel for TPU, whose work follows the rank.

The innermost axis of the grid runs over the tiles of components in use, a run-time number: one
small program without branches serves every rank, and what is as wide as the rank never leaves
the chip. The compiler cannot split a kernel over devices, so the caller does, with
`jax.shard_map`. In a program for another platform the kernel is interpreted: right, but slow.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flora_jax.errors import InputError

Ranks = tuple[int, ...]
# Components: the side of the matrix unit, which is no faster for fewer, so that a tile which the
# rank fills in part never costs more than smaller tiles that it fills.
TILE = 128
BLOCKS = (512, 256, 128)  # tokens
VMEM_BYTES = 48 * 2**20  # v5e and v6e have 128 MiB, v5p and v7x 64 MiB, v4 only 16


def tiled_product(x, down, up, gene, ranks: Ranks) -> jax.Array:
    """The same as `masked_product`, spending the multiply-adds of the tiles that the rank reaches.

    Args:
      x: float32 or bfloat16 [M, in].
      down: [R, in], computed with in the dtype of x.
      up: [R, out], likewise.
      gene: int32 [], index into ranks; may be traced.
      ranks: the last one is R.

    Returns:
      [M, out] in the dtype of x, summed in float32.

    Raises:
      InputError: the layer needs more of the chip's vector memory than there is.
    """
    rank = jnp.asarray(ranks, jnp.int32)[gene]
    to_whole_tiles = ((0, -down.shape[0] % TILE), (0, 0))
    down, up = (jnp.pad(factor.astype(x.dtype), to_whole_tiles) for factor in (down, up))
    return _product(x, down, up, rank)


@jax.custom_vjp
def _product(x, down, up, rank):
    in_features, out_features = down.shape[1], up.shape[1]
    block = _block(
        x,
        bytes_per_token=2 * (in_features + out_features) * x.itemsize + 4 * out_features,
        other_bytes=2 * TILE * (in_features + out_features) * x.itemsize,
    )
    return _call(
        _forward_kernel,
        (x, down, up),
        rank,
        block,
        in_specs=[_tokens(block, in_features), _tile(in_features), _tile(out_features)],
        out_specs=_tokens(block, out_features),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], out_features), x.dtype),
        total=pltpu.VMEM((block, out_features), jnp.float32),
    )


def _product_forward(x, down, up, rank):
    return _product(x, down, up, rank), (x, down, up, rank)


def _product_backward(saved, grad):
    x, down, up, rank = saved
    in_features, out_features = down.shape[1], up.shape[1]
    factor_bytes = 2 * TILE * x.itemsize + 4 * down.shape[0]  # tiles of the factors, gradients
    block = _block(
        x,
        bytes_per_token=2 * (2 * in_features + out_features) * x.itemsize + 4 * in_features,
        other_bytes=(in_features + out_features) * factor_bytes,
    )
    grad_x, grad_down, grad_up = _call(
        functools.partial(_backward_kernel, x.shape[0] % block),
        (x, grad, down, up),
        rank,
        block,
        in_specs=[
            _tokens(block, in_features),
            _tokens(block, out_features),
            _tile(in_features),
            _tile(out_features),
        ],
        out_specs=[_tokens(block, in_features), _whole(down), _whole(up)],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(down.shape, jnp.float32),
            jax.ShapeDtypeStruct(up.shape, jnp.float32),
        ],
        total=pltpu.VMEM((block, in_features), jnp.float32),
    )
    return grad_x, grad_down.astype(x.dtype), grad_up.astype(x.dtype), None


_product.defvjp(_product_forward, _product_backward)


def _forward_kernel(rank_ref, x_ref, down_ref, up_ref, product_ref, total_ref):
    _zero_at_first_tile(total_ref)
    hidden = _components(rank_ref, x_ref, down_ref)
    total_ref[...] += _dot(hidden, up_ref[...])
    _write_at_last_tile(rank_ref, total_ref, product_ref)


def _backward_kernel(
    remainder: int,
    rank_ref,
    x_ref,
    grad_ref,
    down_ref,
    up_ref,
    grad_x_ref,
    grad_down_ref,
    grad_up_ref,
    total_ref,
):
    """The gradients of the factors stay on the chip, whole, until the last token."""
    block, tile = pl.program_id(0), pl.program_id(1)

    @pl.when((block == 0) & (tile == 0))
    def _():
        @pl.loop(0, grad_down_ref.shape[0] // TILE)
        def _(tile):
            rows = pl.ds(tile * TILE, TILE)
            for grad_factor_ref in (grad_down_ref, grad_up_ref):
                grad_factor_ref[rows] = jnp.zeros_like(grad_factor_ref[rows])

    if remainder:  # rows beyond the last token are undefined, and would enter the sums

        @pl.when(block == pl.num_programs(0) - 1)
        def _():
            for tokens_ref in (x_ref, grad_ref):
                tokens_ref[remainder:] = jnp.zeros_like(tokens_ref[remainder:])

    _zero_at_first_tile(total_ref)
    hidden = _components(rank_ref, x_ref, down_ref)
    grad_hidden = _components(rank_ref, grad_ref, up_ref)
    rows = pl.ds(tile * TILE, TILE)
    grad_down_ref[rows] += _dot(grad_hidden.T, x_ref[...])
    grad_up_ref[rows] += _dot(hidden.T, grad_ref[...])
    total_ref[...] += _dot(grad_hidden, down_ref[...])
    _write_at_last_tile(rank_ref, total_ref, grad_x_ref)


def _components(rank_ref, tokens_ref, factor_ref):
    """tokens [block, width] @ factor [TILE, width].T, with zeros from the rank on."""
    hidden = _dot(tokens_ref[...], factor_ref[...].T)
    component = pl.program_id(1) * TILE + jax.lax.broadcasted_iota(jnp.int32, hidden.shape, 1)
    return jnp.where(component < rank_ref[0], hidden, 0).astype(tokens_ref.dtype)


def _zero_at_first_tile(total_ref):
    @pl.when(pl.program_id(1) == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)


def _write_at_last_tile(rank_ref, total_ref, output_ref):
    @pl.when((pl.program_id(1) + 1) * TILE >= rank_ref[0])
    def _():
        output_ref[...] = total_ref[...].astype(output_ref.dtype)


_dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def _block(x, *, bytes_per_token: int, other_bytes: int) -> int:
    """The most tokens at a time that fit."""
    for block in BLOCKS:
        needed = other_bytes + block * bytes_per_token
        if needed <= VMEM_BYTES:
            return min(block, x.shape[0])
    raise InputError(
        f"a layer of this size needs {needed / 2**20:.0f} MiB of vector memory, at most "
        f'{VMEM_BYTES // 2**20} can be used; choose the "masked" implementation'
    )


def _tokens(block: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((block, width), lambda block, tile, rank: (block, 0))


def _tile(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((TILE, width), lambda block, tile, rank: (tile, 0))


def _whole(factor) -> pl.BlockSpec:
    return pl.BlockSpec(factor.shape, lambda block, tile, rank: (0, 0))


def _call(kernel, arrays, rank, block, *, in_specs, out_specs, out_shape, total):
    grid = pl.cdiv(arrays[0].shape[0], block), pl.cdiv(rank, TILE)
    call = functools.partial(
        pl.pallas_call,
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[total],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
    )
    compiled, interpreted = call(), call(interpret=True)
    return jax.lax.platform_dependent(rank[None], *arrays, tpu=compiled, default=interpreted)
