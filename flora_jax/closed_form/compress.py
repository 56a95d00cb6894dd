"""Compression in closed form (ours): head dimensions and MLP widths allocated together, then refit.

The loss of a choice is the squared error that it alone makes in the output of its half of a block,
relative to the size of each token in the residual stream behind that block, which is what the next
norm makes of it: one currency for all choices.
That of a head dimension is measured by running the block's attention with it, that of an MLP width
is what a new fc2 cannot mend (`reduce`). The refit mends more of some blocks' losses than of
others', by how much is not known before: so the losses of a block are held halfway, in the
geometric mean, to those of all blocks. They are taken to add up, and a knapsack with one group a
half block picks the choices of least loss within each budget.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flora_jax.closed_form.allocate import least_loss
from flora_jax.closed_form.calibrate import calibrate, image_batches, in_batches, shared_by
from flora_jax.closed_form.reduce import (
    Heads,
    Shape,
    Units,
    importance,
    of_one_block,
    reduced,
    reduced_spec,
    scaled_logits,
    turned_qkv,
    unit_step,
)
from flora_jax.closed_form.refit import refit_to, token_weights
from flora_jax.closed_form.regression import RIDGE
from flora_jax.cluster.mesh import AXES, SPLIT, WHOLE, make_mesh, on_each_device, replicate, spread
from flora_jax.errors import InputError
from flora_jax.flora.cost import Cost, Variants, kinds_of
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.models.spec import BlockSpec, Spec

Normalize = Callable[[jax.Array], jax.Array]
MOMENT_IMAGES, LOSS_IMAGES = 128, 64  # of those that are refitted to; docs/decisions.md
_STEPS = 8  # of a head dimension
_MOST_WIDTHS = 12  # of an MLP: fewer shapes, fewer programs to compile


@overload
def compress(
    model: Network, images: np.ndarray | Iterable[np.ndarray], *, macs: int
) -> Network: ...


@overload
def compress(
    model: Network, images: np.ndarray | Iterable[np.ndarray], *, macs: Sequence[int]
) -> list[Network]: ...


def compress(model, images, *, macs):
    """A smaller network for a budget, or one for each of several, without labels or training.

    Args:
      model: the dense network.
      images: float32 [n, H, W, C], normalised, or batches of such; some hundreds.
      macs: the most multiply-adds that it may cost.

    Raises:
      InputError: a budget is below what can be reached, the model is compressed already, images do
        not fit, or what enters a layer is not finite.
    """
    batches = image_batches(images, model.spec)
    budgets = [int(budget) for budget in np.atleast_1d(macs)]
    if not budgets:
        raise InputError("compression needs a budget of multiply-adds, or several")
    check_reachable(variants(model.spec).macs, budgets, model.spec.macs())
    plans = Plans.of(model, batches)
    found = [plans.network(shapes) for shapes in plans.shapes(budgets)]
    return found if np.ndim(macs) else found[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Plans:
    """What was measured about a dense network, from which one for any budget is made.

    Attributes:
      batches: of images that it is fitted to; `normalize` makes normalised ones of them.
      orders, losses: of each block.
    """

    model: Network
    batches: Sequence[np.ndarray]
    orders: Sequence[tuple[Heads, Units]]
    losses: Sequence["Losses"]
    normalize: Normalize | None

    @classmethod
    def of(
        cls,
        model: Network,
        batches: Sequence[np.ndarray],
        *,
        normalize: Normalize | None = None,
        directory: epath.Path | None = None,
    ) -> "Plans":
        """Measures on some of the images; `normalize` and `directory` are as in `calibrate`."""
        parts = in_batches(first_images(batches, MOMENT_IMAGES), model.spec)
        found = calibrate(model, parts, directory=directory, normalize=normalize)
        orders = importance(model, found)
        fewer = first_images(batches, LOSS_IMAGES)
        losses = choice_losses(
            model, orders, np.asarray((normalize or jnp.asarray)(jnp.asarray(fewer)))
        )
        return cls(model, batches, orders, losses, normalize)

    def shapes(self, budgets: Sequence[int], cost: Cost | None = None) -> list[list[Shape]]:
        """The shapes of all blocks for each budget of MACs, or of another cost of `variants`.

        Raises:
          InputError: a budget is below what can be reached.
        """
        return allocate_shapes(self.model.spec, self.losses, budgets, cost)

    def network(
        self,
        shapes: Sequence[Shape],
        *,
        ridge: float = RIDGE,
        directory: epath.Path | None = None,
    ) -> Network:
        """The network of these shapes; the rest is as in `refit`."""
        start = reduced(self.model, self.orders, shapes)
        return refit_to(
            *(start.spec, start, self.model, self.batches),
            ridge=ridge,
            directory=directory,
            normalize=self.normalize,
        )


def first_images(batches: Sequence[np.ndarray], number: int) -> np.ndarray:
    """Evenly spaced ones, at most so many: images often come class by class."""
    step = max(1, sum(map(len, batches)) // number)
    starts = np.cumsum([0, *map(len, batches)])
    every = [batch[-start % step :: step] for start, batch in zip(starts, batches, strict=False)]
    return np.concatenate(every)[:number]


def head_dims(spec: Spec, block: BlockSpec) -> list[int]:
    """The choices of a head's dimensions, ascending: eighths of what it has, from two on."""
    step = block.head_dim / _STEPS
    multiple = 1 if spec.rope_theta is None else 2
    widths = (max(multiple, round(i * step / multiple) * multiple) for i in range(2, _STEPS + 1))
    return sorted(set(widths))


