"""Files and folders of weights: safetensors, our own, Hugging Face's and PyTorch's."""

import argparse
import dataclasses
import fractions
import json
import logging
import pathlib
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

import flora_jax as flora
from flora_jax.commands.classifier import check_is_model
from flora_jax.models import functional
from flora_jax.weights import layouts
from flora_jax.weights.export.timm import export_timm
from flora_jax.weights.pretrained import from_pretrained
from flora_jax.weights.state_dict import read_state_dict
from tests.helpers.weights import SWIN, VIT, assert_same, random_model, written

SECOND = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(vit, tmp_path, dtype):
    halves = {name: array.astype(dtype) for name, array in written(vit, layouts.timm).items()}
    halves["an_index"] = np.arange(3)
    save_file(halves, tmp_path / "vit.safetensors")
    arrays = read_state_dict(tmp_path / "vit.safetensors")
    assert arrays.pop("an_index").dtype == np.int64
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, halves[name].astype(np.float32), strict=True)


def test_files_that_are_not_weights(vit, tmp_path):
    path = tmp_path / "vit.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no file .*vit\.safetensors"):
        from_pretrained(path, VIT)
    export_timm(vit, path)
    with pytest.raises(ValueError, match="does not say what model it is of: pass a spec"):
        from_pretrained(path)
    whole = path.read_bytes()
    for part in (b"", whole[:5], whole[:100], whole[:-1]):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"vit\.safetensors: not a readable"):
            from_pretrained(path, VIT)


def test_own_folder(vit, subnets, tmp_path):
    flora.save(vit, tmp_path / "vit")
    assert_same(from_pretrained(tmp_path / "vit"), vit)
    assert_same(from_pretrained(tmp_path / "vit" / "model.safetensors", VIT), vit)
    flora.save(subnets["swin"], tmp_path / "swin")
    other = dataclasses.replace(VIT, num_classes=5, image_size=20)
    dense = dataclasses.replace(SWIN, num_classes=5)
    ranks = subnets["swin"].spec.ranks
    for name, asked, made in (("vit", other, other), ("swin", dense, dense.with_ranks(ranks))):
        with pytest.warns(UserWarning, match="3 classes in the weights and 5 in the spec"):
            assert from_pretrained(tmp_path / name, asked).spec == made


def test_a_folder_of_a_supernet(vit, tmp_path):
    supernet = flora.factorize(vit, flora.RankSpace.regular(VIT, ratios=(1 / 2, 1)))
    flora.save(supernet, tmp_path)
    with pytest.raises(ValueError, match=r"holds a supernet: flora_jax\.load opens it, extract"):
        from_pretrained(tmp_path)


def shard(arrays, folder, suffix, save):
    """Writes three files and their index, as transformers does."""
    names = sorted(arrays)
    places = {name: f"model-0000{i % 3 + 1}-of-00003.{suffix}" for i, name in enumerate(names)}
    for file in set(places.values()):
        save({name: arrays[name] for name in names if places[name] == file}, folder / file)
    stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": places}))


def test_a_folder_in_several_files(swin, tmp_path):
    shard(written(swin, layouts.hugging_face_swin), tmp_path, "safetensors", save_file)
    assert_same(from_pretrained(tmp_path, SWIN), swin)
    index, second = (tmp_path / n for n in ("model.safetensors.index.json", SECOND))
    assert_same(from_pretrained(index, SWIN), swin)
    with pytest.raises(ValueError, match=r"00002-of-00003\.safetensors is one part of several"):
        from_pretrained(second, SWIN)
    whole = second.read_bytes()
    second.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=r"00002-of-00003\.safetensors: not a readable"):
        from_pretrained(tmp_path, SWIN)
    save_file({"other": np.zeros(1)}, second)
    with pytest.raises(ValueError, match=r"not in model-00002-of-00003\.safetensors: .*swin\."):
        from_pretrained(tmp_path, SWIN)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"not there: model-00002-of-00003\.safetensors"):
        from_pretrained(tmp_path, SWIN)
    index.write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        from_pretrained(tmp_path, SWIN)


