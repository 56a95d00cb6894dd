"""Errors that a user can mend: the command line prints their message alone, without a traceback.

Each is also the built-in exception that Python programs expect in its place. Whatever else is
raised is a fault of ours, and keeps its traceback.
"""


class UserError(Exception):
    """Something that the user can mend; the message says what and how."""


class InputError(UserError, ValueError):
    """A value, a file or a combination of them that cannot be used."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that should be there is not."""


class MissingPackageError(UserError, ImportError):
    """An optional package is not installed."""


class RunError(UserError, RuntimeError):
    """A run cannot go on now, and could if something else were done first."""


class StorageError(UserError, OSError):
    """Something could not be written or read: a full disk, missing permission, a lost mount."""
