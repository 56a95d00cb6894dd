"""What a folder says of pictures and classes, against the libraries that write such folders."""

import json

import numpy as np
import pytest
from PIL import Image

import flora_jax as flora
from flora_jax.data.preprocessing import Preprocessing
from flora_jax.weights.metadata.class_names import read_class_names
from flora_jax.weights.metadata.preprocessing import save_preprocessing

STANDARD = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

VIT = {"image_processor_type": "ViTImageProcessor", "size": {"height": 96, "width": 96}}
CROPPED = {
    "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 107},
    "crop_size": {"height": 93, "width": 93}, "do_convert_rgb": True,
    "rescale_factor": 0.00392156862745098,
}  # fmt: skip
# As they stand on the hub, at other sizes; with what they come to.
PROCESSORS = {
    "vit": (
        VIT | {"do_center_crop": None, "image_mean": [0.5] * 3, "resample": 2},
        Preprocessing(96, STANDARD, STANDARD, 0.875, "squash", "bilinear"),
    ),
    "vit_before_2022": (
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 64, "do_normalize": False},
        Preprocessing(64, (0.0,) * 3, (1.0,) * 3, 0.875, "squash", "bilinear"),
    ),
    "clip_before_2022": (
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336},
        Preprocessing(336, *CLIP, 1.0, "center", "bicubic"),
    ),
    "dinov2": (
        CROPPED | {"image_mean": list(IMAGENET[0]), "image_std": list(IMAGENET[1])},
        Preprocessing(93, *IMAGENET, 93 / 107, "center", "bicubic"),
    ),
    "deit": (
        {"feature_extractor_type": "DeiTFeatureExtractor", "size": 110, "crop_size": 98},
        Preprocessing(98, STANDARD, STANDARD, 98 / 110, "squash_center", "bicubic"),
    ),
    "beit": (
        {"feature_extractor_type": "BeitFeatureExtractor", "do_center_crop": False, "size": 90},
        Preprocessing(90, STANDARD, STANDARD, 0.875, "squash", "bicubic"),
    ),
    "dinov3": (
        {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": [80, 80]},
        Preprocessing(80, *IMAGENET, 0.875, "squash", "bilinear"),
    ),
    "siglip": (
        {"image_processor_type": "SiglipImageProcessor", "resample": 5},
        Preprocessing(224, STANDARD, STANDARD, 0.875, "squash", "hamming"),
    ),
    "named_by_the_network": ({}, Preprocessing(224, *CLIP, 1.0, "center", "bicubic")),
}


def written(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def picture(height, width):
    rng = np.random.default_rng(height)
    noise = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8))
    return np.array(noise.resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("name", PROCESSORS)
def test_hugging_face(tmp_path, name):
    config, expected = PROCESSORS[name]
    written(tmp_path, preprocessor_config=config, config={"model_type": "dinov2"})
    assert flora.read_preprocessing(tmp_path) == expected


@pytest.mark.parametrize("size, short", [(93, 107), (224, 256), (49, 49), (131, 999)])
def test_short_side_is_exactly_the_one_of_the_file(tmp_path, size, short):
    config = CROPPED | {"size": {"shortest_edge": short}, "crop_size": size}
    read = flora.read_preprocessing(written(tmp_path, preprocessor_config=config))
    assert int(size / read.crop_pct) == short


def test_processor_beside_that_of_texts(tmp_path):
    """transformers 5 writes both into one file, which comes before an older one."""
    nested = {"image_processor": PROCESSORS["dinov2"][0], "processor_class": "CLIPProcessor"}
    written(tmp_path, processor_config=nested, preprocessor_config=VIT)
    assert flora.read_preprocessing(tmp_path) == PROCESSORS["dinov2"][1]
    written(tmp_path, processor_config={"processor_class": "CLIPProcessor"})
    assert flora.read_preprocessing(tmp_path).crop_mode == "squash"


@pytest.mark.parametrize("name", ["vit", "clip_before_2022", "dinov2", "deit", "beit", "siglip"])
def test_pixels_are_those_of_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="compares with image processors")
    written(tmp_path, preprocessor_config=PROCESSORS[name][0], config={"model_type": "vit"})
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    read = flora.read_preprocessing(tmp_path)
    image = picture(200, 301)  # of an odd rest transformers cuts out a pixel further left
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    ours = read.normalization(read.crop(3)(image))
    assert ours.shape == (*expected.shape[1:], 3)
    np.testing.assert_allclose(ours, expected.transpose(1, 2, 0), atol=1e-5)


TIMM = {"architecture": "vit_base_patch16_224.orig", "num_classes": 1000}
SQUASHED = {
    "input_size": [3, 70, 70], "fixed_input_size": True, "interpolation": "bilinear",
    "crop_pct": 0.9, "crop_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3,
}  # fmt: skip


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"pretrained_cfg": {}}, Preprocessing(224, background=())),
        (
            {"pretrained_cfg": SQUASHED},
            Preprocessing(70, STANDARD, STANDARD, 0.9, "squash_center", "bilinear", ()),
        ),
        (
            {"input_size": [3, 90, 90], "crop_pct": 1.0, "crop_mode": "squash"},
            Preprocessing(90, crop_pct=1.0, crop_mode="squash", background=()),
        ),
        (
            {"model_args": {"img_size": 48}, "pretrained_cfg": {"input_size": [3, 70, 70]}},
            Preprocessing(48, background=()),
        ),
    ],
)
def test_timm(tmp_path, config, expected):
    assert flora.read_preprocessing(written(tmp_path, config=TIMM | config)) == expected


