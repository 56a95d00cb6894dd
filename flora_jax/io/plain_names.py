"""Orbax takes [ ] * ? in the name of a folder for patterns, TensorStore \\ for another /, and both
refuse what is not UTF-8. They are given another name of the folder: a link to it."""

import functools
import hashlib
import os
import pathlib
import re
import tempfile

from etils import epath

from flora_jax.io.files import user_cache_dir
from flora_jax.io.paths import absolute, is_url

_ODD = re.compile(r"[\[\]*?{}\\]")


def plainly_named(path: epath.PathLike) -> epath.Path:
    """The absolute path, or where a folder in it that exists has an odd name, one through a link.

    URLs stay as they are. The link is the same in every process of a user.
    """
    path = absolute(path)
    odd = None if is_url(path) else next(filter(_is_odd, (path, *path.parents)), None)
    if odd is None or not odd.exists():
        return path
    return _link_to(os.fspath(odd)) / path.relative_to(odd)


def _is_odd(path: epath.Path) -> bool:
    try:
        return path.name.encode() != os.fsencode(path.name) or bool(_ODD.search(path.name))
    except UnicodeEncodeError:  # bytes that are not UTF-8, or letters that the locale lacks
        return True


@functools.cache
def _link_to(folder: str) -> epath.Path:
    name = hashlib.blake2b(os.fsencode(folder), digest_size=8).hexdigest()
    cache = user_cache_dir("links")
    if cache is None or any(map(_is_odd, (cache, *cache.parents))):
        cache = epath.Path(tempfile.mkdtemp(prefix="flora_jax-"))
    link = pathlib.Path(cache) / name
    if not link.is_symlink():
        partial = link.with_suffix(f".partial-{os.getpid()}")
        partial.symlink_to(folder)
        partial.replace(link)  # another process may have made it meanwhile
    return epath.Path(link)
