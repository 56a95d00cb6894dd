"""What timm's augmentation gives."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def golden(data_dir):
    """timm's output of every operation of rand-m9-mstd0.5-inc1, over its range of magnitudes."""
    with np.load(data_dir / "randaugment_ops.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def image(golden):
    return golden["image"]
