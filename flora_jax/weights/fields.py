"""The fields of a JSON object that someone else wrote, each checked as it is read."""

from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from flora_jax.errors import InputError
from flora_jax.io.files import read_json


class Fields:
    """A JSON object; its errors name the file and the key. What is null says nothing.

    Raises:
      InputError: it is no object, or a field is not what was asked for.
    """

    def __init__(self, where: object, values: Any, key: str = ""):
        self.where, self._key = where, key
        if not isinstance(values, Mapping):
            raise (
                self.error(key, "an object with fields")
                if key
                else InputError(
                    f"{where}: expected an object with fields, got {type(values).__name__}"
                )
            )
        self._values = {name: value for name, value in values.items() if value is not None}

    @classmethod
    def read(cls, path: epath.Path) -> "Fields":
        """The object that a file holds."""
        return cls(path, read_json(path))

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it stands."""
        return self._values.get(name, default)

    def error(self, name: str, expected: str) -> InputError:
        """What to raise where a field is something else."""
        return InputError(f"{self.where}: {name} must be {expected}, got {self.get(name)!r}")

    def within(self, name: str) -> "Fields":
        """The object in a field, empty where there is none."""
        inner = self.get(name, {})
        if not isinstance(inner, Mapping):
            raise self.error(name, "an object with fields")
        return Fields(f"{self.where}: {name}", inner)

    def text(self, name: str, default: str) -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.error(name, "a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not _is_number(value):
            raise self.error(name, "a number")
        return value

    def numbers(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """A list of numbers, or one."""
        value = self.get(name, default)
        values = (value,) if _is_number(value) else value
        if not isinstance(values, list | tuple) or not all(map(_is_number, values)):
            raise self.error(name, "a list of numbers")
        return tuple(values)

    def side(self, name: str, default: int | None = None) -> int:
        """A number of pixels, or a list of equal ones: pictures are square here."""
        value = self.get(name, default)
        sides = set(value) if isinstance(value, list | tuple) and value else {value}
        (side, *others) = sides
        if others or not is_whole(side) or side < 1:
            raise self.error(name, "the side of a square in whole pixels")
        return int(side)


def is_whole(value: object) -> bool:
    """Whether it is a whole number, of JSON's and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
