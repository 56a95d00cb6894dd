"""Copies of pictures: equal files, and those that are resized, encoded anew or cropped by a little.

Two pictures are linked where their thumbnails, less each colour's mean, correlate, and a group is
what a chain of links holds together. Measured on 3,280 drawings: docs/decisions.md.
"""

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy
from PIL import Image

from flora_jax.cluster.processes import is_first
from flora_jax.data.decoding import BadImageError
from flora_jax.data.image_folder import ImageFolderSource
from flora_jax.data.kept import digest, keep, read_kept
from flora_jax.data.listing import stamp_of
from flora_jax.data.sources import Source
from flora_jax.io.files import user_cache_dir
from flora_jax.io.paths import is_url
from flora_jax.progress import Progress

MOST_COMPARED = 50_000  # images, which takes about a minute
SIDE = 10  # of a thumbnail
ALIKE = (0.95, 0.97, 0.98, 0.99, 0.995)  # correlations that link two, each for larger groups
PLAIN = 2.0  # levels of grey that a thumbnail strays, below which it tells nothing
_LENGTH = 2000  # of a thumbnail in whole numbers: sums of products stay below 2**24, and so exact
_TILE = 2048  # thumbnails compared with as many others at once


def copies_across(train: Source, heldout: Source, test: Source) -> tuple[int, int] | None:
    """How many held-out images are copies of training images, and test images of either.

    None where it is not looked for: outside local folders, and in more than MOST_COMPARED images.
    """
    parts = (train, heldout, test)
    folders = [folder for folder in map(_folder_of, parts) if folder is not None]
    sizes = [len(part) for part in parts]
    if len(folders) < len(parts) or is_url(folders[0].root) or sum(sizes) > MOST_COMPARED:
        return None
    keys = [part.key(index) for part in parts for index in range(len(part))]
    whole = folders[0]
    if len({folder.split for folder in folders}) > 1:
        split = " ".join(folder.split for folder in folders)
        labels = np.zeros(len(keys), np.int32)
        whole = dataclasses.replace(whole, split=split, keys=keys, labels=labels)
    known, searched = sizes[0], sizes[0] + sizes[1]
    groups = _groups_of(keys, whole)
    seen = groups[:searched]
    if folders[0].split == folders[1].split:  # by what `split_by_content` goes, without others
        seen = _groups_of(keys[:searched], folders[0])
    of_heldout = np.isin(seen[known:], seen[:known])
    return int(of_heldout.sum()), int(np.isin(groups[searched:], groups[:searched]).sum())


def _groups_of(keys: Sequence[str], folder: ImageFolderSource) -> np.ndarray:
    """The numbers of the groups, uint64 [n], that these images of a folder belong to."""
    group_of = dict(zip(folder.keys, copies_in(folder)[1].tolist(), strict=True))
    return np.array([group_of[key] for key in keys])


def _folder_of(source: Source) -> ImageFolderSource | None:
    """What a source reads its images from, where that is a folder."""
    while not isinstance(source, ImageFolderSource) and hasattr(source, "source"):
        source = source.source
    return source if isinstance(source, ImageFolderSource) else None


def copies_in(source: ImageFolderSource) -> np.ndarray:
    """Digests of the images' files and numbers of their groups of copies, uint64 [2, n].

    Each image is decoded once; what is found is kept in the user's cache until a file changes, but
    at a URL, where files carry no times. A bad image is a copy of nothing but an equal file.
    """
    source = source.with_least_side(64)
    folder = None if is_url(source.folder) else user_cache_dir("copies")
    if folder is None:
        return _look(source)
    place = folder / digest(os.fsencode(source.folder)).hex()
    with ThreadPoolExecutor(16) as pool:  # a file's state waits for the disk
        states = list(pool.map(stamp_of, map(source.path, range(len(source)))))
    state = digest(repr((source.keys, states, source.decode.keywords)).encode())
    kept = read_kept(place)
    if kept and kept.startswith(state):
        return np.frombuffer(kept, np.uint64, offset=len(state)).reshape(2, -1)
    found = _look(source)
    if is_first():
        keep(place, state + found.tobytes())
    return found


def _look(source: ImageFolderSource) -> np.ndarray:
    thumbnails = np.zeros((len(source), SIDE, SIDE, 3), np.uint8)

    def look(index: int) -> bytes:
        content = os.fsencode(source.key(index))
        try:
            content = source.encoded(index)
            thumbnails[index] = thumbnail(source.decode(content, source.key(index)))
        except BadImageError:  # on_bad_image decides later
            pass
        return digest(content)[:8]

    with (
        Progress("looking for copies", len(source), unit="image") as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        found = []
        for content in pool.map(look, range(len(source))):
            found.append(content)
            progress.update()
    contents = np.frombuffer(b"".join(found), np.uint64)
    return np.stack([contents, near_duplicates(thumbnails, contents).astype(np.uint64)])


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [SIDE, SIDE, 3]"""
    picture = Image.fromarray(pixels)
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def near_duplicates(thumbnails: np.ndarray, contents: np.ndarray) -> np.ndarray:
    """Numbers the groups of pictures that are copies of one another.

    Files of the same content are one. What is plain, such as a blank page, is a copy of nothing
    else. A group of more than a twentieth of all pictures, or of 200, is no group of copies but a
    chain through pictures that have much in common: it is linked anew by a higher correlation.
    Takes time with the square of the number of pictures, memory with the number.

    Args:
      thumbnails: uint8 [n, SIDE, SIDE, 3].
      contents: [n], of which equal ones are equal files.

    Returns:
      int [n]: the number of each picture's group; which pictures share one does not depend on
      their order.
    """
    _, firsts, files = np.unique(contents, return_index=True, return_inverse=True)
    pixels = thumbnails[firsts].reshape(len(firsts), SIDE * SIDE, 3).astype(np.float32)
    values = (pixels - pixels.mean(axis=1, keepdims=True)).reshape(len(firsts), -1)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    directions = np.rint(_LENGTH * values / np.maximum(lengths, 1))
    groups, most = np.arange(len(firsts)), np.clip(len(contents) // 20, 10, 200)
    chains = [np.flatnonzero(lengths[:, 0] >= PLAIN * np.sqrt(values.shape[1]))]
    for alike in ALIKE:
        parts = [chain[part] for chain in chains for part in _linked(directions[chain], alike)]
        for part in parts:
            groups[part] = part[:1]
        chains = [part for part in parts if len(part) > most]
    return groups[files]


def _linked(directions: np.ndarray, alike: float) -> list[np.ndarray]:
    """The indices of each set that a chain of links holds together."""
    count = len(directions)
    groups = np.arange(count)
    for row in range(0, count, _TILE):
        for column in range(row, count, _TILE):
            products = directions[row : row + _TILE] @ directions[column : column + _TILE].T
            one, other = np.nonzero(products >= alike * _LENGTH**2)
            one, other = groups[row + one], groups[column + other]
            if (one != other).any():
                links = scipy.sparse.coo_matrix((np.ones(len(one)), (one, other)), (count, count))
                groups = scipy.sparse.csgraph.connected_components(links, directed=False)[1][groups]
    return np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
