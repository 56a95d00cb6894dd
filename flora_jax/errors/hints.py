"""Hints for messages: the nearest valid choice, a few of many names, what differs between two."""

import difflib
from collections.abc import Collection, Iterable, Iterator


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'NAME'?)" with the known name that is closest; empty where none is close."""
    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is none of those known, which it lists."""
    return f"unknown {what} {name!r}; {choices(name, known)}"


def choices(name: str, known: Iterable[str]) -> str:
    """All names that are known, and the one that is closest to this."""
    known = list(known)
    return f"choose one of {', '.join(known)}{did_you_mean(name, known)}"


def few(names: Collection[str], limit: int = 6) -> str:
    """Names for a message: "a, b and 7 more", or "none"."""
    shown = ", ".join(sorted(names)[:limit]) or "none"
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def differences(there, here, name: str = "") -> Iterator[tuple[str, object, object]]:
    """Differences of two nested dicts of JSON values: (dotted name, value there, value here)."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            inner = f"{name}.{key}" if name else key
            yield from differences(there.get(key), here.get(key), inner)
    elif there != here:
        yield name, there, here


def listed(changes: Iterable[tuple[str, object, object]]) -> str:
    """One line for each of the `differences`, indented; empty where there is none."""
    return "".join(f"\n  {name}: {old!r} there, {new!r} now" for name, old, new in changes)
