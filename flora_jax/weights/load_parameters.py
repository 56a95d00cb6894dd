"""Loading of parameters into a network: arrays by name, checked against a spec."""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.errors import InputError, did_you_mean, few
from flora_jax.models import functional
from flora_jax.models.factory import create, create_abstract
from flora_jax.models.functional import Parameters
from flora_jax.models.network import CLASSIFIERS, Network
from flora_jax.models.spec import Spec
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.detect import Layout, detect, is_buffer
from flora_jax.weights.name_map import Row, Table
from flora_jax.weights.resample import (
    resample_distance_table,
    resample_pos_embed,
    resample_relative_position_table,
)

log = logging.getLogger(__name__)

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_POS_EMBEDS = ("pos_embed", "absolute_pos_embed")
_BIAS_TABLE, _DISTANCE_TABLE = "relative_position_bias_table", "attention_biases"


class NotFiniteWarning(UserWarning):
    """Weights that are NaN or infinite have been read."""


def load_parameters(
    arrays: dict[str, np.ndarray], spec: Spec, strict: bool, may_reset: bool = True
) -> Network:
    """A network with these weights; `arrays` is emptied on the way: a file's content is held once.

    Args:
      may_reset: whether a classifier of zeros may take the place of one with other classes.

    Raises:
      InputError: as `pretrained.from_state_dict`.
    """
    layout = detect(arrays, spec)
    _drop_unused(layout, spec, arrays)
    spec = _with_stored_ranks(layout, spec, arrays)
    table = layout.table(spec, arrays)
    _check_names(spec, table, arrays, strict)
    model = create_abstract(spec)
    own = functional.split(model)[1]
    rows = [row for row in table if all(source in arrays for source in row.sources)]
    for row in rows:
        _check_arrays(row, arrays, own[row.target].shape)
    parameters = _read(rows, arrays, spec, own, layout.offset(spec, arrays))
    _drop_classifier_of_other_classes(parameters, spec, may_reset and spec.classifies)
    missing = own.keys() - parameters.keys()
    # Other classes start as equally likely, so that the first steps do not spoil the features.
    classifiers = {name for name in missing if _is_of_classifier(name)}
    parameters |= {name: jnp.zeros(own[name].shape, own[name].dtype) for name in classifiers}
    parameters |= _fresh(spec, missing - classifiers)
    return functional.with_parameters(model, parameters)


def _drop_unused(layout: Layout, spec: Spec, arrays: dict[str, np.ndarray]) -> None:
    """Drops what a file holds and its network, or the spec's, does not use."""
    unused = [name for name, array in arrays.items() if array.size == 0]  # such as no registers
    if "classifier.weight" in arrays and isinstance(spec, ViTSpec) and spec.pool == "mean":
        # SiglipForImageClassification keeps its encoder's attention pool, and averages.
        pools = [name.removesuffix("probe") for name in arrays if name.endswith("head.probe")]
        unused += [name for name in arrays for pool in pools if name.startswith(pool)]
    for name in unused:
        del arrays[name]
    if spec.num_classes == 0:
        for row in layout.table(spec.with_classes(2), arrays):
            if _is_of_classifier(row.target):
                for source in row.sources:
                    arrays.pop(source, None)


def _read(
    rows: Table,
    arrays: dict[str, np.ndarray],
    spec: Spec,
    own: Parameters,
    offset: float | None,
) -> dict[str, jax.Array]:
    """The parameters of these rows; a source goes when no row needs it any more.

    Args:
      offset: as in `resample_pos_embed`.
    """
    parameters, resampled, not_finite = dict[str, jax.Array](), list[str](), set[str]()
    rows_left = Counter(source for row in rows for source in row.sources)
    for row in rows:
        array = row.read([arrays[source] for source in row.sources])
        rows_left.subtract(row.sources)
        for source in row.sources:
            if not rows_left[source]:
                del arrays[source]
        if not np.isfinite(array).all():
            not_finite.update(row.sources)
        elif array.shape != own[row.target].shape and _holds_positions(row.target):
            wanted = own[row.target].shape
            resampled.append(f"{row.target} ({len(array)} to {wanted[0]})")
            array = _resampled(row, array, wanted, spec, offset)
        parameters[row.target] = jnp.array(array)  # a copy: the caller may go on to change its own
    if not_finite:
        message = f"weights that are NaN or infinite as float32: {few(not_finite)}"
        warnings.warn(message, NotFiniteWarning, stacklevel=5)
    if resampled:
        log.info("interpolated to the spec's size: %s", few(resampled))
    return parameters


def _with_stored_ranks(layout: Layout, spec: Spec, arrays: Mapping[str, np.ndarray]) -> Spec:
    """The spec with the ranks of the file's factor pairs."""
    factored = layout.table(spec.with_ranks((1,) * len(spec.layers)), arrays)
    sources = {row.target: row.sources[0] for row in factored}
    downs = [arrays.get(sources[f"{layer.name}.down"]) for layer in spec.layers]
    stored = tuple(None if down is None else (*down.shape, 0)[0] for down in downs)
    if stored == spec.ranks:
        return spec
    if all(rank is None for rank in spec.ranks):
        return spec.with_ranks(stored)
    for layer, rank, wanted in zip(spec.layers, stored, spec.ranks, strict=True):
        if rank != wanted:
            raise InputError(
                f"{layer.name} has rank {rank} in the file and {wanted} in the spec, where None is "
                f"one dense matrix; a dense spec takes the ranks of the file"
            )
    return spec


