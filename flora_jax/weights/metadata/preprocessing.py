"""Preprocessing of pictures that a model in a folder asks for: ours, timm's or transformers'."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from etils import epath
from PIL import Image

from flora_jax.data.preprocessing import Preprocessing
from flora_jax.errors import InputError, did_you_mean, unknown
from flora_jax.io.files import read_json, write_json
from flora_jax.io.paths import user_path
from flora_jax.weights.hub import local_folder
from flora_jax.weights.metadata.fields import Fields, is_whole, read_named
from flora_jax.weights.metadata.spec import CONFIG_FILE

PREPROCESSING_FILE = "preprocessing.json"

_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_STANDARD = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_OPENAI = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_BILINEAR, _BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)
_224 = {"height": 224, "width": 224}
_SQUARE = {"size": _224, "is_square": True}
_CROPPED = {"crop_size": _224, "do_center_crop": True, "resample": _BICUBIC}
_CLIP = _CROPPED | _OPENAI | {"size": {"shortest_edge": 224}}
# What the image processors of transformers 5 do where a file does not say; is_square: whether
# one number for the size is both sides, or the shorter one.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": _SQUARE | _STANDARD | {"resample": _BILINEAR},
    "DeiTImageProcessor": _SQUARE | _STANDARD | _CROPPED | {"size": {"height": 256, "width": 256}},
    "BeitImageProcessor": _SQUARE | _STANDARD | {"crop_size": _224, "resample": _BICUBIC},
    "SiglipImageProcessor": _STANDARD | {"size": _224, "resample": _BICUBIC},
    "DINOv3ViTImageProcessor": _SQUARE | _IMAGENET | {"resample": _BILINEAR},
    "CLIPImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,
}
# Of a file that does not name one, by the beginning of the network's model_type.
_PROCESSORS = {"vit": "ViT", "swin": "ViT", "deit": "DeiT", "clip": "CLIP", "siglip": "Siglip"}
_PROCESSORS |= {"beit": "Beit", "dinov2": "Bit", "dinov3": "DINOv3ViT"}


def read_preprocessing(folder: epath.PathLike) -> Preprocessing | None:
    """Reads what the model in a folder wants done to pictures, or None where nothing says so.

    Looked for, in this order: our own `preprocessing.json`, `pretrained_cfg` in the `config.json`
    of timm, the `processor_config.json` or `preprocessor_config.json` of transformers. What a file
    leaves out has the default it has in the library that wrote the file.

    Raises:
      InputError: broken JSON, a field of the wrong type, or something to be done that a
        `Preprocessing` cannot say; names the file and the field.
    """
    folder = local_folder(folder)
    readers: dict[str, Callable[[Any], Preprocessing | None]] = {
        PREPROCESSING_FILE: _own,
        CONFIG_FILE: _timm,
        "processor_config.json": functools.partial(_beside_texts, folder),
        "preprocessor_config.json": functools.partial(_transformers, folder),
    }
    for name, read in readers.items():
        if (folder / name).exists() and (found := read_named(folder / name, read)):
            return found
    return None


def save_preprocessing(
    folder: epath.PathLike,
    preprocessing: Preprocessing,
    outputs: str = "classes",
    in_channels: int = 3,
) -> None:
    """Writes `preprocessing.json` beside a model; `read_preprocessing` reads it back.

    `outputs`, what these mean, and `in_channels` are for programs that have no spec beside an
    exported file.
    """
    about: dict[str, Any] = {} if outputs == "classes" else {"outputs": outputs}
    about |= {} if in_channels == 3 else {"in_channels": in_channels}
    write_json(user_path(folder) / PREPROCESSING_FILE, dataclasses.asdict(preprocessing) | about)


def _own(content: Any) -> Preprocessing:
    fields, default = Fields(content), Preprocessing
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    for name in fields.keys() - {*names, "outputs", "in_channels"}:
        raise InputError(f"unknown field {name!r}{did_you_mean(name, names)}")
    return Preprocessing(
        image_size=fields.side("image_size"),
        mean=fields.numbers("mean", default.mean),
        std=fields.numbers("std", default.std),
        crop_pct=fields.number("crop_pct", default.crop_pct),
        crop_mode=fields.text("crop_mode", default.crop_mode),
        interpolation=fields.text("interpolation", default.interpolation),
        background=fields.counts("background", default.background),
        exif_orientation=fields.flag("exif_orientation", default.exif_orientation),
    )


def _timm(content: Any) -> Preprocessing | None:
    """Old files have no pretrained_cfg but its fields."""
    config = Fields(content)
    if "architecture" not in config:
        return None
    fields = config.within("pretrained_cfg") if "pretrained_cfg" in config else config
    crop_pct = fields.number("crop_pct", 0) or 0.875
    crop_mode = fields.text("crop_mode", "") or "center"
    if crop_mode == "squash" and crop_pct < 1:
        crop_mode = "squash_center"
    sides = {"input_size": fields.sizes("input_size", (3, 224, 224))[1:]}
    return Preprocessing(
        config.within("model_args").side("img_size", Fields(sides).side("input_size")),
        mean=fields.numbers("mean", _IMAGENET["image_mean"]),
        std=fields.numbers("std", _IMAGENET["image_std"]),
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation=fields.text("interpolation", "") or "bicubic",
        background=(),
    )


def _beside_texts(folder: epath.Path, content: Any) -> Preprocessing | None:
    """The image processor that transformers 5 writes beside that of texts."""
    fields = Fields(content)
    if "image_processor" not in fields:
        return None
    return _transformers(folder, fields.within("image_processor"))


def _transformers(folder: epath.Path, content: Any) -> Preprocessing:
    """Pixels come to 0..1 here, and by nothing else."""
    fields = Fields(content)
    defaults = _defaults(fields, folder)
    always = ("do_rescale", "do_resize")
    never = ("rescale_offset", "do_pad", "do_grayscale", "do_flip_channel_order")
    for name in (*always, *never):
        if fields.flag(name, name in always) != (name in always):
            raise fields.error(name, f"{str(name in always).lower()}, as nothing else is done here")
    if not math.isclose(fields.number("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3):
        raise fields.error("rescale_factor", "1/255, for pixels are taken in 0..1 here")
    normal = fields
    if not fields.flag("do_normalize", True):
        normal = Fields({"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3})
    mean, std = (normal.numbers(name, defaults[name]) for name in ("image_mean", "image_std"))
    number = fields.count("resample", defaults["resample"])
    interpolations = {int(method): method.name.lower() for method in Image.Resampling}
    if number not in interpolations:
        raise fields.error("resample", f"one of Pillow's {interpolations}")
    return Preprocessing(
        **_geometry(fields, defaults),
        mean=mean,
        std=std,
        interpolation=interpolations[number],
        background=(255, 255, 255),  # where it converts to RGB at all, it does so on white
    )


def _defaults(fields: Fields, folder: epath.Path) -> dict[str, Any]:
    """Those of the image processor that the fields name, or else of the network beside them."""
    named = fields.text("image_processor_type", "") or fields.text("feature_extractor_type", "")
    name = named.replace("FeatureExtractor", "ImageProcessor")
    name = name.removesuffix("Fast").removesuffix("Pil")
    if not named and (folder / CONFIG_FILE).exists():
        model_type = str(read_json(folder / CONFIG_FILE).get("model_type"))
        name = _PROCESSORS.get(model_type.partition("_")[0], "") + "ImageProcessor"
    if name not in _DEFAULTS:
        raise InputError(unknown("image_processor_type", named, _DEFAULTS))
    return _DEFAULTS[name]


def _geometry(fields: Fields, defaults: dict[str, Any]) -> dict[str, Any]:
    size = _size(fields, "size", defaults["size"], defaults.get("is_square", False))
    crops = fields.flag("do_center_crop", defaults.get("do_center_crop", False))
    if "shortest_edge" in size:
        if not crops:
            raise fields.error("do_center_crop", "true where size has a shortest_edge")
        short, mode = size["shortest_edge"], "center"
    else:
        short, mode = size["height"], "squash"
    if not crops:
        return {"image_size": short, "crop_mode": mode}
    crop = _size(fields, "crop_size", defaults.get("crop_size", size), True)
    if "height" not in crop:
        raise fields.error("crop_size", "a height and a width")
    if crop["height"] > short:
        raise fields.error("crop_size", f"at most size {short}, for pictures are not padded here")
    if mode == "squash" and crop["height"] < short:
        mode = "squash_center"
    crop_pct = crop["height"] / short
    while int(crop["height"] / crop_pct) < short:  # rounding may take one pixel off
        crop_pct = math.nextafter(crop_pct, 0)
    return {"image_size": crop["height"], "crop_pct": crop_pct, "crop_mode": mode}


def _size(fields: Fields, name: str, default: dict[str, int], is_square: bool) -> dict[str, int]:
    """{"height": side, "width": side} or {"shortest_edge": side}, as the file or its default."""
    value = fields.get(name, default)
    if is_whole(value):
        value = {"height": value, "width": value} if is_square else {"shortest_edge": value}
    elif isinstance(value, list) and len(value) == 2:
        value = dict(zip(("height", "width"), value, strict=True))
    known = ({"height", "width"}, {"shortest_edge"})
    if not isinstance(value, dict) or set(value) not in known:
        raise fields.error(name, "a number, a height and a width, or a shortest_edge")
    if not all(is_whole(side) for side in value.values()) or len(set(value.values())) > 1:
        raise fields.error(name, "a square of whole pixels")
    return value
