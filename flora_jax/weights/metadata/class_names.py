"""Names of the classes that a model in a folder knows."""

import collections
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from etils import epath

from flora_jax.weights.hub import local_folder
from flora_jax.weights.metadata.fields import Fields, read_named
from flora_jax.weights.metadata.spec import CONFIG_FILE

CLASSES_FILE = "classes.json"


def positions(names: Sequence[str], among: Sequence[str]) -> tuple[int, ...] | None:
    """Where each of the names stands `among` others; None where one is missing or stands twice.

    They are compared in composed Unicode, as the names of class folders are, and, where that finds
    not all of them, without case. The same names in the same order may repeat.
    """
    names, among = ([unicodedata.normalize("NFC", name) for name in of] for of in (names, among))
    if names == among:
        return tuple(range(len(names)))
    for fold in (str, str.casefold):
        wanted, known = list(map(fold, names)), list(map(fold, among))
        counts = collections.Counter(known)
        if len(set(wanted)) == len(wanted) and all(counts[name] == 1 for name in wanted):
            place_of = {name: place for place, name in enumerate(known)}
            return tuple(place_of[name] for name in wanted)
    return None


def read_class_names(folder: epath.PathLike) -> tuple[str, ...]:
    """Reads the names of a model's classes in the order of its logits; empty where none are known.

    Looked for, in this order: our own `classes.json`; in a `config.json` the `id2label` of
    transformers or the `label_names` of timm; of a file of weights, in the folder that it is in.
    The names that transformers makes up where nobody gave any, LABEL_0 and so on, are none.

    Raises:
      InputError: broken JSON, something else than names, or a number without one; names the file.
    """
    folder = local_folder(folder)
    if folder.is_file():
        folder = folder.parent
    if (path := folder / CLASSES_FILE).exists():
        return read_named(path, lambda names: _names(Fields({"names": names}), "names"))
    return read_named(path, _of_config) if (path := folder / CONFIG_FILE).exists() else ()


def _of_config(config: Any) -> tuple[str, ...]:
    fields = Fields(config)
    if "architecture" not in fields:
        names = _names(fields, "id2label")
        return () if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names
    places = (fields, fields.within("pretrained_cfg"))
    found = (_names(place, key) for place in places for key in ("label_names", "labels"))
    return next(filter(None, found), ())


def _names(fields: Fields, key: str) -> tuple[str, ...]:
    """Those of a list, or of an object by number."""
    names = fields.get(key, [])
    if isinstance(names, dict):
        numbers = [str(number) for number in range(len(names))]
        if set(names) != set(numbers):
            raise fields.error(key, f"a name for each number from 0 to {len(names) - 1}")
        names = [names[number] for number in numbers]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise fields.error(key, "a list of names")
    return tuple(names)