def test_pixels_are_those_of_timm(tmp_path):
    timm = pytest.importorskip("timm", reason="compares with the transforms of timm")
    for crop_mode in ("center", "squash"):
        cfg = {"input_size": [3, 70, 70], "crop_pct": 0.9, "crop_mode": crop_mode}
        written(tmp_path, config=TIMM | {"pretrained_cfg": cfg})
        transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))
        read, image = flora.read_preprocessing(tmp_path), picture(100, 161)
        expected = transform(Image.fromarray(image)).numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(read.normalization(read.crop(3)(image)), expected, atol=1e-5)


def test_timm_within_transformers(tmp_path):
    """A timm network that transformers has saved goes by timm's part of config.json."""
    written(tmp_path, config=TIMM | {"model_type": "timm_wrapper", "crop_pct": 0.5})
    written(tmp_path, preprocessor_config={"image_processor_type": "TimmWrapperImageProcessor"})
    assert flora.read_preprocessing(tmp_path).crop_pct == 0.5


def test_own_file_comes_first_and_back_as_it_was(tmp_path):
    ours = Preprocessing(20, (0.4,), (0.3,), 0.7, "squash", "box", (1, 2, 3))
    written(tmp_path, preprocessor_config=VIT, config={"model_type": "vit"})
    save_preprocessing(tmp_path, ours)
    assert flora.read_preprocessing(tmp_path) == ours


def test_nothing_said(tmp_path):
    """Names that transformers makes up are none."""
    made_up = {"model_type": "vit", "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    for files in ({}, {"config": made_up}):
        assert flora.read_preprocessing(written(tmp_path, **files)) is None
        assert read_class_names(tmp_path) == ()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"size": {"height": 96, "width": 64}}, "size must be a square"),
        ({"size": {"longest_edge": 96}}, "size must be a number, a height and a width, or"),
        ({"size": {"shortest_edge": 96}}, "do_center_crop must be true where size has a sh"),
        ({"resample": 7}, "resample must be one of Pillow's .*0: 'nearest'"),
        (
            {"image_mean": "0.5"},
            "image_mean must be a list, each a number of at least 0, got '0.5'",
        ),
        ({"image_std": [58.4, 57.1, 57.4]}, "std must lie in .*did you mean"),
        ({"do_rescale": False}, "do_rescale must be true, "),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor must be 1/255.*got 0.0078"),
        ({"rescale_offset": True}, "rescale_offset must be false"),
        ({"do_center_crop": True, "crop_size": 128}, "crop_size must be at most size 96"),
        ({"image_processor_type": "ViTImageProcesor"}, "did you mean 'ViTImageProcessor'"),
    ],
)
def test_hugging_face_refused(tmp_path, changes, message):
    written(tmp_path, preprocessor_config=VIT | changes)
    with pytest.raises(ValueError, match=f"preprocessor_config.json: .*{message}"):
        flora.read_preprocessing(tmp_path)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("preprocessing", {"image_size": 8, "crop_pt": 1}, "unknown field 'crop_pt' .did you mean"),
        ("preprocessing", {"crop_pct": 1}, "image_size must be the side of a square"),
        ("preprocessing", {"image_size": 8, "background": [0.5] * 3}, "background must be a list"),
        ("preprocessing", {"image_size": 8, "exif_orientation": 6}, "must be true or false"),
        ("preprocessing", [8], "must be an object with fields"),
        ("config", TIMM | {"crop_mode": "border"}, "crop_mode 'border' is unknown"),
        ("config", TIMM | {"input_size": [3, 70, 90]}, "input_size must be the side of a square"),
        ("classes", {"1": "cat"}, "names must be a name for each number from 0 to 0"),
        ("config", {"id2label": "cat"}, "id2label must be a list of names"),
    ],
)
def test_other_files_refused(tmp_path, file, content, message):
    read = flora.read_preprocessing
    if file == "classes" or "id2label" in content:
        read = read_class_names
    with pytest.raises(ValueError, match=rf"{file}\.json: .*{message}"):
        read(written(tmp_path, **{file: content}))


def test_broken_json_is_named(tmp_path):
    for name in ("config", "preprocessor_config", "processor_config", "preprocessing"):
        (tmp_path / f"{name}.json").write_text('{"size": ')
        with pytest.raises(ValueError, match=f"/{name}.json is not valid JSON"):
            flora.read_preprocessing(tmp_path)
        (tmp_path / f"{name}.json").write_text("{}")


NAMES = ("cat", "dog", "emu", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lynx", "mole")


@pytest.mark.parametrize(
    "file, content",
    [
        ("classes", list(NAMES)),
        ("config", {"id2label": {str(i): name for i, name in reversed([*enumerate(NAMES)])}}),
        ("config", TIMM | {"label_names": list(NAMES)}),
        ("config", TIMM | {"pretrained_cfg": {"label_names": dict(enumerate(NAMES))}}),
        ("config", TIMM | {"labels": list(NAMES)}),
    ],
)
def test_class_names(tmp_path, file, content):
    assert read_class_names(written(tmp_path, **{file: content})) == NAMES
