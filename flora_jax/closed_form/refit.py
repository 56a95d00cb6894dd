"""Refit: a smaller network's layers fitted to the dense network's activations, block after block.

The images pass both networks together. Each layer becomes the ridge regression (`regression`) of
its target on what enters it in the smaller network, over the tokens of all images. The target of
qkv and fc1 is what they give in the dense network. That of proj and fc2 is what is missing in the
residual stream, the dense stream behind them minus the smaller one before them, so that errors of
earlier layers are mended and not carried on (anchored; AA-SVD, arXiv 2604.02119). Layers that are
not reduced are fitted as well. Where a norm stands behind a half of a block (Swin V2), the targets
are the dense network's values before it, moved so that the norm makes of them what is missing, and
the norm is fitted too: each of its values becomes the regression of what is missing on what it
normalises. Where a class token is what is read in the end, it weighs half as much as all other
tokens together (docs/decisions.md).
"""

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from safetensors import numpy as safetensors

from flora_jax.closed_form.calibrate import image_batches, num_images, shared_by
from flora_jax.closed_form.regression import (
    RIDGE,
    Rows,
    Sums,
    added_up,
    fit_layer,
    fit_norm,
    sums_over,
)
from flora_jax.cluster.mesh import (
    AXES,
    SPLIT,
    WHOLE,
    make_mesh,
    on_each_device,
    replicate,
    shard_batch,
    spread,
)
from flora_jax.cluster.processes import StopRequest, by_the_first, wait_for_all
from flora_jax.errors import InputError, few
from flora_jax.io.files import replacing
from flora_jax.io.paths import user_path
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.layers import LayerNorm, LowRankLinear
from flora_jax.models.network import Block, Network
from flora_jax.models.spec import Spec
from flora_jax.progress import Progress
from flora_jax.training.losses import READ_SHARE

log = logging.getLogger(__name__)

_DAMPING = 0.1  # of what a norm hardly shows, as a share of its mean square scale
STATES_BYTES = 2**31  # of hidden states on a device; where they are more, all lie in files


def refit(
    small: Network,
    model: Network,
    images: np.ndarray | Iterable[np.ndarray],
    *,
    ridge: float = RIDGE,
    directory: epath.PathLike | None = None,
    normalize: Callable[[jax.Array], jax.Array] | None = None,
) -> Network:
    """A smaller network with the same shapes, fitted to the activations of the dense one.

    No label and no training is needed. Each layer takes one pass of half a block over the images;
    the devices hold the second moments of one layer and the hidden states of all images in both
    networks, or those of one batch where they exceed 2 GiB a device: then a temporary folder of
    each process has its share of them.

    Args:
      small: an extracted subnet, a slimmed network or a reduced one, of the depth and widths of the
        dense one; trained or not.
      model: the dense network.
      images: float32 [n, H, W, C], normalised, or batches of such; in several processes, all
        images in each of them. Some hundreds; with fewer tokens than a layer is wide its weights
        stay nearer to what they were.
      ridge: weight of what the layers were, relative to the variance of their inputs; above 0.
      directory: receives the layers of each block; an interrupted pass goes on there.
      normalize: makes normalised images of batches uint8, on the device; hashable.

    Raises:
      InputError: the networks do not belong together, the ridge is not above 0, images do not fit,
        or what enters a layer is not finite; names the layer.
      Stopped: the process was told to end; what is fitted so far is in the directory.
    """
    start = _with_dense_kernels(small, model)
    return refit_to(
        small.spec, start, model, images, ridge=ridge, directory=directory, normalize=normalize
    )


