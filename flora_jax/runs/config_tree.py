"""Nested dataclasses out of nested dicts and back: a config, or the JSON that a run keeps."""

import dataclasses
import typing
from collections.abc import Container, Mapping
from typing import Any, TypeVar

from flora_jax.data.augment import Augmentation
from flora_jax.errors import InputError, did_you_mean, plain
from flora_jax.models.spec import Spec
from flora_jax.models.spec_json import spec_from_json, spec_to_json

T = TypeVar("T")


def from_mapping(settings_class: type[T], values: Mapping, name: str = "") -> T:
    """Makes the dataclass with these fields, and dataclasses in it where its annotations say so.

    Args:
      values: of some of its fields; the others have their defaults.
      name: dotted, of the section that this is.

    Raises:
      InputError: an unknown field, or a value that makes no sense; begins with its dotted name.
    """
    kinds = typing.get_type_hints(settings_class)
    for key, _ in values.items():
        if key not in kinds:
            raise InputError(f"no setting {_inner(name, key)}{did_you_mean(key, kinds)}")
    try:
        fields = {key: _read(kinds[key], value, _inner(name, key)) for key, value in values.items()}
        made = settings_class(**fields)
        for key, value in fields.items():
            if isinstance(value, tuple) and "str" not in str(kinds[key]) and _holds_text(value):
                raise InputError(f"{key} must hold numbers alone, got {value}")
        return made
    except _NamedError:
        raise
    except InputError as error:
        raise _NamedError(_with_name(name, str(error), kinds)) from error
    except (TypeError, ValueError) as error:  # a number where there should be a pair, or the like
        raise _NamedError(_with_name(name, f"a value of another form: {error}", kinds)) from error


class _NamedError(InputError):
    """An error that says already which setting it is about."""


def to_mapping(settings) -> dict[str, Any]:
    """Writes a dataclass as nested dicts, of which `from_mapping` makes an equal one."""
    return {f.name: _write(getattr(settings, f.name)) for f in dataclasses.fields(settings)}


def _read(kind: type, value, name: str):
    if kind is Augmentation:
        changes = {key: plain(each) for key, each in value.items()}
        return Augmentation(changes.pop("name"), changes)
    if kind is Spec:
        return spec_from_json({key: plain(each) for key, each in value.items()})
    if dataclasses.is_dataclass(kind):
        return from_mapping(kind, value, name)
    return plain(value)


def _holds_text(value) -> bool:
    return isinstance(value, str) or (isinstance(value, tuple) and any(map(_holds_text, value)))


def _write(value):
    if isinstance(value, Augmentation):
        return {"name": value.name, **value.changes}
    if isinstance(value, Spec):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        fields["blocks"] = spec_to_json(value)["blocks"]
        if value == dataclasses.replace(value, blocks=()):
            del fields["blocks"]  # all as the other fields make them
        return {"family": value.family, **fields}
    return to_mapping(value) if dataclasses.is_dataclass(value) else value


def _with_name(name: str, message: str, fields: Container[str]) -> str:
    if not name:
        return message
    return f"{name}.{message}" if message.partition(" ")[0] in fields else f"{name}: {message}"


def _inner(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
