"""Weights in every layout, fitted to a spec, and out again under timm's names."""

import dataclasses
import logging
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import flora_jax as flora
from flora_jax.io.export import export_timm
from flora_jax.io.pretrained import from_pretrained, from_state_dict
from flora_jax.io.state_dict import read_state_dict
from flora_jax.models import create_abstract, functional, layouts
from flora_jax.models.resample import resample_pos_embed, resample_relative_position_table

VIT = flora.ViTSpec(
    image_size=12, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3, in_channels=2
)
SWIN = flora.SwinSpec(
    image_size=16, patch_size=2, embed_dim=6, depths=(2, 1), num_heads=(2, 3), window_size=4,
    num_classes=3,
)  # fmt: skip
VITS = {
    "vit": VIT,
    "distilled": dataclasses.replace(VIT, distilled=True),
    "no_qkv_bias": dataclasses.replace(VIT, qkv_bias=False),
    "mean": dataclasses.replace(VIT, pool="mean"),
    "mean_no_token": dataclasses.replace(VIT, pool="mean", class_token=False),
}
SWINS = {
    "swin": SWIN,
    "absolute": dataclasses.replace(SWIN, absolute_pos_embed=True),
    "no_patch_norm": dataclasses.replace(SWIN, patch_norm=False, qkv_bias=False),
}
VERSION_5 = ("any.q_proj.weight",)
TABLES = {
    "own": layouts.own,
    "timm": layouts.timm,
    "timm_head": lambda spec: layouts.timm_swin(spec, ["head.weight"]),
    "release": lambda spec: layouts.timm_swin(spec, ["head.weight", "layers.0.downsample."]),
    "release_head_fc": lambda spec: layouts.timm_swin(spec, ["layers.0.downsample."]),
    "hugging_face_vit": layouts.hugging_face_vit,
    "hugging_face_vit_5": lambda spec: layouts.hugging_face_vit(spec, VERSION_5),
    "hugging_face_swin": layouts.hugging_face_swin,
    "hugging_face_swin_5": lambda spec: layouts.hugging_face_swin(spec, VERSION_5),
}
PAIRS = [
    *((spec, table) for spec in VITS for table in ("own", "timm")),
    *(
        (spec, f"hugging_face_vit{version}")
        for spec in ("vit", "distilled", "no_qkv_bias")
        for version in ("", "_5")
    ),
    *((spec, table) for spec in SWINS for table in TABLES if "vit" not in table),
]


def random_model(spec, seed=0):
    """Every parameter random, biases too."""
    model, rng = create_abstract(spec), np.random.default_rng(seed)
    shapes = functional.split(model)[1]
    return functional.with_parameters(
        model, {name: np.float32(rng.normal(size=s.shape)) for name, s in shapes.items()}
    )


def written(model, table) -> dict[str, np.ndarray]:
    parameters = functional.split(model)[1]
    arrays = {}
    for row in table(model.spec):
        arrays |= row.write(np.asarray(parameters[row.target]))
    return arrays


def assert_same(model, other):
    first, second = functional.split(model)[1], functional.split(other)[1]
    assert model.spec == other.spec
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name, strict=True)


@pytest.fixture(scope="module")
def models():
    return {name: random_model(spec) for name, spec in (VITS | SWINS).items()}


@pytest.fixture(scope="module")
def vit(models):
    return models["vit"]


@pytest.fixture(scope="module")
def swin(models):
    return models["swin"]


@pytest.fixture(scope="module")
def subnets(models):
    """Compressed models; each has a layer that stayed dense."""
    found = {}
    for name in ("vit", "distilled", "no_qkv_bias", "swin"):
        space = flora.RankSpace.regular(models[name].spec, ratios=(1 / 4, 1 / 2, 1))
        genes = np.arange(space.num_layers) % 3
        found[name] = flora.extract(flora.factorize(models[name], space), genes)
        assert {None} < set(found[name].spec.ranks)
    return found


@pytest.mark.parametrize(("spec", "table"), PAIRS)
def test_every_layout_reads_the_same_model(models, spec, table):
    arrays = written(models[spec], TABLES[table])
    assert_same(from_state_dict(arrays, models[spec].spec), models[spec])


def test_layouts_are_told_apart():
    titles = {
        "own": ("flora_jax ViT", "flora_jax Swin"),
        "timm": ("timm ViT", "timm Swin"),
        "hugging_face": ("Hugging Face ViT", "Hugging Face Swin"),
    }
    for spec, table in PAIRS:
        keys = [key for row in TABLES[table]((VITS | SWINS)[spec]) for key in row.sources]
        of_library = titles.get(table.partition("_vit")[0].partition("_swin")[0], titles["timm"])
        assert layouts.detect(keys).title == of_library[spec in SWINS]