def _check_names(spec: Spec, table: Table, arrays: Mapping[str, np.ndarray], strict: bool) -> None:
    wanted = {source for row in table for source in row.sources}
    missing = wanted - arrays.keys()
    unexpected = {name for name in arrays if not is_buffer(name)} - wanted
    classifier = {s for row in table if _is_of_classifier(row.target) for s in row.sources}
    is_all = not (missing - classifier or unexpected)
    if spec.classifies and classifier and classifier <= missing and (is_all or not strict):
        warnings.warn(
            f"the weights have no classifier ({few(classifier)}): a new one of zeros for "
            f"{spec.num_classes} classes takes its place",
            stacklevel=4,
        )
        missing -= classifier
    if not missing and not unexpected:
        return
    nearest = did_you_mean(min(unexpected), missing) if unexpected else ""
    lists = f"missing {few(missing)}; unexpected {few(unexpected)}{nearest}"
    message = f"the weights do not fit the spec: {lists}"
    if strict:
        raise InputError(message)
    warnings.warn(
        f"{message}. Missing ones keep random values, unexpected ones are ignored", stacklevel=4
    )


def _is_of_classifier(target: str) -> bool:
    return target.partition(".")[0] in CLASSIFIERS


def _check_arrays(row: Row, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> None:
    """Checks kinds of numbers, and shapes as in the file, before any is flattened or joined.

    Positions may be more or fewer, and so may classes.
    """
    longer = list(shape)
    if _holds_positions(row.target):
        longer[0] += 1
    elif _is_of_classifier(row.target):
        longer[-1] += 1
    with_more = row.shapes(tuple(longer))
    for source, wanted in row.shapes(shape).items():
        array = arrays[source]
        if array.dtype.name not in _DTYPES:
            kinds = ", ".join(_DTYPES)
            raise InputError(f"{source} is {array.dtype}; weights are read as {kinds} alone")
        fixed = [i for i, length in enumerate(wanted) if length == with_more[source][i]]
        if array.ndim != len(wanted) or any(array.shape[i] != wanted[i] for i in fixed):
            is_of_pixels = row.target == "patch_embed.proj.kernel"
            hint = ", by its channels, patch_size and embed_dim" * is_of_pixels
            raise InputError(
                f"{source} has shape {array.shape} in the file, and {wanted} in the spec{hint}"
            )


def _holds_positions(target: str) -> bool:
    return target in _POS_EMBEDS or target.endswith((_BIAS_TABLE, _DISTANCE_TABLE))


def _resampled(
    row: Row, array: np.ndarray, shape: tuple[int, ...], spec: Spec, offset: float | None
) -> np.ndarray:
    """Positions [n, D] taken to the number that the spec has, float32 of this shape."""
    try:
        if row.target.endswith(_BIAS_TABLE) and isinstance(spec, ViTSpec):
            table, of_class_token = np.split(array, [-3])
            table = resample_relative_position_table(table, (math.isqrt(shape[0] - 3) + 1) // 2)
            return np.concatenate([table, of_class_token])
        if row.target.endswith(_BIAS_TABLE):
            return resample_relative_position_table(array, (math.isqrt(shape[0]) + 1) // 2)
        if row.target.endswith(_DISTANCE_TABLE):
            return resample_distance_table(array, math.isqrt(shape[0]))
        has_prefix = isinstance(spec, ViTSpec) and spec.positions == "all"
        num_prefix_tokens = spec.num_prefix_tokens if has_prefix else 0
        grid = spec.image_size // spec.patch_size
        return resample_pos_embed(array, num_prefix_tokens, grid, offset)
    except InputError as error:
        raise InputError(
            f"{row.sources[0]} cannot be interpolated from {array.shape} to {shape}: {error}"
        ) from error


def _drop_classifier_of_other_classes(
    parameters: dict[str, jax.Array], spec: Spec, may_reset: bool
) -> None:
    for name in CLASSIFIERS:
        kernel = parameters.get(f"{name}.kernel")
        if kernel is not None and kernel.shape[-1] != spec.num_classes:
            there, wanted = kernel.shape[-1], spec.num_classes
            found = f"{name} has {there} classes in the weights and {wanted} in"
            if not may_reset:
                raise InputError(f"{found} what describes them (id2label, num_labels, num_classes)")
            warnings.warn(f"{found} the spec: a new one of zeros takes its place", stacklevel=4)
            for part in ("kernel", "bias"):
                parameters.pop(f"{name}.{part}", None)


def _fresh(spec: Spec, names: Collection[str]) -> dict[str, jax.Array]:
    """Random values of these parameters; compiled, so that no others are ever made."""
    if not names:
        return {}

    @jax.jit
    def make():
        parameters = functional.split(create(spec))[1]
        return {name: parameters[name] for name in sorted(names)}

    return make()
