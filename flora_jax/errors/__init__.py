"""Kinds of errors that a user can mend, and hints for their messages."""

from flora_jax.errors.checks import (
    check_at_least,
    check_between,
    check_known,
    hold_plain_values,
    plain,
)
from flora_jax.errors.hints import did_you_mean, differences, few, listed, unknown
from flora_jax.errors.kinds import (
    InputError,
    MissingFileError,
    MissingPackageError,
    RunError,
    StorageError,
    UserError,
)

__all__ = [
    "InputError",
    "MissingFileError",
    "MissingPackageError",
    "RunError",
    "StorageError",
    "UserError",
    "check_at_least",
    "check_between",
    "check_known",
    "did_you_mean",
    "differences",
    "few",
    "hold_plain_values",
    "listed",
    "plain",
    "unknown",
]