def refit_to(
    spec: Spec,
    start: Network,
    model: Network,
    images: np.ndarray | Iterable[np.ndarray],
    *,
    ridge: float = RIDGE,
    directory: epath.PathLike | None = None,
    normalize: Callable[[jax.Array], jax.Array] | None = None,
) -> Network:
    """As `refit`, from a network without ranks to one of `spec`, which may have some.

    The layers of `start` are what is pulled to; its qkv and fc1 on dense inputs are the targets.
    """
    _check_pair(spec, model.spec)
    if not ridge > 0:
        raise InputError(f"ridge must be above 0, got {ridge}")
    batches = image_batches(images, spec) if normalize is None else list(images)
    if not num_images(batches):
        raise InputError("a refit needs at least one image")
    folder = None if directory is None else user_path(directory)
    key = functional.checksum(functional.split(start)[1], f"{spec} {ridge} ".encode())
    key = functional.checksum(functional.split(model)[1], key.encode())[:8]  # of what goes on there
    network = create_abstract(spec)
    fitted = {n: p for n, p in functional.split(start)[1].items() if not n.startswith("blocks.")}
    wait_for_all("refitted blocks are looked for")
    number_of_images = num_images(batches)
    with (
        StopRequest() as stop_request,
        Progress("refit", number_of_images * len(spec.blocks), unit="image") as progress,
        _HiddenStates(model, start, batches, normalize or jnp.asarray) as states,
    ):
        for number, (blank, begun, dense) in enumerate(
            zip(network.blocks, start.blocks, model.blocks, strict=True)
        ):
            tokens = _Tokens.of(model.spec, spec, number)
            file = folder and folder / f"block_{number:03d}_{key}.safetensors"
            if file is not None and file.exists():
                found = safetensors.load(file.read_bytes())
                block = functional.with_parameters(blank, found)
                for one_pass, part in _PASSES.values():
                    states.advance(one_pass, dense, block, tokens, part)
            else:
                if stop_request.is_set():
                    raise stop_request.stopped(f"refit is saved up to block {number}")
                block = _fit_block(
                    f"blocks.{number}", spec, blank, begun, dense, tokens, states, ridge
                )
                if file is not None:
                    _write_once(file, functional.split(block)[1])
            error = states.advance(_leave, dense, block, tokens, "mlp")
            progress.update(number_of_images, error=float(error["error"] / error["size"]))
            own = functional.split(block)[1]
            fitted |= {f"blocks.{number}.{name}": array for name, array in own.items()}
    _say_few_tokens(spec, number_of_images)
    return functional.with_parameters(network, fitted)


def _say_few_tokens(spec: Spec, number_of_images: int) -> None:
    names = [la.name for la in spec.layers if number_of_images * la.tokens < la.in_features]
    if names:
        log.info(
            "%d images have fewer tokens than %s are wide: their weights stay nearer to what they "
            "were",
            *(number_of_images, few(names)),
        )


def _check_pair(small: Spec, dense: Spec) -> None:
    """Raises InputError where the two networks have no hidden states in common."""
    for what in ("family", "image_shape", "num_prefix_tokens"):
        if getattr(small, what) != getattr(dense, what):
            raise InputError(
                f"the smaller network is not one of this dense network: {what} "
                f"{getattr(small, what)}, the dense one's is {getattr(dense, what)}"
            )
    depths = len(small.blocks), len(dense.blocks)
    widths = [[into.width for into in spec.block_inputs] for spec in (small, dense)]
    if widths[0] != widths[1]:
        raise InputError(
            f"a refit needs two networks of the same depth and width; the smaller has {depths[0]} "
            f"blocks of widths {sorted(set(widths[0]))}, the dense one {depths[1]} of "
            f"{sorted(set(widths[1]))}"
        )
    if any(rank is not None for rank in dense.ranks):
        raise InputError("the network to fit to must be dense, but it has low-rank layers")
    for number in range(len(dense.blocks)):
        _Tokens.of(dense, small, number)


def _with_dense_kernels(small: Network, model: Network) -> Network:
    """The smaller network with one kernel in place of each pair of factors.

    It is the dense network's, where that has the layer's shape, and its bias with it; else their
    product.
    """
    spec, parameters = small.spec, dict(functional.split(small)[1])
    dense = functional.split(model)[1]
    for layer, twin in zip(spec.layers, model.spec.layers, strict=False):
        if f"{layer.name}.down" not in parameters:
            continue
        down, up = (parameters.pop(f"{layer.name}.{factor}") for factor in ("down", "up"))
        kernel = jnp.matmul(down.T, up, precision="highest")
        if kernel.shape == (twin.in_features, twin.out_features):
            kernel = dense[f"{layer.name}.kernel"]
            if (bias := f"{layer.name}.bias") in parameters:
                parameters[bias] = dense[bias]
        parameters[f"{layer.name}.kernel"] = kernel
    network = create_abstract(spec.with_ranks((None,) * len(spec.layers)))
    return functional.with_parameters(network, parameters)


class Streams(NamedTuple):
    """Hidden states of a batch in the dense network and the smaller one, [B*N, D] and [B*n, D]."""

    dense: jax.Array
    small: jax.Array


