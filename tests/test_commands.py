"""Finished models at the command line: what they make of pictures, and how good they are."""

import dataclasses
import json
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

import flora_jax as flora
from flora_jax.commands.classifier import Classifier
from flora_jax.commands.evaluate import evaluate, evaluated, load_source, matched
from flora_jax.commands.predict import predict, predictions
from flora_jax.data.batches import eval_batches
from flora_jax.data.preprocessing import Preprocessing
from flora_jax.data.sources import ArraySource
from flora_jax.data.subsets import subset
from flora_jax.evaluation.evaluate import EvaluationSet, evaluate_images
from flora_jax.flora.supernet import abstract_supernet
from flora_jax.models import functional
from flora_jax.weights.metadata.preprocessing import save_preprocessing
from tests.helpers import modern
from tests.helpers.commands import ROOT
from tests.helpers.weights import random_model

NAMES = ("yak", "ant", "owl", "cat", "bee", "fox", "elk")  # of the model; folders are sorted
EMPTY = {"top1": None, "images": 0}
SPEC = flora.ViTSpec(image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=7)
LOGITS = nnx.jit(lambda model, images: model(images))
PREPROCESSING = Preprocessing(8, (0.5,), (0.2,), 0.8, "center", "bilinear")


def saved(folder, model, names=NAMES, preprocessing=PREPROCESSING):
    flora.save(model, folder)
    if names:
        (folder / "classes.json").write_text(json.dumps(names))
    if preprocessing:
        save_preprocessing(folder, preprocessing)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"), random_model(SPEC))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of any size in class folders, 75 in all, of which one cannot be decoded."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        (root / "val" / name).mkdir(parents=True)
        for i in range(10 if number else 14):
            pixels = rng.integers(0, 256, (8 + i, 12, 3), np.uint8)
            Image.fromarray(pixels).save(root / "val" / name / f"{i}.png")
    (root / "val" / "owl" / "broken.png").write_bytes(b"\x89PNG no more")
    return root


def test_predicts_what_the_network_says(folder, data, capsys):
    pictures = [data / "val/bee/3.png", data / "val/yak/0.png"]
    assert predict(folder, [str(path) for path in pictures], as_json=True) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = flora.load(folder)
    for path, line in zip(pictures, found, strict=True):
        image = PREPROCESSING.crop(3)(np.asarray(Image.open(path)))
        (logits,) = LOGITS(model, PREPROCESSING.normalization(jnp.asarray(image)[None]))
        expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = np.argsort(-expected)[:5]
        assert line["picture"] == str(path)
        assert [entry["name"] for entry in line["classes"]] == [NAMES[i] for i in best]
        shares = [entry["probability"] for entry in line["classes"]]
        np.testing.assert_allclose(shares, expected[best], atol=1e-5)


def test_a_folder_of_pictures_in_full_batches_and_a_bad_one(folder, data, capsys):
    assert predict(folder, [str(data), "nowhere.png"]) == 2
    printed = capsys.readouterr()
    errors = printed.err.splitlines()
    assert "owl/broken.png cannot be decoded: not an image" in errors[0]
    assert "nowhere.png cannot be read: No such file" in errors[1]
    lines = printed.out.splitlines()
    assert len(lines) == 74  # in two batches
    assert re.fullmatch(r".*/val/ant/0.png: (\w{3} \d+\.\d%(, |$)){5}", lines[0])
    assert predict(folder, [str(data / "val/yak/9.png")]) == 0
    assert capsys.readouterr().out.splitlines()[0] in lines


def test_transparent_pictures_on_the_background_of_the_model(folder, tmp_path):
    Image.new("RGBA", (9, 9), (255, 255, 255, 0)).save(tmp_path / "transparent.png")
    Image.new("RGB", (9, 9), (0, 40, 80)).save(tmp_path / "opaque.png")
    paths = [epath.Path(tmp_path / name) for name in ("transparent.png", "opaque.png")]
    dark = dataclasses.replace(PREPROCESSING, background=(0, 40, 80))
    one, other = predictions(
        dataclasses.replace(Classifier.open(folder), preprocessing=dark), paths
    )
    assert one.values == other.values


