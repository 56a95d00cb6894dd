"""The fields of a JSON object that someone else wrote, each checked as it is read."""

from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from flora_jax.errors import InputError
from flora_jax.io.files import read_json
from flora_jax.weights.metadata.kinds import FLAG, NUMBER, NUMBERS, TEXT, Kind, is_whole


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
        return self._checked(name, default, TEXT)

    def flag(self, name: str, default: bool) -> bool:
        return self._checked(name, default, FLAG)

    def number(self, name: str, default: float) -> float:
        return self._checked(name, default, NUMBER)

    def numbers(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """A list of numbers, or one."""
        value = self.get(name, default)
        return (value,) if NUMBER.fits(value) else tuple(self._checked(name, default, NUMBERS))

    def _checked(self, name: str, default: Any, kind: Kind) -> Any:
        value = self.get(name, default)
        if not kind.fits(value):
            raise self.error(name, kind.title)
        return value

    def side(self, name: str, default: int | None = None) -> int:
        """A number of pixels, or a list of equal ones: pictures are square here."""
        value = self.get(name, default)
        sides = set(value) if isinstance(value, list | tuple) and value else {value}
        (side, *others) = sides
        if others or not is_whole(side):
            raise self.error(name, "the side of a square in whole pixels")
        return int(side)
