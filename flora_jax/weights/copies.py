"""Prefixes of the names in a file, and the one of several copies of a network to read."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence

from flora_jax.errors import InputError, few

log = logging.getLogger(__name__)

_AVERAGED = re.compile(r"(^|[._-])(ema|swa|avg|averaged?)\d*([._-]|$)", re.IGNORECASE)


def pick(copies: Collection[str], usual: Sequence[str] = ()) -> str:
    """The copy of a network's weights to read, by the name that it stands under.

    That is the moving average, which published evaluations use; a line in the log says so. Without
    one it is the first of the `usual` names that is there.

    Raises:
      InputError: several are left to choose from.
    """
    averaged = [name for name in copies if _AVERAGED.search(name)]
    choice = averaged or [name for name in usual if name in copies][:1] or list(copies)
    if len(choice) > 1:
        raise InputError(
            f"there are weights under each of {_quoted(choice)}: leave one of them in the file"
        )
    if averaged and len(copies) > 1:
        log.info("weights stand under %s: the average, %r, is read", _quoted(copies), choice[0])
    return choice[0]


def names_within(keys: Collection[str], expected: Collection[str]) -> dict[str, str]:
    """The names in a file -> without the prefix that most of the expected ones have there.

    Prefixes are such as "module." or "_orig_mod.model."; names that lack it stay as they are. Of
    several copies under different prefixes only the names of one are returned (see `pick`).

    Raises:
      InputError: several copies without an average among them, or two names that become one.
    """
    expected = set(expected)
    found = [
        (key[:start], key)
        for key in keys
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", key)))
        if key[start:] in expected
    ]
    counts = Counter(prefix for prefix, _ in found)
    most = max(counts.values(), default=0)
    prefix = pick([p for p, count in counts.items() if count == most] or [""])
    others = {key for p, key in found if p != prefix and counts[p] == most}
    names = {key: key.removeprefix(prefix) for key in keys if key not in others}
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise InputError(f"{few(twice)} stand in the file with {prefix!r} before them and without")
    return names


def _quoted(names: Collection[str]) -> str:
    return ", ".join(repr(name) if name else "no prefix" for name in sorted(names))
