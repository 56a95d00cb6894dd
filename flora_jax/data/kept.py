"""Bytes in a file that are made again where it is missing or damaged."""

import hashlib
import logging

from etils import epath

from flora_jax.io.files import replacing

_DIGEST = 16  # bytes

log = logging.getLogger(__name__)


def digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def read_kept(place: epath.Path) -> bytes | None:
    """The bytes that `keep` has left there; None where there are none or they are damaged."""
    try:
        content = place.read_bytes()
    except OSError:
        return None
    kept = content[_DIGEST:]
    if digest(kept) != content[:_DIGEST]:
        log.warning("%s is damaged and is made again", place)
        return None
    return kept


def keep(place: epath.Path, content: bytes) -> bool:
    """Keeps the bytes; False, with a line in the log, where they cannot be written."""
    try:
        with replacing(place) as partial:
            partial.write_bytes(digest(content) + content)
    except OSError as error:
        log.info("%s is not kept: %s", place, error)
        return False
    return True
