"""What a run hands out: files that compute what its models do, each with a card."""

import dataclasses
import importlib.util
import json
import re
import sys

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

import flora_jax as flora
from flora_jax.commands.classifier import Classifier
from flora_jax.commands.predict import predictions
from flora_jax.configs import deit_t
from flora_jax.errors import InputError, MissingPackageError
from flora_jax.io.files import write_json
from flora_jax.methods import export as stage
from flora_jax.methods import start
from flora_jax.report.card import base_model, card_of, dataset_name
from flora_jax.runs.budgets import models_to_hand_out
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings
from flora_jax.runs.workdir import Run, Step, planned, stale_steps
from flora_jax.weights.export import EXPORTS
from tests.helpers.compressed import low_rank, slimmed
from tests.helpers.runs import tiny_config
from tests.helpers.slimming import images_of, random_model

SPEC = flora.ViTSpec(image_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=10)
SLIM = ("pretrain", "slim", "report")
STAGES = ("pretrain", "calibrate", "allocate", "extract", "evaluate", "report")
NAMES = ["0", "naïve: café", *"23456789"]
HAS_ONNX = all(map(importlib.util.find_spec, EXPORTS["onnx"].packages))
WRITABLE = tuple(kind for kind in EXPORTS if HAS_ONNX or not kind.startswith("onnx"))
TOP1 = {"dense": 0.9, "subnet 0.5": 0.8, "subnet 0.75": 0.85}


def settings(spec=SPEC, **changes) -> Settings:
    config = deit_t.get_config("runlocal")
    config.unlock()
    config.update({"stages": STAGES, "budget": {"macs": ((0.4, 0.5), (0.7, 0.75))}})
    config.update_from_flattened_dict(changes)
    return dataclasses.replace(Settings.from_config(config), model=spec)


def run_in(folder, models, **changes) -> Run:
    """What stages before have left, as far as the export reads it."""
    for path, model in models.items():
        flora.save(model, folder / path)
    return Run(settings(**changes), epath.Path(folder))