@pytest.mark.parametrize(
    ("spec", "table", "names"),
    [
        ("distilled", "timm", "dist_token head_dist.bias blocks.1.mlp.fc2.weight norm.weight"),
        ("mean", "timm", "fc_norm.weight cls_token pos_embed blocks.0.attn.qkv.weight"),
        (
            "absolute",
            "timm",
            "absolute_pos_embed head.fc.weight layers.1.downsample.reduction.weight "
            "layers.1.blocks.0.attn.relative_position_bias_table patch_embed.norm.bias",
        ),
        ("swin", "release", "head.bias layers.0.downsample.norm.weight norm.weight"),
        (
            "vit",
            "hugging_face_vit",
            "vit.embeddings.cls_token vit.embeddings.patch_embeddings.projection.weight "
            "vit.encoder.layer.1.attention.attention.key.bias vit.layernorm.weight classifier.bias "
            "vit.encoder.layer.0.attention.output.dense.bias vit.encoder.layer.0.output.dense.bias",
        ),
        (
            "distilled",
            "hugging_face_vit",
            "deit.embeddings.distillation_token cls_classifier.bias distillation_classifier.weight "
            "deit.encoder.layer.0.intermediate.dense.weight deit.embeddings.position_embeddings",
        ),
        ("vit", "hugging_face_vit_5", "vit.layers.1.attention.q_proj.bias vit.layernorm.bias"),
        (
            "absolute",
            "hugging_face_swin",
            "swin.embeddings.position_embeddings swin.embeddings.norm.bias swin.layernorm.weight "
            "swin.encoder.layers.0.downsample.reduction.weight "
            "swin.encoder.layers.1.blocks.0.attention.self.relative_position_bias_table "
            "swin.encoder.layers.0.blocks.1.attention.self.value.weight "
            "swin.encoder.layers.0.blocks.1.layernorm_after.bias",
        ),
    ],
)  # fmt: skip
def test_published_names(models, spec, table, names):
    assert set(names.split()) <= written(models[spec], TABLES[table]).keys()


def test_published_shapes(models):
    parameters = functional.split(models["vit"])[1]
    arrays = written(models["vit"], layouts.hugging_face_vit)
    kernel = parameters["blocks.0.attn.qkv.kernel"]
    for i, part in enumerate(("query", "key", "value")):
        name = f"vit.encoder.layer.0.attention.attention.{part}"
        np.testing.assert_array_equal(arrays[f"{name}.weight"], kernel[:, 8 * i : 8 * i + 8].T)
    assert arrays["vit.embeddings.position_embeddings"].shape == (1, 10, 8)
    patches = arrays["vit.embeddings.patch_embeddings.projection.weight"]
    assert patches.shape == (8, 2, 4, 4)
    ours = np.asarray(parameters["patch_embed.proj.kernel"]).reshape(4, 4, 2, 8)
    assert patches[5, 1, 2, 3] == ours[2, 3, 1, 5]


def test_buffers_and_the_module_prefix_are_left_out(swin):
    arrays = written(swin, layouts.timm)
    arrays |= {
        "layers.0.blocks.0.attn.relative_position_index": np.zeros((16, 16), np.int64),
        "layers.0.blocks.1.attn_mask": np.zeros((4, 16, 16), np.float32),
    }
    prefixed = {f"module.{name}": array for name, array in arrays.items()}
    assert_same(from_state_dict(prefixed, SWIN), swin)


def test_the_model_has_its_own_copy(vit):
    arrays = {name: array.copy() for name, array in written(vit, layouts.timm).items()}
    model = from_state_dict(arrays, VIT)
    for array in arrays.values():
        array[...] = 0
    assert_same(model, vit)


@pytest.mark.parametrize("name", ["vit", "distilled", "mean_no_token"])
@pytest.mark.parametrize("image_size", [8, 20])
def test_another_resolution(models, caplog, name, image_size):
    spec = dataclasses.replace(VITS[name], image_size=image_size)
    with caplog.at_level(logging.INFO, "flora_jax"):
        model = from_state_dict(written(models[name], layouts.timm), spec)
    assert "interpolated to the spec's size: pos_embed" in caplog.text
    before, after = (functional.split(m)[1] for m in (models[name], model))
    expected = resample_pos_embed(
        np.asarray(before["pos_embed"]), spec.num_prefix_tokens, image_size // 4
    )
    np.testing.assert_array_equal(after["pos_embed"], expected)
    np.testing.assert_array_equal(after["head.kernel"], before["head.kernel"])


