"""The programs that fetch real material: what they make of it, without fetching any."""

import dataclasses
import importlib.util
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

import flora_jax as flora
from benchmarks import clip_art, dinov2

TINY = dataclasses.replace(
    dinov2.SPEC,
    image_size=8,
    patch_size=4,
    embed_dim=8,
    depth=2,
    num_heads=2,
    mlp_ratio=2,
    blocks=(),
)


def needs(package: str) -> pytest.MarkDecorator:
    is_missing = importlib.util.find_spec(package) is None
    reason = f"{package} is missing: pip install '.[benchmarks]'"
    return pytest.mark.skipif(is_missing, reason=reason)


def drawing(seed: int, category: str = "animals") -> clip_art.Drawing:
    pixels = np.random.default_rng(seed).integers(0, 200, (4, 4, 3), np.uint8)
    large = np.asarray(Image.fromarray(pixels).resize((128, 128)))
    return clip_art.Drawing(category, f"{seed}.png", large)


def house(wall: str, at: tuple[int, int] = (0, 0), page: int = 400) -> Image.Image:
    picture = Image.new("RGBA", (page, page))
    draw, (x, y) = ImageDraw.Draw(picture), at
    draw.polygon([(x, y + 60), (x + 50, y), (x + 100, y + 60)], fill="black")
    draw.rectangle((x + 10, y + 60, x + 90, y + 120), fill=wall)
    draw.rectangle((x + 40, y + 80, x + 60, y + 120), fill="black")
    return picture


def as_drawing(picture: Image.Image, name: str) -> clip_art.Drawing:
    return clip_art.Drawing("buildings", name, clip_art.square(picture))


def names(groups: list[clip_art.Group]) -> set[frozenset[str]]:
    return {frozenset(drawing.name for drawing in group) for group in groups}


@pytest.fixture
def groups() -> list[clip_art.Group]:
    """100 drawings: 40 alone, 10 pairs, 5 of 5, and 15 alike."""
    drawings = iter(map(drawing, range(100)))
    sizes = [1] * 40 + [2] * 10 + [5] * 5 + [15]
    return [[next(drawings) for _ in range(size)] for size in sizes]


@pytest.mark.parametrize(("most", "train", "val"), [(700, 70, 30), (50, 35, 15)])
def test_split_keeps_groups_whole_and_the_fraction(groups, most, train, val):
    sides = clip_art.split(groups, 0.3, most)
    assert {side: sum(map(len, chosen)) for side, chosen in sides.items()} == {
        "train": train,
        "val": val,
    }
    assert names(sides["train"]) | names(sides["val"]) <= names(groups)
    assert not names(sides["train"]) & names(sides["val"])
    mixed = [groups[i][::-1] for i in np.random.default_rng(0).permutation(len(groups))]
    again = clip_art.split(mixed, 0.3, most)
    assert all(names(sides[side]) == names(again[side]) for side in sides)


def test_a_group_too_large_for_val_is_trained_on():
    group = [drawing(seed) for seed in range(4)]
    assert clip_art.split([group], 0.3, most=700) == {"train": [group], "val": []}


def test_recoloured_and_moved_drawings_are_near_duplicates():
    drawings = [
        as_drawing(house("gray"), "gray"),
        as_drawing(house("tomato"), "red"),
        as_drawing(house("gray", at=(250, 90)), "moved"),
        as_drawing(house("gray").rotate(90), "turned"),
    ]
    groups = clip_art.near_duplicates(clip_art.distinct(drawings))
    # Where the drawing lies on its page is cut away: "moved" is "gray", the first in the alphabet.
    assert names(groups) == {frozenset({"gray", "red"}), frozenset({"turned"})}


def test_equal_drawings_are_kept_once_a_class():
    drawings = [drawing(0), drawing(0), drawing(0, "food"), drawing(1)]
    kept = clip_art.distinct(drawings)
    assert sorted((one.category, one.name) for one in kept) == [
        ("animals", "0.png"),
        ("animals", "1.png"),
        ("food", "0.png"),
    ]
    # Those in two classes are one group, which tells that the class is in doubt.
    assert sorted(map(len, clip_art.near_duplicates(kept))) == [1, 2]


def test_a_drawing_is_cut_out_and_put_on_white():
    pixels = clip_art.square(house("tomato", at=(250, 90)))
    assert pixels.shape == (128, 128, 3)
    assert pixels.dtype == np.uint8
    assert (pixels[0, 0] == 255).all()
    is_drawn = (pixels < clip_art.PAPER).any(axis=2)
    assert is_drawn.any(axis=1).all()  # its long side fills the square
    assert not is_drawn[:, :8].any()
    assert not is_drawn[:, -8:].any()


@pytest.mark.parametrize("size", [(0, 0), (20, 20), (300, 1)])
def test_blank_tiny_and_thin_drawings_are_none(size):
    page = Image.new("RGBA", (400, 400))
    page.paste("black", (10, 10, 10 + size[0], 10 + size[1]))
    assert clip_art.square(page) is None