def test_photographs_are_turned_unless_the_model_says_no(folder, tmp_path, capsys, caplog):
    exif, upright = Image.Exif(), np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    exif[0x0112] = 8
    lying = np.rot90(upright, -1)
    for name in NAMES:
        for split, pixels, options in (
            ("photo", lying, {"exif": exif}),
            ("upright", upright, {}),
            ("lying", lying, {}),
        ):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / split / name / "0.png", **options)
    other = saved(tmp_path / "other", flora.load(folder))
    save_preprocessing(other, dataclasses.replace(PREPROCESSING, exif_orientation=False))
    (tmp_path / "photo/yak/1.HEIC").touch()
    for place, alike, unlike in ((folder, "upright", "lying"), (other, "lying", "upright")):
        shares, likelihoods = {}, {}
        for split in ("photo", "upright", "lying"):
            predict(place, [str(tmp_path / split / "yak")], as_json=True)
            shares[split] = json.loads(capsys.readouterr().out)["classes"]
            evaluate(place, f"folder:{tmp_path}", split, as_json=True)
            likelihoods[split] = json.loads(capsys.readouterr().out)["log_likelihood"]
        for found in (shares, likelihoods):
            assert found["photo"] == found[alike] != found[unlike]
    assert caplog.text.count("not read, 1 .heic") == 4


def test_evaluates_as_a_run_does(folder, data):
    classifier, source = Classifier.open(folder), load_source(f"folder:{data}")
    found = evaluated(classifier, source, "data")
    good = [i for i in range(len(source)) if "broken" not in source.key(i)]
    batches = eval_batches(subset(source.numbered_as(NAMES), good), PREPROCESSING.crop(3), 8)
    images = EvaluationSet(batches, PREPROCESSING.normalization)
    expected = evaluate_images(classifier.network, images)
    assert (found.images, found.skipped) == (74, 1)
    assert found.top1 == expected["is_correct"].mean()
    assert found.log_likelihood == pytest.approx(expected["log_likelihood"].mean(), abs=1e-5)
    logits = np.concatenate(
        [LOGITS(classifier.network, batch)[mask > 0] for batch, _, mask in images.batches]
    )
    best = np.argsort(-logits, axis=1)[:, :5]
    assert found.top5 == (best == images.labels[:, None]).any(axis=1).mean()
    for number, entry in enumerate(found.classes):
        is_class = images.labels == number
        assert (entry["name"], entry["images"]) == (NAMES[number], is_class.sum())
        assert entry["top1"] == expected["is_correct"][is_class].mean()
    pairs = [(a, b) for a, b in zip(images.labels, expected["predicted"], strict=True) if a != b]
    counts = sorted((pairs.count(pair) for pair in set(pairs)), reverse=True)
    assert [entry["images"] for entry in found.confused] == counts[:3]
    for entry in found.confused:
        pair = NAMES.index(entry["class"]), NAMES.index(entry["taken_for"])
        assert pairs.count(pair) == entry["images"]
    assert found.ms_per_image > 0


def test_evaluation_printed(folder, data, capsys):
    evaluate(folder, f"folder:{data}", split="val", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], found["images"], len(found["classes"])) == ("val", 74, 7)
    evaluate(folder, f"folder:{data}")
    printed = capsys.readouterr().out
    assert "74 images, 1 more could not be decoded" in printed
    assert f"top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}" in printed
    assert found["commonest"] == 14 / 74
    assert "the commonest class alone 18.92%" in printed
    assert re.search(r"^yak +\d+\.\d\d% of 14$", printed, re.MULTILINE)


def test_grey_network_on_colours_and_few_classes(tmp_path, capsys, caplog):
    """What the embedded default makes: a network of grey images, with no file beside it."""
    spec = dataclasses.replace(SPEC, in_channels=1, num_classes=3, blocks=())
    folder = saved(tmp_path / "model", random_model(spec), names=(), preprocessing=None)
    Image.fromarray(np.full((9, 9, 3), (200, 30, 90), np.uint8)).save(tmp_path / "a.png")
    assert predict(folder, [str(tmp_path / "a.png")], as_json=True) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert {entry["name"] for entry in json.loads(line)["classes"]} == {"0", "1", "2"}
    assert 'to be changed in preprocessing.json: {"image_size": 8, "mean": [0.5]' in caplog.text
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8)
    source = ArraySource("digits", images, np.arange(6, dtype=np.int32) % 3, 3)
    found = evaluated(Classifier.open(folder), source, "digits")
    assert (found.images, found.top5) == (6, None)
    assert "have no names" in caplog.text


def test_a_hugging_face_folder_at_the_size_of_its_preprocessing(tmp_path, data, capsys):
    """DINOv2 is trained at 518 pixels and used at 224: positions are interpolated."""
    name = "hf_dinov2_classifier"
    save_file(modern.arrays(name), tmp_path / "model.safetensors")
    config = modern.config(name)["config"] | {"id2label": {str(i): f"class {i}" for i in range(10)}}
    processor = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    for file, content in (("config.json", config), ("preprocessor_config.json", processor)):
        (tmp_path / file).write_text(json.dumps(content))
    assert Classifier.open(tmp_path).network.spec.image_size == 56
    assert predict(tmp_path, [str(data / "val/ant")]) == 0
    assert "class 3 " in capsys.readouterr().out