def test_every_path_may_begin_at_home(vit, tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    flora.save(vit, "~/own")
    export_timm(vit, "~/timm/x.safetensors")
    assert_same(flora.load("~/own"), vit)
    assert_same(from_pretrained("~/own"), vit)
    assert_same(from_pretrained("~/timm/x.safetensors", VIT), vit)
    assert list(here.iterdir()) == []


def test_parameters_of_our_own_that_are_not_finite(vit, tmp_path):
    structure, parameters = functional.split(vit)
    parameters["norm.bias"] = parameters["norm.bias"].at[1].set(np.inf)
    flora.save(functional.merge(structure, parameters), tmp_path / "own")
    with pytest.raises(ValueError, match=r"own holds parameters that are NaN.*: norm\.bias$"):
        flora.load(tmp_path / "own")


def test_kinds_of_numbers_that_numpy_lacks(vit, tmp_path):
    """A header that says float8, over the bytes of a quantised file."""
    path = tmp_path / "quantised.safetensors"
    arrays = written(vit, layouts.timm)
    arrays["head.weight"] = np.zeros(arrays["head.weight"].shape, np.uint8)
    save_file(arrays, path)
    with pytest.raises(ValueError, match=r"quantised\.safetensors: head\.weight is uint8; weights"):
        from_pretrained(path, VIT)
    content = path.read_bytes().replace(b'{"dtype":"U8",', b'{"dtype":"F8_E4M3",')
    length = int.from_bytes(content[:8], "little") + len("F8_E4M3") - len("U8")
    path.write_bytes(length.to_bytes(8, "little") + content[8:])
    with pytest.raises(ValueError, match=r"quantised\.safetensors: not a readable .*float8"):
        from_pretrained(path, VIT)


def test_pytorch_files_without_torch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "vit.pth").write_bytes(b"")
    with pytest.raises(ImportError, match=r"vit\.pth needs PyTorch: pip install 'flora_jax\[torch"):
        from_pretrained(tmp_path / "vit.pth", VIT)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="reads PyTorch files, which needs torch")


@pytest.mark.parametrize(
    ("wrapper", "dtype"), [(None, "float32"), ("model", "float16"), ("state_dict", "bfloat16")]
)
def test_pytorch_file(torch, vit, tmp_path, wrapper, dtype):
    dtype = getattr(torch, dtype)
    tensors = {n: torch.tensor(a).to(dtype) for n, a in written(vit, layouts.timm).items()}
    torch.save({wrapper: tensors, "epoch": 3} if wrapper else tensors, tmp_path / "vit.pth")
    arrays = read_state_dict(tmp_path / "vit.pth")
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, tensors[name].float().numpy(), strict=True)
    assert from_pretrained(tmp_path / "vit.pth", VIT).spec == VIT


def test_pytorch_folder_in_several_files(torch, swin, tmp_path):
    arrays = written(swin, layouts.hugging_face_swin)
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    shard(tensors, tmp_path, "bin", torch.save)
    assert_same(from_pretrained(tmp_path, SWIN), swin)


@pytest.mark.parametrize(
    ("raw", "average"),
    [
        ("model", "ema"),
        ("net", "module_ema"),
        ("state_dict", "swa_state"),
        (None, "averaged_model"),
    ],
)
def test_a_checkpoint_with_a_moving_average(torch, vit, tmp_path, caplog, raw, average):
    def tensors(model):
        return {n: torch.tensor(a) for n, a in written(model, layouts.timm).items()}

    content = {"epoch": 3, "args": argparse.Namespace(lr=1e-3), average: tensors(vit)}
    content |= {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}}
    if raw:
        content = {raw: tensors(random_model(VIT, seed=1))} | content
    torch.save(content, tmp_path / "training.pth")
    with caplog.at_level(logging.INFO, "flora_jax"):
        assert_same(from_pretrained(tmp_path / "training.pth", VIT), vit)
    assert (f"the average, {average!r}, is read" in caplog.text) == bool(raw)