def test_another_window_and_grid(models, caplog):
    spec = dataclasses.replace(SWINS["absolute"], image_size=32, window_size=8)
    with caplog.at_level(logging.INFO, "flora_jax"):
        model = from_state_dict(written(models["absolute"], layouts.timm), spec)
    assert "absolute_pos_embed, blocks.0.attn.relative_position_bias_table" in caplog.text
    before, after = (functional.split(m)[1] for m in (models["absolute"], model))
    for block in range(3):
        name = f"blocks.{block}.attn.relative_position_bias_table"
        expected = resample_relative_position_table(np.asarray(before[name]), 8)
        np.testing.assert_array_equal(after[name], expected)
    grid = resample_pos_embed(np.asarray(before["absolute_pos_embed"]), 0, 16)
    np.testing.assert_array_equal(after["absolute_pos_embed"], grid)


@pytest.mark.parametrize("name", ["distilled", "swin"])
def test_a_classifier_of_other_classes(models, name):
    spec = dataclasses.replace(models[name].spec, num_classes=5)
    with pytest.warns(UserWarning, match="head.* has 3 classes in the weights and 5 in the spec"):
        model = from_state_dict(written(models[name], layouts.timm), spec)
    before, after = (functional.split(m)[1] for m in (models[name], model))
    heads = [key.partition(".")[0] for key in after if key.startswith("head")]
    for head in heads:
        assert after[f"{head}.kernel"].shape == (before[f"{head}.kernel"].shape[0], 5)
        assert np.std(after[f"{head}.kernel"]) > 0.1
        assert (after[f"{head}.bias"] == 0).all()
    for key in after.keys() - {f"{h}.{part}" for h in heads for part in ("kernel", "bias")}:
        np.testing.assert_array_equal(after[key], before[key])


def test_names_that_do_not_fit(vit):
    arrays = written(vit, layouts.timm)
    arrays["mystery"] = arrays.pop("head.bias")
    with pytest.raises(ValueError, match=r"missing head\.bias; unexpected mystery$"):
        from_state_dict(arrays, VIT)
    deeper = dataclasses.replace(VIT, depth=3, blocks=())
    with pytest.raises(ValueError, match=r"missing blocks\.2\..* and \d+ more; unexpected none"):
        from_state_dict(written(vit, layouts.timm), deeper)


def test_not_strict(vit):
    arrays = written(vit, layouts.hugging_face_vit)
    arrays["mystery"] = arrays.pop("vit.encoder.layer.1.attention.attention.key.weight")
    with pytest.warns(UserWarning, match=r"missing vit.*key\.weight; unexpected mystery\. Missing"):
        model = from_state_dict(arrays, VIT, strict=False)
    before, after = (functional.split(m)[1] for m in (vit, model))
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == ["blocks.1.attn.qkv.kernel"]
    assert np.std(after[changed[0]]) > 0.1


@pytest.mark.parametrize(
    ("file", "spec", "hint"),
    [
        ("distilled", VIT, "set distilled=True in the spec"),
        ("vit", VITS["distilled"], "set distilled=False in the spec"),
        ("no_qkv_bias", VIT, "set qkv_bias=False in the spec"),
        ("mean", VIT, "set pool='mean' in the spec"),
        ("vit", VITS["mean"], "set pool='token' in the spec"),
        ("mean_no_token", VIT, "set class_token=False, pool='mean' in the spec"),
        ("absolute", SWIN, "set absolute_pos_embed=True in the spec"),
        ("no_patch_norm", SWIN, "set qkv_bias=False, patch_norm=False in the spec"),
    ],
)
def test_the_error_names_the_field_to_change(models, file, spec, hint):
    with pytest.raises(ValueError, match=f"{hint}$"):
        from_state_dict(written(models[file], layouts.timm), spec)


def test_hugging_face_deit_needs_distilled(models):
    arrays = written(models["distilled"], layouts.hugging_face_vit)
    with pytest.raises(ValueError, match=r"set distilled=True in the spec$"):
        from_state_dict(arrays, VIT)
    with pytest.raises(ValueError, match="classify the class token: set pool='token'"):
        from_state_dict(arrays, VITS["mean"])


