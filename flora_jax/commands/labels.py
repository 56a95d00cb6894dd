"""Which class of a model is which class of a dataset: they are matched by name."""

import collections
import logging
import unicodedata
from collections.abc import Sequence

import numpy as np

from flora_jax.errors import InputError, few
from flora_jax.weights.metadata.class_names import CLASSES_FILE

log = logging.getLogger(__name__)


def matched(ours: Sequence[str], num_classes: int, theirs: Sequence[str], data: str) -> np.ndarray:
    """The model's class of each label of the data, int32 [num_classes].

    Args:
      ours: names of the model's classes; empty where they are unknown, and the order must serve.
      num_classes: of the model.
      theirs: names of the data's classes.
      data: what to call the data in an error.

    Raises:
      InputError: another number of classes, or other names; shows the difference.
    """
    if len(theirs) != num_classes:
        raise InputError(
            f"the model has {num_classes} classes, but {data} has {len(theirs)}"
            f"{_difference(ours, theirs)}"
        )
    if not ours:
        log.warning("the model's classes have no names: taken to be in the order of %s", data)
        return np.arange(num_classes, dtype=np.int32)
    ours, theirs = _normal(ours), _normal(theirs)
    if ours == theirs:  # where two classes may have one name
        return np.arange(num_classes, dtype=np.int32)
    if sorted(ours) != sorted(theirs):
        raise InputError(
            f"the classes of the model and of {data} have other names"
            f"{_difference(ours, theirs)}. Where they mean the same, write a {CLASSES_FILE} with "
            f"the names of the data, in the model's order, to the folder of the model"
        )
    if twice := [name for name, count in collections.Counter(ours).items() if count > 1]:
        raise InputError(
            f"the classes of the model and of {data} are in another order, and several are called "
            f"{few(twice)}: they cannot be matched by name"
        )
    return np.array([ours.index(name) for name in theirs], np.int32)


def _normal(names: Sequence[str]) -> list[str]:
    """In composed Unicode, as the names of class folders are."""
    return [unicodedata.normalize("NFC", name) for name in names]


def _difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    only = [set(_normal(a)) - set(_normal(b)) for a, b in ((ours, theirs), (theirs, ours))]
    return f"; only in the model: {few(only[0])}; only in the data: {few(only[1])}" if ours else ""