def test_a_checkpoint_of_two_networks(torch, tmp_path):
    path, of_each = tmp_path / "x.pth", {"w": torch.zeros(2)}
    torch.save({"student": of_each, "teacher": of_each}, path)
    with pytest.raises(ValueError, match=r"x\.pth: .* each of 'student', 'teacher': leave one"):
        read_state_dict(path)
    torch.save({"wrapped": {"state_dict": of_each}}, path)
    assert list(read_state_dict(path)) == ["w"]


@pytest.mark.parametrize("kind", ["sparse", "meta", "quint8", "float8"])
def test_pytorch_tensors_that_numpy_cannot_take(torch, tmp_path, kind):
    tensor = torch.eye(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch gives quantised tensors up
        odd = {
            "sparse": tensor.to_sparse,
            "meta": lambda: tensor.to("meta"),
            "quint8": lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8),
            "float8": lambda: tensor.to(torch.float8_e5m2),
        }[kind]()
        torch.save({"fine": tensor, "odd.weight": odd}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=rf"x\.pth: odd\.weight is .*{kind}"):
            read_state_dict(tmp_path / "x.pth")


class Executed:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pytorch_files_that_are_no_state_dict(torch, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": {"w": torch.zeros(2)}, "args": Executed(tmp_path / "trace")}, path)
    with pytest.raises(
        ValueError, match=r"x\.pth: holds more than tensors.*nothing else is unpick"
    ):
        read_state_dict(path)
    assert not (tmp_path / "trace").exists()
    torch.save({"epoch": 3, "weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"no state dict.* found the keys epoch, weight"):
        read_state_dict(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"no state dict.* found \[1, 2\]"):
        read_state_dict(path)
    torch.save({"weight": torch.zeros(200)}, path)
    whole = path.read_bytes()
    for part in (b"", b"nonsense", whole[:100], whole[:-50]):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"x\.pth: (not a readable|holds more than)"):
            read_state_dict(path)


def test_what_trainings_leave_beside_the_weights(torch, vit, tmp_path):
    arrays = {name: torch.tensor(array) for name, array in written(vit, layouts.timm).items()}
    others = {
        "metric": np.float64(81.2),
        "counts": np.arange(3),
        "is_best": np.bool_(True),
        "epochs": {np.int64(3), np.uint8(2)},
        "args": argparse.Namespace(output=pathlib.PurePosixPath("out"), seen=pathlib.Path("x")),
    }
    path = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": arrays, **others}, path)
    assert_same(from_pretrained(path, VIT), vit)
    torch.save({"state_dict": arrays, "lr": fractions.Fraction(1, 2)}, path)
    with pytest.raises(
        ValueError, match=r"nothing else .*torch\.save.*Found was fractions\.Fracti"
    ) as e:
        from_pretrained(path, VIT)
    assert "safe_globals" not in str(e.value)


def test_a_folder_of_checkpoints_names_them(vit, tmp_path):
    for step in (500, 1000):
        save_file(
            written(vit, layouts.hugging_face_vit), _made(tmp_path, step) / "model.safetensors"
        )
        (tmp_path / f"checkpoint-{step}/config.json").write_text("{}")
        (tmp_path / f"checkpoint-{step}/optimizer.pt").write_bytes(b"of the training")
    (tmp_path / "runs").mkdir()
    assert_same(from_pretrained(tmp_path / "checkpoint-500", VIT), vit)
    for read in (from_pretrained, flora.read_spec, check_is_model):
        with pytest.raises(
            FileNotFoundError, match=r"inside it are checkpoint-1000, checkpoint-500$"
        ):
            read(epath.Path(tmp_path))
    flora.save(vit, tmp_path / "own")
    with pytest.raises(FileNotFoundError, match=r"; inside it are own$"):
        flora.load(tmp_path)


def _made(folder, step):
    (folder / f"checkpoint-{step}").mkdir()
    return folder / f"checkpoint-{step}"
