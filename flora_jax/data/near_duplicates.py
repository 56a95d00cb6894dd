"""Which pictures are copies of others: resized, encoded anew, or cropped by a little.

A picture is known by its thumbnail, from which brightness and contrast are taken out. Two whose
thumbnails are nearly the same are linked, and a group is what a chain of links holds together.
Measured on 3,280 drawings: docs/decisions.md.
"""

import numpy as np
import scipy
from PIL import Image

SIDE = 10  # of a thumbnail
ALIKE = (0.95, 0.97, 0.98, 0.99, 0.995)  # correlations that link two, each for larger groups
PLAIN = 2.0  # levels of grey that a thumbnail strays, below which it tells nothing
_LENGTH = 2000  # of a thumbnail in whole numbers: sums of products stay below 2**24, and so exact
_TILE = 2048  # thumbnails compared with as many others at once


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [SIDE, SIDE, 3]"""
    picture = Image.fromarray(pixels)
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def near_duplicates(thumbnails: np.ndarray, contents: np.ndarray) -> np.ndarray:
    """Numbers the groups of pictures that are copies of one another.

    Files of the same content are one group. What is plain, such as a blank page, is a copy of
    nothing else. A group of more than a twentieth of all pictures, or of 200, is no group of copies
    but a chain through pictures that have much in common: it is linked anew by a higher
    correlation. Takes time with the square of the number of pictures, memory with the number.

    Args:
      thumbnails: uint8 [n, SIDE, SIDE, 3]; one of a single value is plain.
      contents: [n], of which equal ones are equal files.

    Returns:
      int [n], 0, 1, ...: the group of each picture; which pictures share one does not depend on
      their order.
    """
    _, groups = np.unique(contents, return_inverse=True)
    directions, is_plain = _directions(thumbnails)
    most = np.clip(len(groups) // 20, 10, 200)
    waiting, kept = [np.flatnonzero(~is_plain)], []
    for alike in ALIKE:
        too_large: list[np.ndarray] = []
        for members in waiting:
            linked = _linked(directions[members], alike)
            for part in _members(linked):
                if len(part) > most and alike != ALIKE[-1]:
                    too_large.append(members[part])
                else:
                    kept.append(members[part])
        waiting = too_large
    neighbours = [np.stack([group[:-1], group[1:]]) for group in kept]
    return _joined(groups, *np.concatenate([np.zeros((2, 0), int), *neighbours], axis=1))


def _directions(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, d] of one length, in whole numbers; whether each is of a plain picture."""
    pixels = thumbnails.reshape(len(thumbnails), SIDE * SIDE, 3).astype(np.float32)
    values = (pixels - pixels.mean(axis=1, keepdims=True)).reshape(len(pixels), -1)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    is_plain = lengths[:, 0] < PLAIN * np.sqrt(values.shape[1])
    return np.rint(_LENGTH * values / np.maximum(lengths, 1)), is_plain


def _linked(directions: np.ndarray, alike: float) -> np.ndarray:
    """int [n]: what a chain of links holds together has one number."""
    groups = np.arange(len(directions))
    for row in range(0, len(directions), _TILE):
        for column in range(row, len(directions), _TILE):
            products = directions[row : row + _TILE] @ directions[column : column + _TILE].T
            one, other = np.nonzero(products >= alike * _LENGTH**2)
            if len(one) > (len(products) if row == column else 0):  # each is its own copy
                groups = _joined(groups, row + one, column + other)
    return groups


def _joined(groups: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The groups [n] after those of pictures `one` [k] and `other` [k] have become one."""
    count = len(groups)
    pairs = np.unique(groups[one] * count + groups[other])
    links = (np.ones(len(pairs)), (pairs // count, pairs % count))
    matrix = scipy.sparse.coo_matrix(links, (count, count))
    return scipy.sparse.csgraph.connected_components(matrix, directed=False)[1][groups]


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """The places of each group's members."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.cumsum(np.bincount(groups))[:-1])
