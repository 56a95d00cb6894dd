"""Checks of values that a user sets: the error names the value and what would be accepted."""

import math

from flora_jax.errors.hints import choices
from flora_jax.errors.kinds import InputError


def plain(value):
    """Tuples of plain numbers where there are lists, or arrays and numbers of numpy."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


def hold_plain_values(owner: object) -> None:
    """Makes `plain` values of all fields of a frozen dataclass, so that it can be hashed."""
    for name, value in list(vars(owner).items()):
        object.__setattr__(owner, name, plain(value))


def check_at_least(owner: object, least: int, *names: str) -> None:
    """Raises InputError unless these attributes, or all items of tuples, are at least this."""
    for name in names:
        value = getattr(owner, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not least <= number < math.inf:
                raise InputError(f"{name} must be at least {least}, got {value}")


def check_between(owner: object, low: float, high: float, name: str) -> None:
    """Raises InputError unless the attribute lies between these, without them."""
    if not low < getattr(owner, name) < high:
        raise InputError(f"{name} must lie in ({low}, {high}), got {getattr(owner, name)}")


def check_known(owner: object, name: str, known: tuple[str, ...]) -> None:
    """Raises InputError unless the attribute is one of those known."""
    value = getattr(owner, name)
    if value not in known:
        raise InputError(f"{name} {value!r} is unknown; {choices(value, known)}")