def mlp_dims(block: BlockSpec) -> list[int]:
    """The choices of an MLP's units, ascending, from an eighth on."""
    group = unit_step(block.mlp_dim)
    step = group * max(1, block.mlp_dim // _MOST_WIDTHS // group)
    return [*range(block.mlp_dim, max(step, block.mlp_dim // 8) - 1, -step)][::-1]


@dataclasses.dataclass(frozen=True, eq=False)
class Losses:
    """Losses of the choices of a block: of `head_dims`, and of `mlp_dims`."""

    heads: np.ndarray
    units: np.ndarray


def choice_losses(
    model: Network, orders: Sequence[tuple[Heads, Units]], images: np.ndarray
) -> list[Losses]:
    """The loss of every choice of every block, on images float32 [n, H, W, C]."""
    spec, mesh = model.spec, make_mesh()
    structure, parameters = functional.split(model)
    parameters = {name: p.astype(jnp.float32) for name, p in parameters.items()}
    whole, parts, found = replicate(parameters, mesh), [], []
    for batch in image_batches(images, spec):
        padded, mask = (spread(x, mesh) for x in shared_by(mesh.size, batch))
        parts.append((_embed(structure, mesh, whole, padded), mask))
    for number, (block, module, (heads, units)) in enumerate(
        zip(spec.blocks, model.blocks, orders, strict=True)
    ):
        of_block = of_one_block(parameters, number)
        tries = [_with_head_dim(of_block, block, heads, dim) for dim in head_dims(spec, block)[:-1]]
        stacked = {name: np.stack([each[name] for each in tries]) for name in (tries or [{}])[0]}
        block_structure = functional.split(module)[0]
        shared = replicate((of_block, stacked), mesh)
        made = [_try(block_structure, mesh, spec.num_read_tokens, *shared, *p) for p in parts]
        parts = [(x, mask) for (x, _), (_, mask) in zip(made, parts, strict=True)]
        each = zip(*(jax.device_get(sums) for _, sums in made), strict=True)
        count, inverse, of_mlp, *of_errors = (np.sum(s, axis=0, dtype=float) for s in each)
        square, weighed, total = of_errors
        mean = total / count
        of_heads = square - 2 * (mean * weighed).sum(1) + (mean**2).sum(1) * inverse
        of_units = dict(zip(units.left.tolist(), units.loss.tolist(), strict=True))
        left = np.array([of_units[width] for width in mlp_dims(block)])
        found.append(Losses(np.append(of_heads, 0.0) / count, left * of_mlp / count))
    return found


def _with_head_dim(own, block: BlockSpec, heads: Heads, width: int) -> dict[str, np.ndarray]:
    """Turns of qkv that set all but the leading dimensions to zero, in the shape of the uncut."""
    kept = heads.leading(width)
    query = heads.query[..., kept] @ heads.key[..., kept].swapaxes(1, 2)
    whole = np.broadcast_to(np.eye(block.head_dim), query.shape)
    key = whole if heads.lengths is None else query  # a cosine divides by the lengths of both
    value = heads.value[..., :width] @ heads.back[:, :width]
    turns = np.stack([query, key, value]).astype(np.float32)
    return {"turns": turns} | scaled_logits(own, heads, width)


@jax.jit(static_argnums=(0, 1))
def _embed(structure, mesh, parameters, images):
    def on_one_device(parameters, images):
        return functional.merge(structure, parameters).embed(images)

    return on_each_device(on_one_device, mesh, (WHOLE, SPLIT), SPLIT)(parameters, images)


@jax.jit(static_argnums=(0, 1, 2))
def _try(structure, mesh, num_read, parameters, tries, x, mask):
    """Takes tokens through a block, and sums over the errors of its attention.

    With a weight w and the size u = 1 / |output - mean|^2 of each token, and e its error:

    Returns:
      the output [B*N, D], the sums of w, of w u and of w u over the square that a norm behind the
      MLP divides by, and for each of K turns of qkv in `tries` the sums of w u |e|^2 [K], of
      w u e and of w e [K, D].
    """

    def on_one_device(parameters, tries, x, mask):
        block = functional.merge(structure, parameters)
        entered = block.entered(x)

        def attended(own):
            own = functional.merge(structure, parameters | own)
            return own.after_attention(entered, own.attn(own.attention_input(entered)))

        whole = attended({})
        convolved = block.convolved(whole)
        made = block.mlp(block.mlp_input(convolved))
        out = block.after_mlp(convolved, made)
        w = token_weights(mask, len(whole), num_read)
        mean = jax.lax.psum(w @ out, AXES) / jax.lax.psum(w.sum(), AXES)
        size = ((out - mean[None]) ** 2).sum(1)
        wu = w / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)
        of_mlp = wu / (made.var(1) + block.norm2.epsilon) if block.post_norm else wu

        def sums(own):
            with jax.default_matmul_precision("highest"):
                own |= turned_qkv(parameters, own.pop("turns"))
            error = attended(own) - whole
            return wu @ (error**2).sum(1), wu @ error, w @ error

        errors = (jnp.zeros(0), *(jnp.zeros((0, x.shape[-1])),) * 2)
        errors = jax.lax.map(sums, tries) if tries else errors
        return out, jax.lax.psum((w.sum(), wu.sum(), of_mlp.sum(), *errors), AXES)

    shared = on_each_device(on_one_device, mesh, (WHOLE, WHOLE, SPLIT, SPLIT), (SPLIT, WHOLE))
    return shared(parameters, tries, x, mask)


def allocate_shapes(
    spec: Spec, losses: Sequence[Losses], budgets: Sequence[int], cost: Cost | None = None
) -> list[list[Shape]]:
    """The shapes of all blocks of least total loss within each budget; as `Plans.shapes`."""
    of_all = variants(spec)
    cost = cost or of_all.macs
    check_reachable(cost, budgets, int(cost(of_all.largest)))
    of_heads = _held_together([head_dims(spec, b) for b in spec.blocks], [x.heads for x in losses])
    of_units = _held_together([mlp_dims(b) for b in spec.blocks], [x.units for x in losses])
    groups = [group for pair in zip(of_heads, of_units, strict=True) for group in pair]
    picks = least_loss(groups, cost.layers, np.array(budgets) - cost.fixed)
    return [_shapes(spec, pick) for pick in picks]


def _shapes(spec: Spec, picks: np.ndarray) -> list[Shape]:
    """The shapes of all blocks at choices of head dimensions and MLP width, int [2 * blocks]."""
    return [
        Shape(head_dims(spec, block)[heads], mlp_dims(block)[units])
        for block, (heads, units) in zip(spec.blocks, picks.reshape(-1, 2), strict=True)
    ]


def _held_together(
    choices: Sequence[Sequence[int]], losses: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """The geometric mean of each block's losses and those of all blocks at the same shares."""
    shares = [np.array(own) / own[-1] for own in choices]
    curves = list(zip(shares, losses, strict=True))
    return [
        np.sqrt(loss * np.mean([np.interp(share, *curve) for curve in curves], axis=0))
        for share, loss in curves
    ]


def check_reachable(cost: Cost, budgets: Sequence[int], dense: float) -> None:
    """Raises InputError where a budget is below the least cost; `dense` is that of the network."""
    for budget in budgets:
        if budget < cost.least:
            raise InputError(
                f"no network of this shape costs at most {budget} {cost.unit}; the least is "
                f"{cost.least}, {cost.least / dense:.3f} of the dense network's: what is outside "
                f"of heads and MLPs stays"
            )


def variants(spec: Spec) -> Variants:
    """The networks that can be cut from one: head dimensions and MLP width of each block.

    Raises:
      InputError: it has low-rank layers.
    """
    if any(rank is not None for rank in spec.ranks):
        raise InputError("compression needs a dense network, but this one has low-rank layers")
    choices = [c for block in spec.blocks for c in (head_dims(spec, block), mlp_dims(block))]
    smallest = np.zeros(len(choices), int)

    def spec_of(picks: np.ndarray) -> Spec:
        return reduced_spec(spec, _shapes(spec, picks))

    least = spec_of(smallest).macs()

    def more_macs(group: int, choice: int) -> int:
        picks = smallest.copy()
        picks[group] = choice
        return spec_of(picks).macs() - least

    costs = (np.array([more_macs(g, c) for c in range(len(own))]) for g, own in enumerate(choices))
    blocks = zip(spec.blocks, spec.block_inputs, strict=True)
    kinds = kinds_of((*block, place) for block in blocks for place in ("heads", "units"))
    return Variants(Cost("MACs", least, tuple(costs)), kinds, spec_of)
