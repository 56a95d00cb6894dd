"""Images in class folders."""

import numpy as np
import pytest

from tests.helpers.pictures import save


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder that holds the indices."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/flora_jax/index"


@pytest.fixture
def pets(tmp_path):
    """train: 6 + 6 pictures, val: 2 + 2. The red of a picture is its number in its class."""
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                picture = np.full((20, 30, 3), (i, 0, 0), np.uint8)
                save(tmp_path / "pets" / split / name / f"{i}.png", picture)
    return tmp_path / "pets"
