"""FLORA in a notebook: from weights to a fine-tuned subnet, on arrays."""

import re

import numpy as np
import pytest

import flora_jax as flora
from flora_jax.configs import digits as digits_config
from flora_jax.data.sources import digits
from flora_jax.io.json_lines import read_records
from flora_jax.runs.settings import Settings
from tests.helpers.commands import ROOT

DIGITS = flora.ViTSpec(
    image_size=8,
    patch_size=2,
    embed_dim=24,
    depth=2,
    num_heads=2,
    num_classes=10,
    in_channels=1,
)


def image_set(start: int, stop: int) -> flora.ImageSet:
    source = digits()
    pixels = flora.Normalization((0.3,), (0.37,))
    return flora.ImageSet(source.images[start:stop], source.labels[start:stop], pixels)


@pytest.mark.slow
def test_the_examples_of_the_readme_run_as_they_stand(tmp_path, monkeypatch, capsys):
    """On a dense model that is trained here, as the demo leaves one behind."""
    monkeypatch.chdir(tmp_path)
    recipe = flora.Recipe(epochs=10, batch_size=50, learning_rate=0.04, warmup_epochs=1)
    dense = flora.train(
        flora.create(DIGITS),
        image_set(0, 1200),
        recipe,
        directory="runs/dense",
        heldout=image_set(1200, 1400),
    )
    flora.save(dense, "runs/digits/dense")
    assert read_records("runs/dense/metrics.jsonl")[-1]["heldout_top1"] > 0.85

    readme = (ROOT / "README.md").read_text()
    flora_example, closed_form, slim_example = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    found: dict = {}
    exec(flora_example, found)
    before, after = map(float, capsys.readouterr().out.split())
    assert before > 0.85
    assert after > before - 0.1
    small = flora.load("runs/nb/small")
    assert 0.45 < flora.macs(small.spec) / flora.macs(DIGITS) <= 0.5

    exec(closed_form, found)
    for name, share in (("half", 1 / 2), ("third", 1 / 3)):
        assert flora.macs(found[name].spec) <= share * flora.macs(DIGITS)
    assert found["subnet"].spec == small.spec
    top1 = flora.top1(found["half"], found["test"].on_devices)
    assert top1 > before - 0.2

    exec(slim_example, found)
    slimmed = found["small"]
    assert flora.macs(slimmed.spec) < 0.9 * flora.macs(DIGITS)
    assert flora.top1(slimmed, found["test"].on_devices) > before - 0.1


@pytest.mark.slow
def test_filtering_in_memory_keeps_a_part_of_every_block(tmp_path):
    model, images = flora.create(DIGITS), image_set(0, 200)
    supernet = flora.factorize(model, flora.RankSpace.regular(DIGITS, ratios=(1 / 8, 1 / 2, 1)))
    recipe = flora.Recipe(epochs=1, batch_size=50, warmup_epochs=0, evaluate_epochs=0)
    half = flora.macs(DIGITS) // 2
    kept = flora.filter_space(
        supernet, images, image_set(200, 300), half, recipe, directory=tmp_path, teacher=model
    )
    assert [len(triples) for triples in kept.kept] == [27 - int(0.7 * 27)] * DIGITS.depth


def test_a_whole_run_is_a_function(tmp_path):
    with pytest.raises(RuntimeError, match="stage 'search' needs 'pretrain'"):
        flora.run(digits_config.get_config(), tmp_path, "search")
    assert flora.Settings() == Settings()
    assert flora.Recipe().epochs == 150


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((3, 8, 8, 1), np.float32), np.zeros(3, int), "must be uint8.*got float32"),
        (np.zeros((3, 8, 8), np.uint8), np.zeros(3, int), r"of shape \(3, 8, 8\)"),
        (np.zeros((3, 8, 8, 1), np.uint8), np.zeros(2, int), r"3 images have labels of shape \(2,"),
    ],
)
def test_images_that_are_none_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        flora.ImageSet(images, labels)
