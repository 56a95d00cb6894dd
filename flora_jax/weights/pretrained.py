"""Pretrained weights in: any known layout of names, fitted to a spec."""

import dataclasses
import itertools
import logging
import math
import warnings
from collections.abc import Collection, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flora_jax.errors import InputError, MissingFileError, few
from flora_jax.io.paths import user_path
from flora_jax.models import functional
from flora_jax.models.factory import create, create_abstract
from flora_jax.models.network import CLASSIFIERS, Network
from flora_jax.models.spec import Spec
from flora_jax.weights.folder import SPEC_FILE, load_model
from flora_jax.weights.layouts import Layout, detect, is_buffer
from flora_jax.weights.resample import resample_pos_embed, resample_relative_position_table
from flora_jax.weights.rows import Table
from flora_jax.weights.state_dict import read_state_dict

log = logging.getLogger(__name__)

HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")
# Fields of a spec that decide which weights there are, and so can be read off a file's names.
_OPTIONS = {
    "class_token": (True, False),
    "pool": ("token", "mean"),
    "distilled": (True, False),
    "qkv_bias": (True, False),
    "patch_norm": (True, False),
    "absolute_pos_embed": (True, False),
}


def from_pretrained(
    path: epath.PathLike, spec: Spec | None = None, *, strict: bool = True
) -> Network:
    """A model with the weights of a file or a folder.

    Args:
      path: a `.safetensors` file; a `.pth`, `.pt` or `.bin` file of PyTorch (needs torch); a
        folder written by `flora_jax.save`; or a Hugging Face folder.
      spec: the model to make; only a folder of our own needs none. How the weights are fitted to
        it, and what strict means, says `from_state_dict`.

    Raises:
      MissingFileError: nothing to read at `path`.
      MissingPackageError: a PyTorch file, and torch is not installed.
      InputError: not a file of weights, no spec, or weights that do not fit it.
    """
    path = user_path(path)
    if (path / SPEC_FILE).exists():
        return _from_own_folder(path, spec, strict)
    if path.is_dir():
        files = [path / name for name in HUGGING_FACE_FILES if (path / name).exists()]
        if not files:
            expected = ", ".join((SPEC_FILE, *HUGGING_FACE_FILES))
            raise MissingFileError(f"{path} has no weights; looked for {expected}")
        path = files[0]
    if spec is None:
        raise InputError(
            f"{path} does not say what model it belongs to: pass a spec, such as "
            f"flora_jax.deit('base')"
        )
    return _fitted(_without_module(read_state_dict(path)), spec, strict)


def from_state_dict(
    arrays: Mapping[str, np.ndarray], spec: Spec, *, strict: bool = True
) -> Network:
    """A model with these weights, under the names of timm, Hugging Face, a release, or our own.

    Position embeddings and relative position tables of another size are interpolated. A classifier
    of another number of classes gives way to one of zeros, with a warning. Factor
    pairs of a compressed model are taken at the ranks they have.

    Args:
      arrays: numpy arrays by name.
      spec: the model to make; a dense one takes the ranks of stored factor pairs.
      strict: False leaves missing weights at random values and ignores unexpected ones, with a
        warning that names them.

    Raises:
      InputError: unknown names, weights of another family, missing or unexpected ones, or one of
        another shape or rank than the spec's.
    """
    return _fitted(_without_module(arrays), spec, strict)


def _from_own_folder(path: epath.Path, spec: Spec | None, strict: bool) -> Network:
    model = load_model(path)
    if spec is None or spec == model.spec:
        return model
    parameters = functional.split(model)[1]
    return _fitted({name: np.asarray(p) for name, p in parameters.items()}, spec, strict)