# The passes of a block. Each takes the streams one step on and gives the rows of one layer; where a
# token has left the smaller network (ViT-Slim), `stay` takes those that stay out of dense rows.


def _enter(dense: Block, small: Block, streams: Streams, stay) -> tuple[Streams, Rows]:
    x = Streams(dense.entered(streams.dense), small.entered(streams.small))
    return x, Rows(small.attention_input(x.small), stay(dense.attention_input(x.dense)))


def _attend(dense: Block, small: Block, streams: Streams, stay) -> tuple[Streams, Rows]:
    x, small_x = streams
    made = dense.attn(dense.attention_input(x))
    after = dense.after_attention(x, made)
    context = small.attn.context(small.attention_input(small_x))
    rows = Rows(context, small.cut(stay(after) - small_x))
    rows = _before_norm(rows, dense.norm1, made) if dense.post_norm else rows
    return Streams(dense.convolved(after), small_x), rows


def _mix(dense: Block, small: Block, streams: Streams, stay) -> tuple[Streams, Rows]:
    x = streams.small
    x = small.convolved(small.after_attention(x, small.attn(small.attention_input(x))))
    rows = Rows(small.mlp_input(x), stay(dense.mlp_input(streams.dense)))
    return Streams(streams.dense, x), rows


def _hide(dense: Block, small: Block, streams: Streams, stay) -> tuple[Streams, Rows]:
    made, x = dense.mlp(dense.mlp_input(streams.dense)), streams.small
    after = dense.after_mlp(streams.dense, made)
    rows = Rows(small.mlp.hidden(small.mlp_input(x)), stay(after) - x)
    rows = _before_norm(rows, dense.norm2, made) if dense.post_norm else rows
    return Streams(after, x), rows


def _before_norm(rows: Rows, norm: LayerNorm, made: jax.Array) -> Rows:
    """The rows for a layer that a norm follows, `made` what it gives in the dense network [M, out].

    The target is that, and what the norm makes of it is moved towards what is missing; least where
    the norm's own scale is so small that it hardly could.
    """
    scale, size = norm.scale[...][None], jnp.sqrt(made.var(-1) + norm.epsilon)
    move = scale / (scale**2 + _DAMPING * (scale**2).mean())
    target = made + size[:, None] * move * (rows.target - norm(made))
    return rows._replace(target=target)


def _norm_attended(dense: Block, small: Block, streams: Streams, stay) -> tuple[Streams, Rows]:
    assert small.windows is not None  # as in every network of such blocks
    made = small.windows.join(small.attn(small.attention_input(streams.small)))
    return streams, _around_norm(small.norm1, made, stay(streams.dense) - streams.small)


def _norm_hidden(dense: Block, small: Block, streams: Streams, stay) -> tuple[Streams, Rows]:
    made = small.mlp(small.mlp_input(streams.small))
    return streams, _around_norm(small.norm2, made, stay(streams.dense) - streams.small)


def _around_norm(norm: LayerNorm, made: jax.Array, missing: jax.Array) -> Rows:
    centred = made - made.mean(-1, keepdims=True)
    return Rows(centred * jax.lax.rsqrt(made.var(-1, keepdims=True) + norm.epsilon), missing)


def _leave(dense: Block, small: Block, streams: Streams, stay) -> tuple[Streams, Rows]:
    x = small.mlp_half(streams.small)
    return Streams(streams.dense, x), Rows(x, stay(streams.dense))


_PASSES = {  # by the layer whose rows they give; the parts of a block that they read
    "attn.qkv": (_enter, "frame"),
    "attn.proj": (_attend, "attention"),
    "mlp.fc1": (_mix, "attention"),
    "mlp.fc2": (_hide, "mlp"),
}
_NORMS = {  # those behind a layer, with the pass that gives their rows
    "attn.proj": ("norm1", _norm_attended, "attention"),
    "mlp.fc2": ("norm2", _norm_hidden, "mlp"),
}


