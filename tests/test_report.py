"""Reports of a run, picture and page, at any time; the notebook on it."""

import json
import re
import shutil

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image
from safetensors.numpy import load_file

import flora_jax as flora
from flora_jax.data.preprocessing import Preprocessing
from flora_jax.errors import MissingFileError
from flora_jax.io.files import locked
from flora_jax.methods import start
from flora_jax.weights.metadata.preprocessing import save_preprocessing
from tests.helpers.commands import ROOT
from tests.helpers.pictures import save
from tests.helpers.runs import tiny_config
from tests.helpers.weights import random_model


@pytest.mark.slow
def test_picture_is_drawn(finished_run):
    with Image.open(finished_run / "report.png") as image:
        assert image.size[0] == 1760
        assert len(image.convert("RGB").getcolors(2**24)) > 100


@pytest.mark.slow
def test_page_tells_the_whole_run(finished_run):
    page = (finished_run / "report.html").read_text()
    for title in (
        *("Models, on the test images", "What the search scored, on held-out images"),
        *("Held-out quality while training", "Training loss", "Ranks of the subnet"),
        *("Accuracy by class, on the test images", "What the subnet confuses most"),
        *("Other settings that differ from the defaults", "Stages", "Images"),
    ):
        assert re.search(f"<h[23]>{title}", page)
    result = json.loads((finished_run / "result.json").read_text())
    assert f"top-1 accuracy {100 * result['subnet']['top1']:.2f} %" in page
    assert "not finished" not in page
    each = load_file(finished_run / "test_images.safetensors")
    wrong = each["subnet/predicted"] != each["label"]
    pairs = {*zip(each["label"][wrong], each["subnet/predicted"][wrong], strict=True)}
    assert page.count('<img src="data:image/png;base64,') == min(8, len(pairs))


@pytest.mark.slow
def test_a_report_is_there_at_any_time(own_run, tmp_path, capsys, monkeypatch, caplog):
    """Beside a process that holds the run, of what there is, and where its images are gone."""
    for name in ("config.json", "images.json"):
        shutil.copy(own_run / name, tmp_path)
    without = tuple(stage for stage in tiny_config().stages if stage != "report")
    with locked(tmp_path / "run.lock"):
        start.run(tiny_config(stages=without), tmp_path, "report")
    assert "Done: nothing. To come: pretrain, " in capsys.readouterr().out

    for name in ("result.json", "test_images.safetensors", "report.html", "report.png"):
        (own_run / name).unlink()
    shutil.rmtree(own_run / "subnet")  # which is to come out of extract/subnet
    done = json.loads((own_run / "stages.json").read_text())
    for name in ("finetune", "evaluate", "report"):
        del done[name]["seconds"]  # as while they go on
    (own_run / "stages.json").write_text(json.dumps(done))

    def gone(settings):
        raise MissingFileError("the images are gone")

    with monkeypatch.context() as patch:
        patch.setattr(start, "Images", gone)
        start.run(tiny_config(), own_run, "report")
    assert "goes without the images: the images are gone" in caplog.text
    printed = capsys.readouterr().out
    assert "To come: finetune, evaluate." in printed
    assert [line.split()[0] for line in printed.splitlines() if line.endswith(" k")] == [
        *("dense", "subnet", "allocated", "uniform")
    ]
    page = (own_run / "report.html").read_text()
    assert "To come: finetune, evaluate." in page
    assert "<h3>Ranks of the subnet" in page
    assert "<h2>Accuracy by class" not in page
    assert json.loads((own_run / "stages.json").read_text()) == done


@pytest.mark.slow
def test_a_report_of_another_config_is_refused(finished_run, tmp_path):
    with pytest.raises(RuntimeError, match="holds no run that could be reported on"):
        start.run(tiny_config(), tmp_path / "none", "report")
    with pytest.raises(RuntimeError, match=r"'finetune' of another config.*\n  finetune.epochs"):
        start.run(tiny_config(**{"finetune.epochs": 9.0}), finished_run, "report")


NOTEBOOKS = ROOT / "notebooks"


def read_notebook(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", ["explore", "closed_form"])
def test_a_notebook_is_stored_without_results(name):
    notebook = read_notebook(name)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in cells if cell.outputs or cell.execution_count] == []


def executed(name, tmp_path, monkeypatch):
    """The outputs of each cell, and the cells with pictures."""
    notebook = read_notebook(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, kernel_name="python3", timeout=300, resources=resources).execute()
    found = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    pictures = [
        cell
        for cell, outputs in found.items()
        if any("image/png" in output.get("data", {}) for output in outputs)
    ]
    return found, pictures


@pytest.mark.slow
def test_the_notebook_of_the_closed_form_runs_on_an_encoder(tmp_path, monkeypatch):
    spec = flora.ViTSpec(
        image_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=0
    )
    flora.save(random_model(spec), tmp_path / "encoder")
    save_preprocessing(tmp_path / "encoder", Preprocessing(16))
    rng = np.random.default_rng(0)
    for i in range(60):
        save(tmp_path / f"pictures/{i}.png", rng.integers(0, 256, (20, 24, 3), np.uint8))
    monkeypatch.setenv("FLORA_ENCODER", str(tmp_path / "encoder"))
    monkeypatch.setenv("FLORA_PICTURES", str(tmp_path / "pictures"))
    monkeypatch.setenv("FLORA_IMAGE_SIZE", "16")
    found, pictures = executed("closed_form", tmp_path, monkeypatch)
    assert pictures == ["trade-off", "sizes"]
    printed = "".join(output.get("text", "") for output in found["quality"])
    quality = [float(row.split()[3]) for row in re.findall(r"^(?:dense|0\.\d+) .*", printed, re.M)]
    assert len(quality) == 4
    assert quality == sorted(quality, reverse=True)
    assert "equal: True" in "".join(output.text for output in found["export"])


@pytest.mark.slow
def test_the_notebook_runs_on_a_finished_run(finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_RUN", str(finished_run))
    results, pictures = executed("explore", tmp_path, monkeypatch)
    assert pictures == ["predict", "trade-off", "ranks"]
    assert "equal: True" in "".join(output.text for output in results["save"])