def test_another_family_or_none(vit, swin):
    with pytest.raises(ValueError, match="weights of a timm Swin, but the spec is a ViTSpec"):
        from_state_dict(written(swin, layouts.timm), VIT)
    with pytest.raises(ValueError, match="of a Hugging Face ViT, but the spec is a SwinSpec"):
        from_state_dict(written(vit, layouts.hugging_face_vit), SWIN)
    with pytest.raises(
        ValueError, match=r"unknown weight names \(conv1, fc, \.\.\.\); known.*timm"
    ):
        from_state_dict({"conv1": np.zeros(3), "fc": np.zeros(3)}, VIT)
    with pytest.raises(ValueError, match=r"unknown weight names \(nothing"):
        from_state_dict({}, VIT)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("pos_embed", (2, 10, 8), r"pos_embed cannot be read from .* shape \(2, 10, 8\)"),
        ("pos_embed", (1, 12, 8), "no square grid: 11 patches"),
        ("pos_embed", (1, 10, 9), r"pos_embed has shape \(10, 9\), expected \(10, 8\)"),
        ("cls_token", (), r"cls_token cannot be read from an array of shape \(\)"),
        ("patch_embed.proj.weight", (8, 32), r"patch_embed.proj.weight cannot be read"),
        ("blocks.0.mlp.fc1.weight", (32, 9), r"fc1.kernel has shape \(9, 32\), expected \(8, 32\)"),
        ("head.weight", (3, 9), r"head.kernel has shape \(9, 3\), expected \(8, 3\)"),
    ],
)
def test_an_array_of_another_shape(vit, name, shape, message):
    arrays = written(vit, layouts.timm) | {name: np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=message):
        from_state_dict(arrays, VIT)


def test_a_table_of_another_number_of_heads(swin):
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    arrays = written(swin, layouts.timm) | {name: np.zeros((49, 5), np.float32)}
    with pytest.raises(ValueError, match=r"table has shape \(49, 5\), expected \(49, 2\)"):
        from_state_dict(arrays, SWIN)


@pytest.mark.parametrize("name", ["vit", "distilled", "no_qkv_bias", "swin"])
def test_export_and_back_is_exact(models, subnets, tmp_path, name):
    path = tmp_path / "exported.safetensors"
    for model in (models[name], subnets[name]):
        export_timm(model, path)
        assert_same(from_pretrained(path, model.spec), model)
        assert_same(from_pretrained(path, models[name].spec), model)  # takes the file's ranks
        with safe_open(path, "np") as file:
            assert file.metadata() == {"format": "pt"}
        assert {array.dtype for array in load_file(path).values()} == {np.dtype(np.float32)}


def test_names_of_an_exported_subnet(subnets, tmp_path):
    export_timm(subnets["swin"], tmp_path / "swin.safetensors")
    arrays = load_file(tmp_path / "swin.safetensors")
    blocks = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]
    layers = [f"{b}.{layer}" for b in blocks for layer in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    shapes = zip(layers, subnets["swin"].spec.layers, subnets["swin"].spec.ranks, strict=True)
    for name, layer, rank in shapes:
        if rank is None:
            assert arrays[f"{name}.fc.weight"].shape == (layer.out_features, layer.in_features)
            assert f"{name}.fc.bias" in arrays
        else:
            assert arrays[f"{name}.VT.weight"].shape == (rank, layer.in_features)
            assert arrays[f"{name}.U.weight"].shape == (layer.out_features, rank)
            assert f"{name}.U.bias" in arrays
        assert f"{name}.weight" not in arrays
    assert "head.fc.weight" in arrays


def test_a_subnet_of_which_every_layer_stayed_dense(vit):
    arrays = written(vit, layouts.timm)
    for layer in VIT.layers:
        for part in ("weight", "bias"):
            arrays[f"{layer.name}.fc.{part}"] = arrays.pop(f"{layer.name}.{part}")
    assert_same(from_state_dict(arrays, VIT), vit)


def test_other_ranks_than_the_specs(vit, subnets):
    arrays, spec = written(subnets["vit"], layouts.timm), subnets["vit"].spec
    wrong = spec.with_ranks((1, *spec.ranks[1:]))
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn\.qkv is .* rank 2 .* rank 1 in the spec"
    ):
        from_state_dict(arrays, wrong)
    with pytest.raises(ValueError, match=r"qkv is one dense matrix in the file .* rank 2 in the"):
        from_state_dict(written(vit, layouts.timm), spec)


def test_export_of_what_cannot_be(vit, tmp_path):
    supernet = flora.factorize(vit, flora.RankSpace.regular(VIT, ratios=(1 / 2, 1)))
    with pytest.raises(ValueError, match="a supernet holds many networks: extract one first"):
        export_timm(supernet, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.pth must end in \.safetensors"):
        export_timm(vit, tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []


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
