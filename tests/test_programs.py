"""Exported programs, StableHLO and ONNX: what they compute, how large they are, what is refused."""

import collections
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import slim
from flora_jax.errors import InputError, MissingPackageError, StorageError
from flora_jax.models import functional
from flora_jax.weights.export import checks
from tests.helpers import modern
from tests.helpers.compressed import NETWORKS, low_rank, network
from tests.helpers.slimming import images_of, logits, random_model

FUNCTIONS = {".bin": flora.export_stablehlo, ".onnx": flora.export_onnx}
# One of each kind that differs in what is computed.
KINDS = (
    *("timm_deit3", "timm_dinov2_registers", "timm_dinov3", "timm_dinov3_swiglu", "timm_clip"),
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


@pytest.mark.parametrize("name", ["swin", "tiny_vit, low rank on slim"])
def test_onnx_in_half(runtime, name, tmp_path):
    (model, images, expected, _), path = network(name), tmp_path / "m.onnx"
    flora.export_onnx(model, path, dtype="float16")
    given = run(runtime, path, images)
    assert given.dtype == np.float32
    assert 0 < abs(given - expected).max() <= 2e-2 * max(1, abs(expected).max())
    graph = pytest.importorskip("onnx").load(path).graph
    floats = {t.data_type for t in graph.initializer} - {7}  # int64
    assert floats == {10}  # float16


@pytest.mark.parametrize("name", ["low rank on slim", "tiny_vit, low rank on slim"])
def test_onnx_in_8_bits(runtime, name, tmp_path, caplog):
    """Only convolutions and what multiplies two activations stay in float32."""
    onnx = pytest.importorskip("onnx")
    (model, images, expected, _), path = network(name), tmp_path / "m.onnx"
    flora.export_onnx(model, path, dtype="int8")
    assert not caplog.records
    given = run(runtime, path, images)
    assert 0 < abs(given - expected).max() <= 5e-2 * max(1, abs(expected).max())
    graph = onnx.load(path).graph
    bits = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    weights = [w for w in bits.values() if w.dtype == np.int8 and w.ndim == 2]
    of_products = [
        name
        for name, parameter in functional.split(model)[1].items()
        if name.endswith(("kernel", "down", "up")) and parameter.ndim == 2 and ".conv" not in name
    ]
    assert len(weights) == len(of_products)
    assert max(abs(np.int32(w)).max() for w in weights) <= 64  # what CPUs without VNNI add up
    products = [node for node in graph.node if node.op_type == "MatMul"]
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
    swin = flora.swin("tiny", image_size=56, embed_dim=192, depths=(2, 1), num_heads=(6, 12))
    for spec in (flora.deit("tiny", depth=1, image_size=32), swin):
        model, path = random_model(spec), tmp_path / f"m{ending}"
        FUNCTIONS[ending](model, path)
        assert 1 < os.path.getsize(path) / (4 * flora.num_params(spec)) < 1.02


def test_what_computes_something_else_leaves_no_file(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(jax.export.Exported, "call", lambda self, images: np.ones((2, 3)))
    with pytest.raises(InputError, match=r"something else.* by [\d.]+e[+-]\d\d of the largest"):
        flora.export_stablehlo(tiny_model, tmp_path / "m.bin")
    assert not list(tmp_path.iterdir())


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
    monkeypatch.setattr(checks, "LARGEST_FILE", 1000)
    with pytest.raises(InputError, match=r"0\.00 GiB of weights are too many for m\..* 2 GiB at"):
        export(tiny_model, path)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("ending", FUNCTIONS)
def test_a_path_that_cannot_be_written(ending, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(functional, "merge", None)  # nothing is made before it is known
    (tmp_path / "file").write_text("")
    if ending == ".onnx":
        pytest.importorskip("onnx", reason="writes ONNX files")
    with pytest.raises(StorageError, match=f"writing .*m{ending} failed: .*File exists"):
        FUNCTIONS[ending](tiny_model, tmp_path / f"file/m{ending}")


def test_missing_packages(tiny_model, tmp_path, monkeypatch, caplog):
    pytest.importorskip("onnx", reason="writes ONNX files")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    flora.export_onnx(tiny_model, tmp_path / "m.onnx")
    assert "m.onnx was not run to check it: pip install 'flora_jax[onnx]'" in caplog.text
    with pytest.raises(MissingPackageError, match=r"needs onnxruntime: pip install"):
        flora.export_onnx(tiny_model, tmp_path / "other.onnx", dtype="int8")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'flora_jax\[onnx\]'"):
        flora.export_onnx(tiny_model, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()
