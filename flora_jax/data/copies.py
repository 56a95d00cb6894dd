"""Which images of a folder are copies of others, looked up once and kept until a file changes."""

import dataclasses
import functools
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath

from flora_jax.cluster.processes import is_first
from flora_jax.data.decoding import BadImageError
from flora_jax.data.image_folder import ImageFolderSource
from flora_jax.data.near_duplicates import SIDE, near_duplicates, thumbnail
from flora_jax.io.files import replacing, user_cache_dir
from flora_jax.io.paths import is_url
from flora_jax.progress import Progress

_FORMAT = 1  # of the file that keeps what was found, and of how it is found
_DIGEST = 16  # bytes
_LEAST_SIDE = 64  # of a JPEG that becomes a thumbnail
_MANY = 20_000  # images whose comparison takes seconds
# A file as it was, its content, its thumbnail and the group that it was in then.
_RECORD = np.dtype(
    {
        "names": ["file", "content", "thumbnail", "group"],
        "formats": [f"V{_DIGEST}", f"V{_DIGEST}", ("u1", (SIDE, SIDE, 3)), "<i4"],
    }
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Copies:
    """contents: the digest of each image's file, V16 [n]; groups: of near-duplicates, int [n]."""

    contents: np.ndarray
    groups: np.ndarray

    def at(self, indices: np.ndarray) -> "Copies":
        """Those of some of the images."""
        return Copies(self.contents[indices], self.groups[indices])


def copies_in(source: ImageFolderSource) -> Copies:
    """The near-duplicates in a folder; each image is decoded once, by threads.

    What is found is kept in the user's cache, unless the folder is at a URL, where files carry no
    times. An image that cannot be decoded is a copy of nothing but an equal file. In several
    processes, each looks for itself, and the first writes the cache.
    """
    folder = None if is_url(source.folder) else user_cache_dir("copies")
    if folder is None:
        return _found(_looked_at(source, np.zeros(len(source), _RECORD), range(len(source))))
    name = hashlib.blake2b(os.fsencode(source.folder), digest_size=_DIGEST).hexdigest()
    place = folder / f"{name}.bin"
    kept = _read(place)
    with ThreadPoolExecutor(16) as pool:  # a file's state waits for the disk
        files = list(pool.map(functools.partial(_state, source), range(len(source))))
    if files == _bytes(kept["file"]):
        return Copies(kept["content"], kept["group"])
    known = {file: i for i, file in enumerate(_bytes(kept["file"]))}
    is_known = np.array([file in known for file in files])
    records = np.zeros(len(source), _RECORD)
    records[is_known] = kept[[known[file] for file in files if file in known]]
    records["file"] = np.frombuffer(b"".join(files), f"V{_DIGEST}")
    found = _found(_looked_at(source, records, np.flatnonzero(~is_known).tolist()))
    records["group"] = found.groups
    if is_first():
        _keep(place, records)
    return found


def _looked_at(source: ImageFolderSource, records: np.ndarray, indices) -> np.ndarray:
    """The records, filled in at these indices."""
    if not len(indices):
        return records
    small = source.with_least_side(_LEAST_SIDE)
    with (
        Progress("looking for copies", len(indices), unit="image") as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        seen = pool.map(functools.partial(_look, small), indices)
        for index, (content, found) in zip(indices, seen, strict=True):
            records["content"][index] = np.void(content)
            records["thumbnail"][index] = found
            progress.update()
    return records


def _look(source: ImageFolderSource, index: int) -> tuple[bytes, np.ndarray | int]:
    """The digest of an image and its thumbnail, or 0, which is plain."""
    try:
        encoded = source.encoded(index)
    except BadImageError:  # on_bad_image decides later
        return _digest(os.fsencode(source.key(index))), 0
    try:
        return _digest(encoded), thumbnail(source.decoded(index, encoded))
    except BadImageError:
        return _digest(encoded), 0


def _found(records: np.ndarray) -> Copies:
    if len(records) > _MANY:
        log.info("comparing %d images", len(records))
    contents = np.ascontiguousarray(records["content"])
    as_numbers = contents.view("u8").reshape(-1, _DIGEST // 8)
    _, numbers = np.unique(as_numbers, axis=0, return_inverse=True)
    return Copies(contents, near_duplicates(records["thumbnail"], numbers))


def _state(source: ImageFolderSource, index: int) -> bytes:
    """Changes with the file, what it is decoded with, and the place that it has in the folder."""
    try:
        status = os.stat(source.path(index))
        state = [status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size]
    except OSError:  # reading it says why
        state = []
    return _digest(os.fsencode(f"{_FORMAT}\0{source.key(index)}\0{state}\0{source.decoding}"))


def _read(place: epath.Path) -> np.ndarray:
    """The records that were kept, none where there are none or they are damaged."""
    try:
        content = place.read_bytes()
    except OSError:
        return np.zeros(0, _RECORD)
    digest, packed = content[:_DIGEST], content[_DIGEST:]
    if len(packed) % _RECORD.itemsize or _digest(packed) != digest:
        log.warning("what is known of copies, %s, is damaged, and they are sought anew", place)
        return np.zeros(0, _RECORD)
    return np.frombuffer(packed, _RECORD)


def _keep(place: epath.Path, records: np.ndarray) -> None:
    packed = records.tobytes()
    try:
        with replacing(place) as partial:
            partial.write_bytes(_digest(packed) + packed)
    except OSError as error:
        log.info("what is known of copies is not kept: %s", error)


def _bytes(values: np.ndarray) -> list[bytes]:
    return [value.tobytes() for value in values]


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()