def test_links_are_read_as_the_pictures_they_are(tmp_path):
    for category in clip_art.CLASSES:
        (tmp_path / category).mkdir()
    (tmp_path / "food/fruit").mkdir()
    house("gray").save(tmp_path / "food/fruit/a.png")
    (tmp_path / "plants/b.png").symlink_to("../food/fruit/a.png")
    Image.new("RGBA", (50, 50)).save(tmp_path / "plants/blank.png")
    found, drawings = clip_art.read(tmp_path)
    assert found == {"food": 1, "plants": 2}
    assert [(one.category, one.name) for one in drawings] == [
        ("food", "fruit-a.png"),
        ("plants", "b.png"),
    ]
    assert drawings[0].digest == drawings[1].digest


def random_backbone(spec: flora.ViTSpec) -> dinov2.StateDict:
    rng, width = np.random.default_rng(0), spec.embed_dim
    patches = (width, 3, spec.patch_size, spec.patch_size)
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, spec.num_tokens, width),
        "embeddings.patch_embeddings.projection": patches,
        "layernorm": (width,),
    }
    for i in range(spec.depth):
        at = f"encoder.layer.{i}"
        shapes |= {f"{at}.{name}": (width,) for name in ("norm1", "norm2")}
        shapes |= {f"{at}.layer_scale{n}.lambda1": (width,) for n in (1, 2)}
        for name in ("attention.query", "attention.key", "attention.value", "output.dense"):
            shapes[f"{at}.attention.{name}"] = (width, width)
        shapes[f"{at}.mlp.fc1"] = (spec.mlp_ratio * width, width)
        shapes[f"{at}.mlp.fc2"] = (width, spec.mlp_ratio * width)
    backbone = {}
    for name, shape in shapes.items():
        is_array = name.endswith(("_token", "_embeddings", "lambda1"))
        backbone[name if is_array else f"{name}.weight"] = rng.normal(size=shape)
        if not is_array:
            backbone[f"{name}.bias"] = rng.normal(size=shape[0])
    return {name: array.astype(np.float32) for name, array in backbone.items()}


def test_a_saved_folder_opens_at_another_size(monkeypatch, tmp_path):
    monkeypatch.setattr(dinov2, "SPEC", TINY)
    written = flora.from_state_dict(random_backbone(TINY), TINY)
    flora.save(written, tmp_path)
    larger = dinov2.load(tmp_path, 12)
    assert larger(np.zeros((1, 12, 12, 3), np.float32)).shape == (1, TINY.embed_dim)
    same = dinov2.load(tmp_path, TINY.image_size)
    np.testing.assert_array_equal(same.pos_embed[...], written.pos_embed[...])


@needs("onnx")
def test_the_backbone_is_read_from_the_nodes_of_an_onnx_file():
    from onnx import helper, numpy_helper

    backbone = random_backbone(TINY)
    positions = backbone["embeddings.position_embeddings"]
    tensors = {"decoder.bias": np.zeros(1), "first": positions[:, :1], "rest": positions[:, 1:]}
    nodes = [
        helper.make_node("Concat", ["first", "x"], ["a"], "/backbone/embeddings/Concat_6", axis=1),
        helper.make_node("Reshape", ["rest", "y"], ["b"], "/backbone/embeddings/Reshape_1"),
    ]
    for number, (name, array) in enumerate(backbone.items()):
        if name == "embeddings.position_embeddings":
            continue
        if array.ndim == 2:
            # "layer.0" keeps its dot in the path of a node.
            path = re.sub(r"\.(?!\d)", "/", name.removesuffix(".weight"))
            tensors[f"onnx::MatMul_{number}"] = array.T
            inputs = ["x", f"onnx::MatMul_{number}"]
            nodes.append(helper.make_node("MatMul", inputs, [name], f"/backbone/{path}/MatMul"))
        else:
            tensors[f"backbone.{name}"] = array
    nodes.append(helper.make_node("MatMul", ["q", "k"], ["qk"], "/backbone/encoder/MatMul"))
    initializers = [
        numpy_helper.from_array(np.ascontiguousarray(array), name)
        for name, array in tensors.items()
    ]
    graph = helper.make_graph(nodes, "dinov2", [], [], initializers)
    found = dinov2.read_backbone(helper.make_model(graph))
    assert found.keys() == backbone.keys()
    for name, array in backbone.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_missing_package_is_one_line():
    with pytest.raises(SystemExit, match=r"^no_such_package is not installed: pip install"):
        dinov2.package("no_such_package")


def test_crops_are_squares_inside_the_photograph():
    rows, columns = np.indices((60, 90), np.uint8)
    photo = np.stack([rows, columns, np.zeros_like(rows)], axis=-1)
    made = dinov2.crops(photo, 16, 50, np.random.default_rng(0))
    assert made.shape == (50, 16, 16, 3)
    assert made.dtype == np.uint8
    heights, widths = np.ptp(made[..., 0], axis=(1, 2)), np.ptp(made[..., 1], axis=(1, 2))
    assert heights.min() > 60 * 0.3**0.5 * 0.8
    assert np.abs(heights.astype(int) - widths).max() <= 2
    np.testing.assert_array_equal(made, dinov2.crops(photo, 16, 50, np.random.default_rng(0)))


@needs("skimage")
def test_photographs_are_rgb():
    photographs = dinov2.photographs()
    assert len(photographs) == len(dinov2.PHOTOGRAPHS) + 2
    assert {"china", "flower", "astronaut", "camera"} <= photographs.keys()
    for name, photo in photographs.items():
        assert isinstance(photo, np.ndarray)
        assert photo.dtype == np.uint8, name
        assert photo.shape[2:] == (3,), name