def _without_module(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes the prefix that PyTorch's data parallel wrapper puts before every name."""
    return {name.removeprefix("module."): array for name, array in arrays.items()}


def _fitted(arrays: dict[str, np.ndarray], spec: Spec, strict: bool) -> Network:
    """Fits weights to a spec, and empties `arrays` as it goes: a file's content is held once."""
    layout = detect(arrays)
    if layout.family != spec.family:
        raise InputError(
            f"these are weights of a {layout.title}, but the spec is a {type(spec).__name__}"
        )
    spec = _with_stored_ranks(layout, spec, arrays)
    table = layout.table(spec, arrays)
    _check_names(layout, spec, table, arrays, strict)

    model = create_abstract(spec)
    own = functional.split(model)[1]
    parameters, resampled = {}, []
    for row in table:
        if not all(source in arrays for source in row.sources):
            continue
        array = row.read([arrays.pop(source) for source in row.sources])
        if array.shape != own[row.target].shape:
            array, stored = _resampled(row.target, array, own[row.target].shape, spec), array
            resampled += [] if array is stored else [row.target]
        parameters[row.target] = jnp.array(array)  # a copy: the caller may go on to change its own
    if resampled:
        log.info("interpolated to the spec's size: %s", few(resampled))
    _replace_classifier_of_other_classes(parameters, spec)
    parameters |= _fresh(spec, own.keys() - parameters.keys())
    return functional.with_parameters(model, parameters)


def _with_stored_ranks(layout: Layout, spec: Spec, arrays: Mapping[str, np.ndarray]) -> Spec:
    """The spec with the ranks of the file's factor pairs."""
    factored = layout.table(spec.with_ranks((1,) * len(spec.layers)), arrays)
    sources = {row.target: row.sources[0] for row in factored}
    downs = [arrays.get(sources[f"{layer.name}.down"]) for layer in spec.layers]
    stored = tuple(None if down is None else len(down) for down in downs)
    if stored == spec.ranks:
        return spec
    if all(rank is None for rank in spec.ranks):
        return spec.with_ranks(stored)
    for layer, rank, wanted in zip(spec.layers, stored, spec.ranks, strict=True):
        if rank != wanted:
            raise InputError(
                f"{layer.name} is {_described(rank)} in the file and {_described(wanted)} in the "
                f"spec; a dense spec takes the ranks of the file"
            )
    return spec


def _described(rank: int | None) -> str:
    return "one dense matrix" if rank is None else f"a pair of factors of rank {rank}"


def _check_names(
    layout: Layout, spec: Spec, table: Table, keys: Collection[str], strict: bool
) -> None:
    missing, unexpected = _misfits(table, keys)
    if not missing and not unexpected:
        return
    found = f"missing {few(missing)}; unexpected {few(unexpected)}"
    if not strict:
        warnings.warn(
            f"weights that do not fit the spec: {found}. Missing ones keep random values, "
            f"unexpected ones are ignored",
            stacklevel=4,
        )
        return
    raise InputError(f"the weights do not fit the spec: {found}{_hint(layout, spec, keys)}")


def _misfits(table: Table, keys: Collection[str]) -> tuple[set[str], set[str]]:
    """Names that the table wants and the file lacks, and the reverse."""
    wanted = {source for row in table for source in row.sources}
    found = {key for key in keys if not is_buffer(key)}
    return wanted - found, found - wanted


def _hint(layout: Layout, spec: Spec, keys: Collection[str]) -> str:
    """The options of the spec under which most names fit, where they are not its own."""
    options = {name: values for name, values in _OPTIONS.items() if hasattr(spec, name)}
    best: dict[str, object] = {}
    fewest = sum(map(len, _misfits(layout.table(spec, keys), keys)))
    for values in itertools.product(*options.values()):
        changes = {
            name: value
            for name, value in zip(options, values, strict=True)
            if value != getattr(spec, name)
        }
        try:
            table = layout.table(dataclasses.replace(spec, **changes), keys)
        except ValueError:  # options that contradict each other
            continue
        misfits = sum(map(len, _misfits(table, keys)))
        if (misfits, len(changes)) < (fewest, len(best)):
            best, fewest = changes, misfits
    fields = ", ".join(f"{name}={value!r}" for name, value in best.items())
    return f"; set {fields} in the spec" if best else ""


def _resampled(name: str, array: np.ndarray, shape: tuple[int, ...], spec: Spec) -> np.ndarray:
    """The array at this shape where it holds positions, itself where it does not."""
    if array.ndim != 2 or array.shape[1] != shape[1]:
        return array
    if name.endswith("relative_position_bias_table"):
        return resample_relative_position_table(array, (math.isqrt(shape[0]) + 1) // 2)
    if name in ("pos_embed", "absolute_pos_embed"):
        num_prefix_tokens = spec.num_prefix_tokens if name == "pos_embed" else 0
        return resample_pos_embed(array, num_prefix_tokens, spec.image_size // spec.patch_size)
    return array


def _replace_classifier_of_other_classes(parameters: dict[str, jax.Array], spec: Spec) -> None:
    """Starts other classes as equally likely, so that the first steps do not spoil the features."""
    for name in CLASSIFIERS:
        kernel = parameters.get(f"{name}.kernel")
        if kernel is not None and kernel.shape[-1] != spec.num_classes:
            warnings.warn(
                f"{name} has {kernel.shape[-1]} classes in the weights and {spec.num_classes} in "
                f"the spec: a new one of zeros takes its place",
                stacklevel=4,
            )
            parameters[f"{name}.kernel"] = jnp.zeros((len(kernel), spec.num_classes), kernel.dtype)
            parameters[f"{name}.bias"] = jnp.zeros(spec.num_classes, kernel.dtype)


def _fresh(spec: Spec, names: Iterable[str]) -> dict[str, jax.Array]:
    """Random values of these parameters; compiled, so that no others are ever made."""
    names = sorted(names)
    if not names:
        return {}

    @jax.jit
    def make():
        parameters = functional.split(create(spec))[1]
        return {name: parameters[name] for name in names}

    return make()