def in_folder(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def subnets():
    return {f"extract/subnet_{share}": low_rank(random_model(SPEC)) for share in (0.5, 0.75)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, subnets):
    """A run of two budgets that has exported everything, on pictures whose values are known."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    run = run_in(folder, subnets, export=WRITABLE, pretrained="hf:me/vit-small@v1")
    entries = [
        {"budget": budget, "top1": TOP1[f"subnet {budget[1]:g}"], "log_likelihood": -0.5}
        | {"against": {"dense": {"top1": (-0.05, -0.1, 0.0)}}}
        for budget in run.settings.budget.macs
    ]
    write_json(folder / "result.json", {"dense": {"top1": 0.9}, "subnet": entries})
    timed = [("JAX", "dense", 2.5), ("JAX", "subnet 0.75", 1.25), ("OpenVINO", "dense", 2.0)]
    rows = [{"engine": engine, "batch": 1, "model": m, "ms": ms} for engine, m, ms in timed]
    write_json(folder / "benchmark.json", {"machine": "a toaster", "rows": rows, "busy_cores": 0})
    about = {"top1": 0.85, "test_images": 450, "labels_of": "the dataset"}
    about |= {"commonest_class": 0.125, "test_copies": 7}
    write_json(folder / "extract/subnet_0.75/evaluation.json", about)
    images = images_of(SPEC, 8)
    says = np.asarray(subnets["extract/subnet_0.75"](images)).argmax(axis=1)
    labels = np.where(np.arange(8) == 3, (says + 1) % 10, says)  # one is wrong
    batches = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    stage.export_once(run, WRITABLE, images[:3], NAMES, lambda: iter(batches))
    return folder / "export"


def test_each_budget_has_all_files_and_companions(exported, subnets):
    assert in_folder(exported) == ["subnet_0.5", "subnet_0.75"]
    paths = [EXPORTS[kind].path for kind in WRITABLE]
    companions = ["README.md", "classes.json", "preprocess.py", "preprocessing.json"]
    for folder in exported.iterdir():
        assert in_folder(folder) == sorted(paths + companions)
    wanted = settings().data.preprocessing(8)
    for folder in (exported / "subnet_0.5", exported / "subnet_0.5/pytorch"):
        assert flora.read_preprocessing(folder) == wanted
        assert json.loads((folder / "classes.json").read_text()) == NAMES
    classifier = Classifier.open(exported / "subnet_0.5/pytorch")  # what --predict opens
    assert classifier.class_names == tuple(NAMES)
    assert classifier.network.spec == subnets["extract/subnet_0.5"].spec


def test_the_code_of_the_card_runs_as_it_is_written(exported, subnets, monkeypatch, capsys):
    for name in ("torch", "onnx", "onnxruntime"):
        pytest.importorskip(name, reason="runs what the card says")
    folder = exported / "subnet_0.5"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 4), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save("picture.jpg", "png", exif=exif)
    *blocks, reading = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    classifier = Classifier.open(folder / "pytorch")
    (expected,) = predictions(classifier, [folder / "picture.jpg"])
    name, probability = expected.values[0]
    programs = ("onnx", "stablehlo", "timm", "torch")
    for kind, block in zip(programs, blocks, strict=True):
        exec(f"{block}\n{reading}", {})
        shown, value = capsys.readouterr().out.rsplit(maxsplit=1)
        assert shown == name, kind
        assert float(value) == pytest.approx(probability, rel=1e-4)
    for module in ("model", "preprocess"):
        sys.modules.pop(module)
    (folder / "picture.jpg").unlink()


def test_the_card_of_a_closed_form_speaks_of_it(tmp_path, subnets):
    model = subnets["extract/subnet_0.5"]
    closed_form = ("pretrain", "compress", "finetune", "report")
    run = run_in(tmp_path, {"subnet_0.5": model, "subnet_0.75": model}, stages=closed_form)
    run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, export=("timm",)))
    card = card_of(run, models_to_hand_out(run)[0], model.spec, NAMES)
    assert "were chosen together, for 0.4 to 0.5 of the dense model's MACs, cut, and" in card
    assert "FLORA" not in card
    assert '"pruned"' in card


def test_the_card_says_what_was_measured_and_how_it_was_made(exported):
    hub = pytest.importorskip("huggingface_hub", reason="reads the card as the hub does")
    text = (exported / "subnet_0.75/README.md").read_text()
    assert "The commonest class alone has 12.50 % of them. 7 of them are copies of" in text
    assert "Turned as their EXIF data say." in text
    data = hub.ModelCard(text).data
    assert (data.library_name, data.base_model) == ("flora_jax", "me/vit-small")
    assert data.license is None
    assert "\n# license: " in text  # the user's to say
    assert data.datasets == ["digits"]
    (found,) = data.eval_results
    assert (found.metric_name, found.metric_value, found.dataset_name) == ("top-1", 0.85, "digits")
    assert "| top-1 % | 85.00 | 90.00 |" in text
    assert "| ms, JAX, batch 1 | 1.25 | 2.50 |" in text
    assert "ms, OpenVINO" not in text  # which has timed the dense model alone
    assert "Milliseconds (ms) of a batch were measured on a toaster.\n" in text
    assert "toaster" not in (exported / "subnet_0.5/README.md").read_text()
    assert "-5.00 (-10.00..+0.00) points of top-1, with a 95 % interval" in text
    assert "the budget is 0.7 to 0.75 of the dense model's MACs" in text
    if HAS_ONNX:  # the file was measured
        assert "| top-1 % of `model_float16.onnx` | 87.50 |  |" in text
    assert f"pillow`). JAX {jax.__version__} wrote it; `jax.export` [promises]" in text
    assert "naïve: café" in text
    assert "allocated by measured sensitivity" in text
    assert "evolution" not in text


def test_a_card_without_labels_claims_no_accuracy(tmp_path):
    spec = dataclasses.replace(SPEC, num_classes=0)
    run = run_in(tmp_path, {"dense": random_model(spec)}, spec=spec, stages=("pretrain",))
    run = Run(dataclasses.replace(run.settings, export=("timm",), metric=""), run.folder)
    stage.export_once(run, run.settings.export, None, ())
    text = (tmp_path / "export/dense/README.md").read_text()
    assert "model-index" not in text
    assert "It was not measured" in text
    assert "image-feature-extraction" in text
    assert not (tmp_path / "export/dense/classes.json").exists()


def test_names_are_text_in_a_card(tmp_path):
    folder = tmp_path / "a_run"
    run = run_in(folder, {"dense": random_model(SPEC)}, stages=("pretrain",), export=("timm",))
    names = ["<script>", "a|b", "*star*", "two\nlines", "[x](y)", "`c`", "#1", *"789"]
    stage.export_once(run, run.settings.export, None, names)
    text = (folder / "export/dense/README.md").read_text()
    shown = (
        r"(\<script\>, a\|b, \*star\*, two lines, \[x\](y), \`c\`, \#1, 7, 8, 9; `classes.json`)"
    )
    assert shown in text
    assert r"# a\_run: dense" in text
    assert json.loads((folder / "export/dense/classes.json").read_text()) == names


def test_features_of_lower_precision_are_measured_by_their_cosine(tmp_path):
    pytest.importorskip("onnxruntime", reason="runs ONNX files")
    spec = dataclasses.replace(SPEC, num_classes=0)
    run = run_in(tmp_path, {"dense": random_model(spec)}, spec=spec, stages=("pretrain",))
    kinds = ("onnx_float16", "onnx_int8")
    run = Run(dataclasses.replace(run.settings, export=kinds, metric=""), run.folder)
    images = images_of(spec, 8)
    stage.export_once(run, kinds, images[:3], (), lambda: iter([(images, None)]))
    text = (tmp_path / "export/dense/README.md").read_text()
    found = re.findall(r"\| cosine to this model of `model_(\w+)\.onnx` \| ([01]\.\d{4}) \|", text)
    assert [kind for kind, _ in found] == ["float16", "int8"]
    assert float(found[0][1]) == 1 >= float(found[1][1]) > 0.99
    assert "features of lower precision of their length: 0.02 in `model_float16.onnx`" in text


def test_the_slimmed_model_is_handed_out_and_the_dense_one_is_not(tmp_path):
    spec = dataclasses.replace(SPEC, depth=2, blocks=(), patch_size=2)
    models = {"dense": random_model(spec), "slim": slimmed(spec)}
    run = run_in(tmp_path, models, spec=spec, stages=SLIM, export=("stablehlo",))
    run.images = Images(run.settings)
    stage.export(Step(run, "export"), None, run.settings.export)  # compared on digits
    assert in_folder(tmp_path / "export") == ["slim"]
    assert "ViT-Slim learned" in (tmp_path / "export/slim/README.md").read_text()


def test_a_refused_file_leaves_nothing_and_what_was_finished_stays(tmp_path, subnets, monkeypatch):
    models = {"extract/subnet": subnets["extract/subnet_0.5"]}
    run = run_in(tmp_path, models, **{"budget.macs": (0.4, 0.5)})

    def refuses(model, path, images):
        raise InputError("outputs differ from the model's by 3.0e-01 of the largest")

    wrong = dataclasses.replace(EXPORTS["stablehlo"], write=refuses)
    with monkeypatch.context() as patch:
        patch.setitem(EXPORTS, "stablehlo", wrong)
        with pytest.raises(InputError, match=r"of subnet as 'stablehlo': outputs differ .* 3\.0e"):
            stage.export_once(run, ("timm", "stablehlo"), None, NAMES)
        assert in_folder(tmp_path / "export") == []
        stage.export_once(run, ("timm",), None, NAMES)
        stage.export_once(run, ("stablehlo",), None, NAMES)  # which is there: it is not written
    assert in_folder(tmp_path / "export") == ["subnet"]


# --- settings and changes -------------------------------------------------------------------------


def test_the_step_is_there_exactly_where_something_is_exported(tmp_path):
    for kinds, there in ((("onnx",), ["export"]), ((), [])):
        run = Run(settings(export=kinds), epath.Path(tmp_path))
        names = list(planned(run, start.script_of(run.settings)))
        assert names == [*STAGES[:-1], *there, "report"]


def test_exports_that_cannot_be():
    for changes, message in (
        ({"export": ("onx",)}, r"unknown export 'onx'; choose one of .* mean 'onnx'"),
        ({"export": "onnx"}, r"export must be a row of names, .* got 'onnx'"),
        ({"export": ("onnx",), "stages": ("evaluate",)}, "export needs a stage that leaves a mode"),
    ):
        with pytest.raises(InputError, match=message):
            Settings.from_config(changes)


def test_a_missing_package_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"onnxruntime.*install 'flora_jax\[onnx\]'"):
        start.run(tiny_config(export=("timm", "onnx_float16")), tmp_path / "run")
    with pytest.raises(InputError, match=r"stage export needs to know as what: --config\.export"):
        start.run(tiny_config(), tmp_path / "run", stage="export")
    assert not (tmp_path / "run").exists()


def test_what_an_export_touches(tmp_path):
    def to_redo(before, now) -> list[str]:
        runs = [Run(settings(**changes), epath.Path(tmp_path)) for changes in (before, now)]
        done, plan = (planned(run, start.script_of(run.settings)) for run in runs)
        records = {name: {"key": step.key, "seconds": 1.0} for name, step in done.items()}
        write_json(tmp_path / "stages.json", records)
        return stale_steps(runs[1], plan)

    onnx, other = {"export": ("onnx",)}, {"export": ("torch",)}
    assert to_redo({}, other) == []  # it is to be done, and nothing anew
    assert to_redo(onnx, other) == ["export"]
    assert to_redo(onnx, {}) == []
    redone = to_redo(onnx, onnx | {"budget.macs": (0.5, 0.6)})
    assert redone == ["allocate", "extract", "evaluate", "export"]


@pytest.mark.slow
def test_a_finished_run_exports_later_and_does_nothing_else(own_run, caplog):
    caplog.set_level("INFO", "flora_jax")
    start.run(tiny_config(export=("timm",)), own_run, stage="export")
    assert [line for line in caplog.messages if line.endswith(": starts")] == ["export: starts"]
    assert not (own_run / "earlier").exists()
    assert in_folder(own_run / "export") == ["subnet"]
    start.run(tiny_config(export=("stablehlo",)), own_run, stage="export")
    assert (own_run / "earlier/1/export/subnet/timm").exists()
    assert (own_run / "export/subnet/model.stablehlo.bin").exists()
    assert (own_run / "report.png").exists()


def test_names_in_cards_tell_no_place():
    assert base_model("hf:me/vit@v2") == "me/vit"
    assert base_model("/data/my vit/") == "my-vit"
    assert base_model("weights/deit_t.safetensors") == "deit_t"
    assert dataset_name("folder:/home/me/birds/") == "birds"
    assert dataset_name("tfds:imagenet_v2/topimages") == "imagenet_v2/topimages"