def _fit_block(
    name: str,
    spec: Spec,
    blank: Block,
    begun: Block,
    dense: Block,
    tokens: "_Tokens",
    states: "_HiddenStates",
    ridge: float,
) -> Block:
    """The smaller network's block with its four layers fitted one after another."""
    block, layers = nnx.clone(begun), {layer.name: layer for layer in spec.layers}
    for leaf, (one_pass, part) in _PASSES.items():
        sums = states.advance(one_pass, dense, block, tokens, part)
        if not np.isfinite(np.trace(sums["xx"])):
            raise InputError(
                f"what enters {name}.{leaf} is not finite on the calibration images: the weights "
                f"before it or the images hold NaN or infinity"
            )
        if not np.isfinite(sums["t"]).all():
            raise InputError(
                f"what {name}.{leaf} is fitted to is not finite on the calibration images: the "
                f"dense network's weights there hold NaN or infinity"
            )
        half, own = leaf.split(".")
        was, becomes = (getattr(getattr(each, half), own) for each in (block, blank))
        rank = becomes.down.shape[0] if isinstance(becomes, LowRankLinear) else None
        layer = layers.get(f"{name}.{leaf}")
        into = "down" if layer is None else layer.singular_values_into
        is_target = leaf in ("attn.proj", "mlp.fc2")
        fitted = fit_layer(sums, functional.split(was)[1], is_target, ridge, rank, into)
        setattr(getattr(block, half), own, functional.with_parameters(becomes, fitted))
        if block.post_norm and leaf in _NORMS:
            norm, one_pass, part = _NORMS[leaf]
            sums = states.advance(one_pass, dense, block, tokens, part)
            fit_norm(sums, getattr(block, norm), ridge)
    return block


