"""What kinds of values a config.json may hold, checked before a network is made of them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from flora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Kind:
    """Values of JSON that a field may have, and how a message calls them."""

    title: str
    fits: Callable[[Any], bool]


def or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.title} or null", lambda value: value is None or kind.fits(value))


def check_kinds(config: Mapping[str, Any], kinds: Mapping[str, Kind], at: str = "") -> None:
    """Checks the fields that are there; `at` stands before their names in a message.

    Raises:
      InputError: one has another kind of value; names both.
    """
    for name, kind in kinds.items():
        if name in config and not kind.fits(config[name]):
            raise InputError(f"{at}{name} is {config[name]!r}; expected {kind.title}")


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether it is a whole number of JSON, no truth value, and at least this."""
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _are(fits: Callable[[Any], bool], least: int = 0) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list | tuple) and len(value) >= least and all(map(fits, value))
    )


_are_whole = _are(is_whole, least=1)

COUNT = Kind("a whole number of at least 0", lambda value: is_whole(value, 0))
SIZE = Kind("a whole number of at least 1", is_whole)
SIZES = Kind("a list of whole numbers of at least 1", _are_whole)
SIZE_OR_SIZES = Kind(
    "a whole number of at least 1 or a list of such", lambda v: is_whole(v) or _are_whole(v)
)
NUMBER = Kind("a number of at least 0", _is_number)
NUMBERS = Kind("a list of numbers of at least 0", _are(_is_number))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
TEXTS = Kind("a list of strings", _are(lambda value: isinstance(value, str)))
OBJECT = Kind("an object with fields", lambda value: isinstance(value, dict))
