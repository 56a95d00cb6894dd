"""Exported programs and folders: what they compute, how large they are, what is refused."""

import collections
import dataclasses
import json
import logging
import os
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flora_jax as flora
from flora_jax import slim
from flora_jax.errors import InputError, MissingPackageError, StorageError
from flora_jax.io import files
from flora_jax.models import functional
from flora_jax.models.spec_json import spec_to_json
from flora_jax.weights.export import checks, pytorch
from flora_jax.weights.export import onnx as onnx_export
from tests.helpers import modern
from tests.helpers.compressed import NETWORKS, low_rank, network
from tests.helpers.slimming import images_of, logits, random_model

FUNCTIONS = {".bin": flora.export_stablehlo, ".onnx": flora.export_onnx}
# One of each kind that differs in what is computed.
KINDS = (
    *("timm_deit3", "timm_dinov2_registers", "timm_dinov3", "timm_dinov3_swiglu", "timm_clip"),
    *("timm_eva02", "timm_beitv2", "timm_pe"),
    *("timm_siglip", "timm_siglip_gap", "hf_dinov2_classifier", "hf_dinov3", "hf_siglip"),
)


def compiled(model):
    """With its weights as constants, as in the file: XLA computes ahead what depends on them alone,
    and rounds otherwise then."""
    structure, parameters = functional.split(model)
    constants = jax.tree.map(np.asarray, parameters)
    compute = jax.jit(lambda parameters, images: functional.merge(structure, parameters)(images))
    return jax.jit(lambda images: compute(constants, images))


def test_stablehlo_is_the_compiled_model(tmp_path):
    model, path = network("low rank on slim")[0], tmp_path / "m.bin"
    flora.export_stablehlo(model, path)
    exported = jax.export.deserialize(path.read_bytes())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    forward = compiled(model)
    for batch in (1, 5):
        images = images_of(model.spec, batch)
        np.testing.assert_array_equal(exported.call(images), forward(images))


def test_stablehlo_needs_jax_alone(tiny_model, tiny_images, tmp_path):
    flora.export_stablehlo(tiny_model, tmp_path / "m.bin")
    np.save(tmp_path / "images.npy", tiny_images)
    program = (
        "import pathlib, sys, numpy as np, jax.export\n"
        "call = jax.export.deserialize(pathlib.Path('m.bin').read_bytes()).call\n"
        "np.save('logits.npy', call(np.load('images.npy')))\n"
        "assert not {'flora_jax', 'flax'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    expected = compiled(tiny_model)(tiny_images)
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected)


@pytest.fixture(scope="module")
def runtime():
    pytest.importorskip("onnx", reason="writes ONNX files")
    return pytest.importorskip("onnxruntime", reason="runs ONNX files")


def run(runtime, path, images):
    session = runtime.InferenceSession(path)
    return session.run(None, {"images": images.transpose(0, 3, 1, 2)})[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS, *KINDS])
def test_onnx_computes_the_same(runtime, name, tmp_path):
    path = tmp_path / "m.onnx"
    if name in NETWORKS:
        model, images, expected, _ = network(name)
    else:
        model = random_model(modern.shallow(name, depth=1))
        expected = logits(model, images := images_of(model.spec, 5))
    flora.export_onnx(model, path)
    tolerance = {"rtol": 0, "atol": 1e-4 * max(1, abs(expected).max())}
    np.testing.assert_allclose(run(runtime, path, images), expected, **tolerance)
    np.testing.assert_allclose(run(runtime, path, images[3:4]), expected[3:4], **tolerance)