class _HiddenStates:
    """The streams of all images by batches: on the devices, or in a folder where they are many."""

    def __init__(
        self,
        model: Network,
        start: Network,
        batches: Sequence[np.ndarray],
        normalize: Callable[[jax.Array], jax.Array],
    ):
        self._mesh = make_mesh()
        self._masks: list[jax.Array] = []
        self._on_devices: dict[int, Streams] = {}
        widest = max(into.width * into.tokens for into in model.spec.block_inputs)
        is_large = 2 * 4 * widest * num_images(batches) > STATES_BYTES * self._mesh.size
        self._folder = tempfile.TemporaryDirectory() if is_large else None
        (dense, of_dense), (small, of_small) = (functional.split(n) for n in (model, start))
        parameters = [replicate(each, self._mesh) for each in (of_dense, of_small)]
        for batch in batches:
            images, mask = (spread(x, self._mesh) for x in shared_by(self._mesh.size, batch))
            self._masks.append(mask)
            self._keep(
                len(self._masks) - 1,
                _embed(dense, small, self._mesh, normalize, *parameters, images),
            )

    def __enter__(self) -> "_HiddenStates":
        return self

    def __exit__(self, *_) -> None:
        if self._folder:
            self._folder.cleanup()

    def _keep(self, number: int, streams: Streams) -> None:
        """What is None stays as it was."""
        changed = {name: stream for name, stream in streams._asdict().items() if stream is not None}
        if self._folder is None:
            self._on_devices[number] = self._on_devices.get(number, streams)._replace(**changed)
            return
        for name, stream in changed.items():
            np.save(f"{self._folder.name}/{number}_{name}.npy", _of_this_process(stream))

    def _get(self, number: int) -> Streams:
        if self._folder is None:
            return self._on_devices[number]
        files = {name: f"{self._folder.name}/{number}_{name}.npy" for name in Streams._fields}
        shares = {name: np.load(file) for name, file in files.items()}
        return Streams(**shard_batch(shares, self._mesh))

    def advance(
        self,
        one_pass: Callable,
        dense: Block,
        small: Block,
        tokens: "_Tokens",
        part: str,
    ) -> Sums:
        """Takes all streams through one pass, and sums over its rows, float64."""
        (of_dense, dense_parameters), (of_small, small_parameters) = (
            functional.split(_part(block, part)) for block in (dense, small)
        )
        static = (one_pass, of_dense, of_small, self._mesh, tokens)
        parameters = [replicate(p, self._mesh) for p in (dense_parameters, small_parameters)]

        def of_batches() -> Iterator[Mapping[str, jax.Array]]:
            for number, mask in enumerate(self._masks):
                streams, sums = _advance(*static, *parameters, self._get(number), mask)
                self._keep(number, streams)
                yield sums

        return added_up(of_batches())


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The tokens of a block: which of the dense network's stay, and how many in front are read.

    Attributes:
      number: of an image's tokens in the dense network.
      stay: positions among these; None for all of them.
    """

    number: int
    stay: tuple[int, ...] | None
    read: int

    @classmethod
    def of(cls, dense: Spec, small: Spec, block: int) -> "_Tokens":
        """Raises InputError where the smaller network has tokens that the dense one lacks."""
        number = dense.block_inputs[block].tokens
        kept, every = small.blocks[block].tokens, dense.blocks[block].tokens
        if kept == every:
            return cls(number, None, dense.num_read_tokens)
        places = {token: place for place, token in enumerate(every or range(number))}
        if kept is None or not places.keys() >= set(kept):
            raise InputError(
                f"block {block} of the smaller network works on tokens that have left the network "
                f"that it is fitted to"
            )
        return cls(number, tuple(places[token] for token in kept), dense.num_read_tokens)

    def of_small(self, rows: jax.Array) -> jax.Array:
        """The rows of the tokens that stay."""
        if self.stay is None:
            return rows
        by_image = rows.reshape(-1, self.number, rows.shape[-1])
        return by_image[:, np.array(self.stay)].reshape(-1, rows.shape[-1])


def token_weights(mask: jax.Array, num_rows: int, read: int) -> jax.Array:
    """The weight of each row [M] of images with the mask [B].

    The first `read` tokens of an image weigh a share of all others together.
    """
    tokens = num_rows // len(mask)
    weights = np.ones(tokens, np.float32)
    if read:
        weights[:read] = READ_SHARE * (tokens - read) / read
    return (mask[:, None] * weights[None]).reshape(-1)


def _part(block: Block, part: str) -> Block:
    """The modules that a pass reads: equal halves of blocks then share a program."""
    block = nnx.clone(block)
    unread = {"frame": ("attn", "mlp"), "attention": ("mlp",)}.get(
        part, ("attn", "downsample", "windows", "local_conv")
    )
    for name in unread:
        setattr(block, name, None)
    return block


@jax.jit(static_argnums=(0, 1, 2, 3))
def _embed(dense, small, mesh, normalize, dense_parameters, small_parameters, images):
    def on_one_device(dense_parameters, small_parameters, images):
        images = normalize(images).astype(jnp.float32)
        networks = (
            functional.merge(dense, _wide(dense_parameters)),
            functional.merge(small, _wide(small_parameters)),
        )
        return Streams(*(network.embed(images) for network in networks))

    shared = on_each_device(on_one_device, mesh, (WHOLE, WHOLE, SPLIT), SPLIT)
    return shared(dense_parameters, small_parameters, images)


@jax.jit(static_argnums=(0, 1, 2, 3, 4))
def _advance(
    one_pass, dense, small, mesh, tokens, dense_parameters, small_parameters, streams, mask
):
    def on_one_device(dense_parameters, small_parameters, streams, mask):
        blocks = (
            functional.merge(dense, _wide(dense_parameters)),
            functional.merge(small, _wide(small_parameters)),
        )
        after, rows = one_pass(*blocks, streams, tokens.of_small)
        weights = token_weights(mask, len(after.small), tokens.read)
        # What a pass leaves as it is need not go to the host again.
        changed = (None if new is old else new for new, old in zip(after, streams, strict=True))
        if one_pass is _leave:
            sums = jax.lax.psum(_errors(rows, weights), AXES)
        else:
            if one_pass in (_enter, _attend):
                weights = blocks[1].cut(weights[:, None])[:, 0]  # nothing for what pads windows
            sums = sums_over(rows, weights)
        return Streams(*changed), sums

    in_specs = (WHOLE, WHOLE, SPLIT, SPLIT)
    shared = on_each_device(on_one_device, mesh, in_specs, (SPLIT, WHOLE))
    return shared(dense_parameters, small_parameters, streams, mask)


def _wide(parameters: functional.Parameters) -> functional.Parameters:
    return jax.tree.map(lambda p: p.astype(jnp.float32), parameters)


def _errors(rows: Rows, weights: jax.Array) -> dict[str, jax.Array]:
    return {
        "error": weights @ ((rows.target - rows.inputs) ** 2).sum(1),
        "size": weights @ (rows.target**2).sum(1),
    }


def _of_this_process(array: jax.Array) -> np.ndarray:
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    parts = [np.asarray(shard.data) for shard in shards]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@by_the_first
def _write_once(path: epath.Path, parameters: functional.Parameters) -> None:
    with replacing(path) as partial:
        partial.write_bytes(safetensors.save({n: np.asarray(p) for n, p in parameters.items()}))
