"""Sources small enough to know every image of, and batches to compare."""

import numpy as np
import pytest

from flora_jax.data import sources
from tests.helpers.batches import encode, write_tfds


@pytest.fixture(scope="module")
def digits():
    return sources.digits()


@pytest.fixture(scope="module")
def tiny_tfds(tmp_path_factory):
    """(data_dir, the pictures of split "train") of a dataset of 12 + 6 PNGs in ArrayRecord."""
    data_dir = tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(256, size=(10 + i, 12, 3), dtype=np.uint8) for i in range(12)]
    pictures[0] = pictures[0][..., 0]  # grey, as some pictures of ImageNet are
    examples = [(encode(picture, "PNG"), i % 3) for i, picture in enumerate(pictures)]
    write_tfds(data_dir, 3, train=examples, validation=examples[:6])
    return str(data_dir), pictures