@pytest.mark.parametrize("name", ["low rank on slim", "tiny_vit, low rank on slim"])
def test_onnx_in_16_and_in_8_bits(runtime, name, tmp_path, caplog):
    """In 8, only convolutions and what multiplies two activations stay in float32."""
    onnx = pytest.importorskip("onnx")
    model, images, expected, _ = network(name)
    graphs = {}
    for dtype, tolerance in (("float16", 2e-2), ("int8", 5e-2)):
        flora.export_onnx(model, path := tmp_path / f"{dtype}.onnx", dtype=dtype)
        given = run(runtime, path, images)
        assert given.dtype == np.float32
        assert 0 < abs(given - expected).max() <= tolerance * max(1, abs(expected).max())
        graphs[dtype] = onnx.load(path).graph
    assert not caplog.records
    assert {t.data_type for t in graphs["float16"].initializer} - {7} == {10}  # but for int64
    bits = {t.name: onnx.numpy_helper.to_array(t) for t in graphs["int8"].initializer}
    weights = [w for w in bits.values() if w.dtype == np.int8 and w.ndim == 2]
    of_products = [
        name
        for name, parameter in functional.split(model)[1].items()
        if name.endswith(("kernel", "down", "up")) and parameter.ndim == 2 and ".conv" not in name
    ]
    assert len(weights) == len(of_products)
    assert max(abs(np.int32(w)).max() for w in weights) <= 64  # what CPUs without VNNI add up
    products = [node for node in graphs["int8"].node if node.op_type == "MatMul"]
    assert products
    assert not any(name in bits for node in products for name in node.input)


def test_a_pair_of_factors_stays_two_products(runtime, micro_model, tmp_path):
    onnx = pytest.importorskip("onnx")
    model, path = low_rank(micro_model), tmp_path / "m.onnx"
    flora.export_onnx(model, path)
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert [(o.domain, o.version) for o in written.opset_import] == [("", 20)]
    shapes = {t.name: tuple(t.dims) for t in written.graph.initializer}
    for layer, rank in zip(model.spec.layers, model.spec.ranks, strict=True):
        sizes = (layer.in_features, layer.out_features)
        if rank is None:
            assert shapes[f"{layer.name}.kernel"] == sizes
        else:
            factors = shapes[f"{layer.name}.down"], shapes[f"{layer.name}.up"]
            assert factors == ((sizes[0], rank), (rank, sizes[1]))
    operations = collections.Counter(node.op_type for node in written.graph.node)
    depth, pairs = model.spec.depth, sum(rank is not None for rank in model.spec.ranks)
    assert pairs
    assert operations["MatMul"] == 1 + 6 * depth + pairs + 1
    assert operations["LayerNormalization"] == 2 * depth + 1
    assert operations["Softmax"] == operations["Gelu"] == depth
    assert operations["Transpose"] == 1 + 5 * depth  # none of weights
    (images,), (output,) = written.graph.input, written.graph.output
    sizes = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert sizes == ["B", 3, 32, 32]
    assert output.name == "logits"


@pytest.mark.parametrize("ending", FUNCTIONS)
def test_sizes(ending, tmp_path):
    """Weights are stored once, and little else."""
    if ending == ".onnx":
        pytest.importorskip("onnx", reason="writes ONNX files")
    model, path = random_model(flora.deit("tiny", depth=1, image_size=32)), tmp_path / f"m{ending}"
    FUNCTIONS[ending](model, path)
    assert 1 < path.stat().st_size / (4 * flora.num_params(model.spec)) < 1.02


