"""Files and folders of weights: safetensors, our own, Hugging Face's and PyTorch's."""

import dataclasses
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import flora_jax as flora
from flora_jax.weights import layouts
from flora_jax.weights.export import export_timm
from flora_jax.weights.pretrained import from_pretrained
from flora_jax.weights.state_dict import read_state_dict
from tests.helpers.weights import SWIN, VIT, assert_same, written


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
    with pytest.raises(ValueError, match="does not say what model it belongs to: pass a spec"):
        from_pretrained(path)
    whole = path.read_bytes()
    for part in (b"", whole[:5], whole[:100], whole[:-1]):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"vit\.safetensors is not a readable"):
            from_pretrained(path, VIT)
    (tmp_path / "vit.npz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"vit\.npz is no file of weights.* end in \.safetensors,"):
        from_pretrained(tmp_path / "vit.npz", VIT)


def test_own_folder(vit, tmp_path):
    flora.save(vit, tmp_path / "vit")
    assert_same(from_pretrained(tmp_path / "vit"), vit)
    assert_same(from_pretrained(tmp_path / "vit", VIT), vit)
    assert_same(from_pretrained(tmp_path / "vit" / "model.safetensors", VIT), vit)
    other = dataclasses.replace(VIT, num_classes=5, image_size=20)
    with pytest.warns(UserWarning, match="3 classes in the weights and 5 in the spec"):
        model = from_pretrained(tmp_path / "vit", other)
    assert model.spec == other


def test_own_folder_of_a_subnet(subnets, tmp_path):
    flora.save(subnets["swin"], tmp_path / "swin")
    dense = dataclasses.replace(SWIN, num_classes=5)
    with pytest.warns(UserWarning, match="3 classes in the weights and 5 in the spec"):
        model = from_pretrained(tmp_path / "swin", dense)
    assert model.spec == dense.with_ranks(subnets["swin"].spec.ranks)


def test_folders_without_a_model(vit, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for spec\.json, model\.safetensors, pyt"):
        from_pretrained(tmp_path, VIT)
    supernet = flora.factorize(vit, flora.RankSpace.regular(VIT, ratios=(1 / 2, 1)))
    flora.save(supernet, tmp_path)
    with pytest.raises(ValueError, match=r"holds a supernet: flora_jax\.load opens it, extract"):
        from_pretrained(tmp_path)


def test_hugging_face_folder(vit, tmp_path):
    save_file(written(vit, layouts.hugging_face_vit), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert_same(from_pretrained(tmp_path, VIT), vit)


def test_pytorch_files_without_torch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "vit.pth").write_bytes(b"")
    with pytest.raises(ImportError, match=r"vit\.pth needs PyTorch: pip install 'flora_jax\[torch"):
        from_pretrained(tmp_path / "vit.pth", VIT)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="reads PyTorch files, which needs torch")


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pytorch_file(torch, vit, tmp_path, wrapper, dtype):
    dtype = getattr(torch, dtype)
    tensors = {n: torch.tensor(a).to(dtype) for n, a in written(vit, layouts.timm).items()}
    torch.save({wrapper: tensors, "epoch": 3} if wrapper else tensors, tmp_path / "vit.pth")
    arrays = read_state_dict(tmp_path / "vit.pth")
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, tensors[name].float().numpy(), strict=True)
    assert from_pretrained(tmp_path / "vit.pth", VIT).spec == VIT


def test_pytorch_bin_in_a_hugging_face_folder(torch, vit, tmp_path):
    arrays = written(vit, layouts.hugging_face_vit)
    torch.save({n: torch.tensor(a) for n, a in arrays.items()}, tmp_path / "pytorch_model.bin")
    assert_same(from_pretrained(tmp_path, VIT), vit)


class Executed:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pytorch_files_that_are_no_state_dict(torch, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": {"w": torch.zeros(2)}, "args": Executed(tmp_path / "trace")}, path)
    with pytest.raises(ValueError, match=r"x\.pth holds more than tensors.*nothing else is unpick"):
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
        with pytest.raises(ValueError, match=r"x\.pth (is not a readable|holds more than)"):
            read_state_dict(path)
