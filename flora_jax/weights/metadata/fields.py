"""Fields of a JSON object that someone else wrote, each checked as it is read."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from etils import epath

from flora_jax.errors import InputError, unknown
from flora_jax.io.files import read_json

_Read = TypeVar("_Read")


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether it is a whole number of JSON, no truth value, and at least this."""
    return type(value) is int and value >= least


_PROBLEMS = {
    "single_label_classification": "classes",
    "multi_label_classification": "labels",
    "regression": "numbers",
}
_KINDS: dict[str, Callable[[Any], bool]] = {
    "a string": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "a whole number of at least 0": lambda value: is_whole(value, 0),
    "a whole number of at least 1": is_whole,
    "a number of at least 0": lambda value: type(value) in (int, float) and 0 <= value < math.inf,
}


@contextlib.contextmanager
def naming(place: object) -> Iterator[None]:
    """Names the file in the errors of what is made of its content."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def read_named(path: epath.Path, read: Callable[[Any], _Read]) -> _Read:
    """Reads the content of a JSON file by this function; errors name the file."""
    content = read_json(path)
    with naming(path):
        return read(content)


class Fields(Mapping[str, Any]):
    """A JSON object; `at`, its place in another, begins its errors. What is null says nothing.

    A field that is missing has the default that is asked for with it; without one it is needed.

    Raises:
      InputError: it is no object, or a field is not what was asked for; names the field.
    """

    def __init__(self, values: Any, at: str = ""):
        self.at = at
        if not isinstance(values, Mapping):
            what = at.rstrip(".: ") or "it"
            raise InputError(f"{what} must be an object with fields, got {values!r}")
        self._values = {name: value for name, value in values.items() if value is not None}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def error(self, name: str, expected: str) -> InputError:
        """What to raise where a field is something else."""
        return InputError(f"{self.at}{name} must be {expected}, got {self.get(name)!r}")

    def within(self, name: str) -> "Fields":
        """The object in a field, empty where there is none."""
        return Fields(self.get(name, {}), f"{self.at}{name}.")

    def _one(self, kind: str, name: str, default: Any = None) -> Any:
        if not _KINDS[kind](value := self.get(name, default)):
            raise self.error(name, kind)
        return value

    def _several(self, kind: str, name: str, default: Any = None) -> tuple:
        value = self.get(name, default)
        if not isinstance(value, list | tuple) or not all(map(_KINDS[kind], value)):
            raise self.error(name, f"a list, each {kind}")
        return tuple(value)

    text = functools.partialmethod(_one, "a string")
    texts = functools.partialmethod(_several, "a string")
    flag = functools.partialmethod(_one, "true or false")
    count = functools.partialmethod(_one, "a whole number of at least 0")
    counts = functools.partialmethod(_several, "a whole number of at least 0")
    size = functools.partialmethod(_one, "a whole number of at least 1")
    sizes = functools.partialmethod(_several, "a whole number of at least 1")
    number = functools.partialmethod(_one, "a number of at least 0")

    def numbers(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """A list of numbers, or one."""
        kind, value = "a number of at least 0", self.get(name)
        return (value,) if _KINDS[kind](value) else self._several(kind, name, default)

    def problem(self) -> str:
        """The outputs that problem_type means, as transformers names it; "classes" without one."""
        if (name := self.text("problem_type", next(iter(_PROBLEMS)))) not in _PROBLEMS:
            raise InputError(self.at + unknown("problem_type", name, _PROBLEMS))
        return _PROBLEMS[name]

    def side(self, name: str, default: int | None = None) -> int:
        """A number of pixels or patches, or a list of equal ones."""
        value = self.get(name, default)
        first, *others = value if isinstance(value, list | tuple) and value else [value]
        if not is_whole(first) or any(other != first for other in others):
            raise self.error(name, "the side of a square in whole numbers")
        return first