def test_what_computes_something_else_leaves_no_file(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(jax.export.Exported, "call", lambda self, images: np.ones((2, 3)))
    with pytest.raises(InputError, match=r"something else.* by [\d.]+e[+-]\d\d of the largest"):
        flora.export_stablehlo(tiny_model, tmp_path / "m.bin")
    assert not list(tmp_path.iterdir())


def test_onnx_is_run_in_every_runtime(runtime, tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="runs ONNX files, too")
    flora.export_onnx(tiny_model, tmp_path / "m.onnx")
    zeros = np.zeros((2, tiny_model.spec.num_classes), np.float32)
    monkeypatch.setattr(onnx_export, "in_openvino", lambda content: lambda images: zeros)
    with pytest.raises(InputError, match=r"computes something else in OpenVINO, so nothing is ex"):
        flora.export_onnx(tiny_model, tmp_path / "other.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_what_overflows_in_half_leaves_no_file(runtime, tiny_model, tmp_path):
    structure, parameters = functional.split(tiny_model)
    parameters["blocks.1.mlp.fc1.kernel"] *= 1e6
    model, path = functional.merge(structure, parameters), tmp_path / "m.onnx"
    with pytest.raises(InputError, match=r"something else.* by (nan|inf) of the largest, .* 0.02"):
        flora.export_onnx(model, path, dtype="float16")
    assert not list(tmp_path.iterdir())
    flora.export_onnx(model, path)
    parameters["head.bias"] *= np.float32(np.nan)
    before = path.read_bytes()
    with pytest.raises(InputError, match="outputs are NaN or infinite"):
        flora.export_onnx(functional.merge(structure, parameters), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", FUNCTIONS)
def test_refusals(ending, tiny_model, tiny_space, tmp_path, monkeypatch):
    """All of them before the program is made, and without the packages that make it."""
    export, path = FUNCTIONS[ending], tmp_path / f"m{ending}"
    (folder := tmp_path / f"folder{ending}").mkdir()
    for model, place, message in (
        (flora.factorize(tiny_model, tiny_space), path, "a supernet holds many networks"),
        (slim.add_gates(tiny_model), path, r"a Gated cannot be exported.* flora.slim.extract"),
        (tiny_model, tmp_path / "model.pt", f"model.pt must end in {ending}"),
        (tiny_model, folder, f"is a folder: name a file, such as .*/model{ending}"),
    ):
        with pytest.raises(InputError, match=message):
            export(model, place)
    with monkeypatch.context() as patch:
        patch.setattr(checks, "LARGEST_FILE", 1000)
        with pytest.raises(InputError, match=r"0\.00 GiB of weights are too many for m\..* 2 GiB"):
            export(tiny_model, path)
    assert list(tmp_path.iterdir()) == [folder]
    if ending == ".onnx":
        pytest.importorskip("onnx", reason="writes ONNX files")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(functional, "merge", None)  # nothing is made before it is known
    with pytest.raises(StorageError, match=f"writing .*m{ending} failed: .*File exists"):
        export(tiny_model, tmp_path / f"file/m{ending}")


def test_missing_packages(tiny_model, tmp_path, monkeypatch, caplog):
    pytest.importorskip("onnx", reason="writes ONNX files")
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    flora.export_onnx(tiny_model, tmp_path / "m.onnx")
    assert "m.onnx was not run to check it: pip install 'flora_jax[onnx]'" in caplog.text
    with pytest.raises(MissingPackageError, match=r"needs onnxruntime: pip install"):
        flora.export_onnx(tiny_model, tmp_path / "other.onnx", dtype="int8")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'flora_jax\[onnx\]'"):
        flora.export_onnx(tiny_model, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


FILES = ["model.py", "model.safetensors", "preprocess.py", "spec.json"]


def test_what_is_written_without_torch(tmp_path, without_torch, caplog):
    caplog.set_level(logging.INFO, "flora_jax")
    spec = (subnet := low_rank(random_model(flora.deit("tiny", image_size=64, depth=2)))).spec
    flora.export_torch(subnet, folder := tmp_path / "new" / "folder")
    assert "was not run to check it: pip install 'flora_jax[torch]'" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == FILES
    written = json.loads((folder / "spec.json").read_text())
    assert written == json.loads(json.dumps(spec_to_json(spec)))
    arrays = load_file(folder / "model.safetensors")
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    size = (folder / "model.safetensors").stat().st_size
    assert 1 < size / (4 * flora.num_params(spec)) < 1.02
    assert arrays["patch_embed.weight"].shape == (192, 3, 16, 16)
    for layer, rank in zip(spec.layers, spec.ranks, strict=True):
        if rank is None:
            found, inner = arrays[f"{layer.name}.weight"], None
        else:
            up, down = arrays[f"{layer.name}.up.weight"], arrays[f"{layer.name}.down.weight"]
            found, inner = up @ down, up.shape[1]
        assert (found.shape, inner) == ((layer.out_features, layer.in_features), rank)


def test_the_code_knows_what_a_spec_leaves_unsaid():
    torch = pytest.importorskip("torch", reason="imports the exported model")
    from flora_jax.weights.export import torch_networks

    assert issubclass(torch_networks.ViT, torch.nn.Module)
    specs = (flora.ViTSpec, flora.SwinSpec, flora.BlockSpec)
    unsaid = [field for spec in specs for field in dataclasses.fields(spec)]
    unsaid = {field.name: field.default for field in unsaid if "later" in field.metadata}
    known = {name: value for name, value in vars(torch_networks.Spec).items() if name[0] != "_"}
    del unsaid["layer_scale"]  # the weights have it
    assert known == unsaid


# --- what it computes -----------------------------------------------------------------------------


@pytest.fixture
def in_pytorch(tmp_path, monkeypatch):
    """A function: (model, images [B, H, W, C]) -> output and tokens of what is exported."""
    torch = pytest.importorskip("torch", reason="runs the exported model")
    monkeypatch.setattr(pytorch, "_check_computes_the_same", lambda *_: None)  # it is done here

    def run(model, images):
        flora.export_torch(model, tmp_path)
        network = pytorch.load_export(tmp_path)
        images = torch.tensor(images.transpose(0, 3, 1, 2))
        with torch.inference_mode():
            output, tokens = network(images).numpy(), network.features(images).numpy()
            assert_close(network(images[:1]).numpy(), output[:1])
            with pytest.raises(ValueError, match=r"images have shape \(.*\), not \(B, "):
                network(images[..., 1:])
        return output, tokens

    return run


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize("name", modern.SPECS)
def test_the_kinds_of_today(name, in_pytorch):
    output, tokens = in_pytorch(modern.model(name), modern.images(name))
    golden = modern.golden(name)
    if "output" not in golden and "pooled" not in golden:
        assert_close(output, golden["tokens"][:, 0])
    else:
        assert_close(output, golden["output" if "output" in golden else "pooled"])
    if "tokens" in golden and name != "hf_clip":  # there they are not normalised yet
        assert_close(tokens, golden["tokens"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_pytorch_computes_what_jax_does(name, in_pytorch):
    model, images, *expected = network(name)
    for actual, wanted in zip(in_pytorch(model, images), expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("hf_dinov3", "hf_siglip", "timm_dinov2_registers", "distilled"),
        *("slim, rotary", "swin", "tiny_vit, low rank on slim"),
    ],
)
def test_what_is_made_of_a_folder_takes_any_batch(name, tmp_path, monkeypatch):
    """A trace, an exported program, and what a compiler gets."""
    torch = pytest.importorskip("torch", reason="makes other programs of the exported folder")
    monkeypatch.setattr(pytorch, "_check_computes_the_same", lambda *_: None)
    model = network(name)[0] if name in NETWORKS else modern.model(name)
    flora.export_torch(model, tmp_path)
    module = pytorch.load_export(tmp_path)
    images = torch.tensor(images_of(model.spec, 5).transpose(0, 3, 1, 2))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        expected = module(images).numpy()
        others = (
            torch.jit.trace(module, images[:2]),
            torch.export.export(module, (images[:2],), dynamic_shapes=(batch,)).module(),
            torch.compile(module, backend="eager", dynamic=True, fullgraph=True),
        )
        for other in others:
            for number in (5, 1, 2):
                assert_close(other(images[:number]).numpy(), expected[:number])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf_dinov3", "hf_siglip", "swin"])
def test_torchs_own_onnx_file_of_a_folder(runtime, name, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="writes an ONNX file of the exported folder")
    monkeypatch.setattr(pytorch, "_check_computes_the_same", lambda *_: None)
    model = network(name)[0] if name in NETWORKS else modern.model(name)
    flora.export_torch(model, tmp_path / "torch")
    module = pytorch.load_export(tmp_path / "torch")
    images = images_of(model.spec, 5)
    path, given = tmp_path / "m.onnx", torch.tensor(images.transpose(0, 3, 1, 2))
    axes = {"input_names": ["images"], "dynamic_axes": {"images": {0: "batch"}}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this way of writing is deprecated, and needs no package
        torch.onnx.export(module, (given[:2],), path, dynamo=False, opset_version=17, **axes)
        expected = module(given).numpy()
    assert_close(run(runtime, path, images), expected)
    assert_close(run(runtime, path, images[:1]), expected[:1])


def test_features_are_compared_by_their_direction():
    features = np.random.default_rng(0).normal(size=(4, 384)).astype(np.float32)
    features[:, 0] = 50  # one dimension that all are largest in
    images = np.zeros((4, 1), np.float32)
    for scale, by_direction in ((0.97, False), (2.0, True)):
        other = scale * features
        checks.check_computes(lambda _, o=other: o, lambda _: features, images, 5e-2, by_direction)
    noisy = features + np.float32(0.2) * np.linalg.norm(features) / 40
    for wrong, is_seen, message in (
        (2 * features, False, "of the largest"),
        (noisy, True, "of their length"),
    ):
        compared = (lambda _, o=wrong: o), (lambda _: features), images, 5e-2, is_seen
        with pytest.raises(ValueError, match=rf"differ from the model's by .* {message}, accepted"):
            checks.check_computes(*compared)
    np.testing.assert_allclose(checks.cosines(features, -2 * features), -1)


ELSEWHERE = """
import json, sys
for name in ("jax", "jaxlib", "flax", "flora_jax", "numpy", "etils"):
    sys.modules[name] = None
from safetensors.torch import load_file
from model import load
print(json.dumps(load(".")(load_file("images")["images"]).tolist()))
"""


@pytest.mark.slow
def test_a_folder_runs_where_there_is_neither_jax_nor_numpy(tmp_path):
    pytest.importorskip("torch", reason="runs the exported model")
    model, images, expected, _ = network("slim, rotary")
    flora.export_torch(model, tmp_path)
    save_file({"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}, tmp_path / "images")
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-B", "-c", ELSEWHERE]
    options = {"check": True, "capture_output": True, "timeout": 120}
    done = subprocess.run(command, cwd=tmp_path, env=environment, **options)
    assert_close(np.array(json.loads(done.stdout)), expected)


# --- where it is written --------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(3))
def test_an_export_that_stops_is_none_and_can_be_made_again(
    number, tiny_model, tmp_path, without_torch, monkeypatch
):
    flora.export_torch(tiny_model, tmp_path)
    written = []

    def stops(path):
        if len(written) == number:
            raise StorageError("the disk is full")
        written.append(path)
        return files.replacing(path)

    with monkeypatch.context() as patch:
        patch.setattr(pytorch, "replacing", stops)
        with pytest.raises(StorageError, match="disk is full"):
            flora.export_torch(tiny_model, tmp_path)
    assert not (tmp_path / "model.py").exists()
    flora.export_torch(tiny_model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_folders_that_hold_something_else(tiny_model, tmp_path, without_torch):
    (tmp_path / "mine.py").touch()
    flora.save(tiny_model, tmp_path / "saved")
    for place, error, message in (
        (tmp_path, InputError, r"holds mine\.py, saved, and no earlier export: give an empty"),
        (tmp_path / "mine.py/folder", StorageError, r"writing .*mine\.py/folder.* failed"),
        (tmp_path / "saved", InputError, r"holds model\.safetensors, spec\.json, and no earlier"),
    ):
        with pytest.raises(error, match=message):
            flora.export_torch(tiny_model, place)
    assert flora.load(tmp_path / "saved").spec == tiny_model.spec
    (tmp_path / "cloned" / ".git").mkdir(parents=True)
    flora.export_torch(tiny_model, tmp_path / "cloned")


# --- models that cannot be exported ---------------------------------------------------------------


def test_models_that_cannot_be_exported(tiny_model, tiny_space, tmp_path):
    with pytest.raises(InputError, match="a supernet holds many networks: extract one first"):
        flora.export_torch(flora.factorize(tiny_model, tiny_space), tmp_path / "new")
    structure, parameters = functional.split(tiny_model)
    parameters["norm.scale"] = parameters["norm.scale"].at[0].set(np.nan)
    with pytest.raises(InputError, match=r"parameters that are NaN or infinite: norm\.scale"):
        flora.export_torch(functional.merge(structure, parameters), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_computes_something_else_is_refused(tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="runs the exported model")
    flora.export_torch(tiny_model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def wrong(parameters, spec):
        arrays = right(parameters, spec)
        return arrays | {"head.weight": arrays["head.weight"] * np.float32(1.001)}

    right = pytorch._state_dict
    monkeypatch.setattr(pytorch, "_state_dict", wrong)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(InputError, match=r"something else.*by \d.\de-0\d of the largest"):
            flora.export_torch(tiny_model, folder)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_images_to_compare_on(tiny_model, tiny_images, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pytorch, "_check_computes_the_same", lambda *found: seen.append(found[-1]))
    flora.export_torch(tiny_model, tmp_path / "one", tiny_images)
    flora.export_torch(tiny_model, tmp_path / "two")
    assert seen[0] is tiny_images
    assert seen[1].shape == (2, 8, 8, 3)
    with pytest.raises(InputError, match=r"are float32 \(5, 8, 7, 3\); .* float32 \(B, 8, 8, 3\)"):
        flora.export_torch(tiny_model, tmp_path / "three", tiny_images[:, :, 1:])
    assert not (tmp_path / "three").exists()