def test_folders_that_are_no_classifier(tmp_path, folder):
    model, run = random_model(SPEC), tmp_path / "run"
    saved(
        run / "headless",
        random_model(dataclasses.replace(SPEC, num_classes=0, blocks=())),
        names=(),
    )
    supernet = abstract_supernet(flora.RankSpace.regular(SPEC, ratios=(1 / 2, 1)))
    shapes = functional.split(supernet.network)[1]
    zeros = {name: np.zeros(shape.shape, np.float32) for name, shape in shapes.items()}
    network = functional.with_parameters(supernet.network, zeros)
    saved(run / "supernet", flora.Supernet(network, supernet.space))
    unfitted = functional.split(model)[1] | {"head.kernel": np.zeros((8, 7), np.float32)}
    saved(tmp_path / "unfitted", functional.with_parameters(model, unfitted))
    saved(tmp_path / "few", model, names=NAMES[:3])
    for place, error, message in (
        (run / "headless", ValueError, r"no classifier.*--config.pretrained="),
        (run / "supernet", ValueError, r"holds a supernet.*extract a model first"),
        (tmp_path / "unfitted", ValueError, r"weights in .*/unfitted have no classifier"),
        (tmp_path / "few", ValueError, "3 names of classes for 7 classes"),
        (run, FileNotFoundError, "inside it are headless, supernet"),
        (tmp_path / "nowhere", FileNotFoundError, "nowhere is not there"),
        (folder / "classes.json", FileNotFoundError, "is no folder of a model, with one of spec"),
    ):
        with pytest.raises(error, match=message):
            Classifier.open(place)


def test_classes_are_matched_by_name():
    assert matched(("a", "b", "c"), 3, ("c", "a", "b"), "data").tolist() == [2, 0, 1]
    assert matched(("e\u0301", "b"), 2, ("b", "\xe9"), "data").tolist() == [1, 0]
    assert matched(("Cat", "ant", "dog"), 3, ("cat", "dog"), "data").tolist() == [0, 2]
    assert matched(("a", "A", "b"), 3, ("b", "A"), "data").tolist() == [2, 1]
    assert matched(tuple("aabc"), 4, ("c", "b"), "data").tolist() == [3, 2]
    assert matched(tuple("aba"), 3, tuple("aba"), "data").tolist() == [0, 1, 2]
    for ours, theirs, message in (
        ("", "ab", "model has 3 classes and data 2"),
        ("abc", "aa", "several are called a$|several are called a:"),
        ("ab", "abc", "model has 2 classes and data 3; .*only in the data: c"),
        ("ab", "ad", r"only in the model: b; only in the data: d.*classes\.json"),
        ("aab", "aba", "several are called a"),
    ):
        with pytest.raises(ValueError, match=message):
            matched(tuple(ours), len(ours) or 3, tuple(theirs), "data")


def test_some_of_the_models_classes_are_evaluated_among_all(folder, data, tmp_path, capsys):
    for name in ("yak", "elk"):
        (tmp_path / "val" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "val" / name).symlink_to(data / "val" / name)
    classifier = Classifier.open(folder)
    some, every = (
        evaluated(classifier, load_source(f"folder:{root}"), "data") for root in (tmp_path, data)
    )
    assert (some.images, some.data_classes, every.data_classes) == (24, 2, 7)
    for few, whole in zip(some.classes, every.classes, strict=True):
        assert few == (whole if few["name"] in ("yak", "elk") else whole | EMPTY)
    evaluate(folder, f"folder:{tmp_path}")
    assert "24 images of 2 of the model's 7 classes\n" in capsys.readouterr().out


def test_data_that_cannot_be_evaluated_on(folder, data):
    for name, split, message in (
        (f"images:{data}", None, "has no labels"),
        ("digits", "val", "--split needs a dataset with splits"),
        (f"folder:{data}", "test", r"no folder .*/test"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(folder, name, split=split)


@pytest.mark.slow
def test_at_the_command_line(folder, data):
    picture, broken = data / "val/bee/3.png", data / "val/owl/broken.png"
    command = [sys.executable, "-m", "flora_jax", f"--predict={folder}", broken, picture, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["picture"] == str(picture)
    assert "cannot be decoded" in done.stderr
    assert "Traceback" not in done.stderr
