"""Fields of a JSON object that someone else wrote, each checked as it is read."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from flora_jax.errors import InputError
from flora_jax.io.files import read_json


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether it is a whole number of JSON, no truth value, and at least this."""
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


@contextlib.contextmanager
def naming(place: object) -> Iterator[None]:
    """Names the file in the errors of what is made of its content."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


class Fields(Mapping[str, Any]):
    """A JSON object; `at`, the place that it is from, begins its errors. What is null says nothing.

    A field that is missing has the default that is asked for with it; without one it is needed.

    Raises:
      InputError: it is no object, or a field is not what was asked for; names the field.
    """

    def __init__(self, values: Any, at: str = ""):
        self.at = at
        if not isinstance(values, Mapping):
            where = at.rstrip(".: ") or "it"
            raise InputError(f"{where} must be an object with fields, got {values!r}")
        self._values = {name: value for name, value in values.items() if value is not None}

    @classmethod
    def read(cls, path: epath.Path) -> "Fields":
        """The object that a file holds."""
        return cls(read_json(path), f"{path}: ")

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

    def text(self, name: str, default: str | None = None) -> str:
        return self._checked(name, default, lambda v: isinstance(v, str), "a string")

    def texts(self, name: str) -> tuple[str, ...]:
        return self._list(name, (), lambda v: isinstance(v, str), "strings")

    def flag(self, name: str, default: bool | None = None) -> bool:
        return self._checked(name, default, lambda v: isinstance(v, bool), "true or false")

    def count(self, name: str, default: int | None = None) -> int:
        return self._checked(
            name, default, lambda v: is_whole(v, 0), "a whole number of at least 0"
        )

    def size(self, name: str, default: int | None = None) -> int:
        return self._checked(name, default, is_whole, "a whole number of at least 1")

    def sizes(self, name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        return self._list(name, default, is_whole, "whole numbers of at least 1", least=1)

    def number(self, name: str, default: float | None = None) -> float:
        return self._checked(name, default, _is_number, "a number of at least 0")

    def numbers(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """A list of numbers, or one."""
        value = self.get(name, default)
        return (
            (value,)
            if _is_number(value)
            else self._list(name, default, _is_number, "numbers of at least 0")
        )

    def side(self, name: str, default: int | None = None) -> int:
        """A number of pixels or patches, or a list of equal ones."""
        value = self.get(name, default)
        first, *others = value if isinstance(value, list | tuple) and value else [value]
        if not is_whole(first) or any(other != first for other in others):
            raise self.error(name, "the side of a square in whole numbers")
        return first

    def _list(
        self, name: str, default: Any, fits: Callable[[Any], bool], what: str, least: int = 0
    ) -> tuple:
        def is_list(value: Any) -> bool:
            is_long = isinstance(value, list | tuple) and len(value) >= least
            return is_long and all(map(fits, value))

        return tuple(self._checked(name, default, is_list, f"a list of {what}"))

    def _checked(self, name: str, default: Any, fits: Callable[[Any], bool], what: str) -> Any:
        value = self.get(name, default)
        if not fits(value):
            raise self.error(name, what)
        return value
