"""The whole method on a TFDS dataset in ArrayRecord, where there is no TensorFlow."""

import json

import numpy as np
import pytest

from flora_jax.data import sources
from tests.helpers.batches import encode, write_tfds
from tests.helpers.commands import run_flora


@pytest.fixture(scope="module")
def dark_and_light(tmp_path_factory):
    """Folder of a dataset of 80 JPEGs of 24 x 24 to train on and 20 to test on, in two classes."""
    data_dir = tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(0)

    def examples(count):
        for i in range(count):
            picture = rng.integers(0, 128, size=(24, 24, 3)) + 127 * (i % 2)
            yield encode(picture.astype(np.uint8), "JPEG"), i % 2

    write_tfds(data_dir, 2, train=list(examples(80)), validation=list(examples(20)))
    return data_dir


@pytest.mark.slow
def test_the_whole_method_on_tfds_without_tensorflow(dark_and_light, tmp_path, monkeypatch):
    (tmp_path / "tensorflow.py").write_text("raise ModuleNotFoundError('no TensorFlow here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run_flora(
        tmp_path / "run",
        "--config.data.name=tfds:tiny_pictures",
        f"--config.data.data_dir={dark_and_light}",
        "--config.data.augmentation.name=inception",
        "--config.model.num_classes=2",
        "--config.model.depth=1",
        "--config.space.ratios=(0.25, 0.5, 1.0)",
        "--config.uniform_baseline=none",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert set(result) == {"dense", "allocated", "subnet", "data"}
    assert result["dense"]["top1"] == 1.0
    assert result["subnet"]["macs"] < 0.6 * result["dense"]["macs"]


def test_large_jpegs_of_tfds_are_decoded_smaller(dark_and_light):
    source = sources.tfds("tiny_pictures", "train", dark_and_light, least_side=12)
    assert source[0]["image"].shape == (12, 12, 3)
