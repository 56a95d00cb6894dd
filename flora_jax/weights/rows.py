"""A parameter of ours beside the arrays of a file that hold it, and the change between them.

A change can be read and written, so the table that reads a library's file also writes one.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from flora_jax.models.spec import Spec


@dataclasses.dataclass(frozen=True)
class Change:
    """How an array of a file becomes ours, and back."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def _only(array: np.ndarray) -> np.ndarray:
    (only,) = array
    return only


SAME = Change(lambda array: array, lambda array: array)
TRANSPOSED = Change(np.transpose, np.transpose)
WITHOUT_FIRST_AXIS = Change(_only, lambda array: array[None])  # [1, ...] -> [...]


def patch_kernel(spec: Spec) -> Change:
    """The change of a patch embedding's kernel [D, C, p, p] to ours [p*p*C, D]."""
    sizes = (spec.patch_size, spec.patch_size, spec.in_channels)
    return Change(
        lambda array: array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0]),
        lambda array: array.reshape(*sizes, -1).transpose(3, 2, 0, 1),
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our parameters; several sources (query, key, value) stand side by side in it."""

    target: str
    sources: tuple[str, ...]
    change: Change = SAME

    def read(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The arrays of the sources, of the shapes that `shapes` lists -> float32, contiguous.

        What is too large for float32 becomes infinite.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return np.ascontiguousarray(self._whole(arrays), np.float32)

    def write(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `read`, by source name."""
        return {name: np.ascontiguousarray(part) for name, part in self._parts(array).items()}

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of the sources of a parameter of this shape."""
        without_memory = np.broadcast_to(np.float32(0), shape)
        return {name: part.shape for name, part in self._parts(without_memory).items()}

    def _whole(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        parts = [self.change.read(array) for array in arrays]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def _parts(self, array: np.ndarray) -> dict[str, np.ndarray]:
        parts = np.split(array, len(self.sources), axis=-1)
        return dict(zip(self.sources, map(self.change.write, parts), strict=True))


Table = list[Row]
