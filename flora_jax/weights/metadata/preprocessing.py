"""Preprocessing of pictures that a model in a folder asks for: ours, timm's or transformers'."""

import dataclasses
import math
from typing import Any

from etils import epath
from PIL import Image

from flora_jax.data.preprocessing import Preprocessing
from flora_jax.errors import InputError, did_you_mean, unknown
from flora_jax.io.files import write_json
from flora_jax.io.paths import user_path
from flora_jax.weights.hub import local_folder
from flora_jax.weights.metadata.fields import Fields, is_whole
from flora_jax.weights.metadata.spec import CONFIG_FILE

PREPROCESSING_FILE = "preprocessing.json"
# transformers 5 writes the image processor into the first, beside that of texts.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")

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
    "SiglipImageProcessor": _STANDARD | {"size": _224, "resample": _BICUBIC},
    "DINOv3ViTImageProcessor": _SQUARE | _IMAGENET | {"resample": _BILINEAR},
    "CLIPImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,
}
_PROCESSORS = {  # of a file that does not name one
    "vit": "ViTImageProcessor",
    "swin": "ViTImageProcessor",
    "deit": "DeiTImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "dinov3_vit": "DINOv3ViTImageProcessor",
    "clip": "CLIPImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
}


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
    path = folder / PREPROCESSING_FILE
    if path.exists():
        fields = Fields.read(path)
        return _preprocessing(fields, _own(fields))
    config = folder / CONFIG_FILE
    fields = Fields.read(config) if config.exists() else Fields({})
    if "architecture" in fields:
        return _preprocessing(fields, _timm(fields))
    if (processor := _processor_in(folder)) is None:
        return None
    defaults = _DEFAULTS[_processor(processor, fields.text("model_type", ""))]
    return _preprocessing(processor, _transformers(processor, defaults))


def save_preprocessing(folder: epath.PathLike, preprocessing: Preprocessing) -> None:
    """Writes `preprocessing.json` beside a model; `read_preprocessing` reads it back."""
    write_json(user_path(folder) / PREPROCESSING_FILE, dataclasses.asdict(preprocessing))


def _preprocessing(fields: Fields, values: dict[str, Any]) -> Preprocessing:
    try:
        return Preprocessing(**values)
    except InputError as error:
        raise InputError(f"{fields.at}{error}") from error


def _own(fields: Fields) -> dict[str, Any]:
    defaults = {f.name: f.default for f in dataclasses.fields(Preprocessing)}
    for name in fields:
        if name not in defaults:
            raise InputError(f"{fields.at}unknown field {name!r}{did_you_mean(name, defaults)}")
    background = fields.get("background", list(Preprocessing.background))
    if not isinstance(background, list) or not all(is_whole(each, 0) for each in background):
        raise fields.error("background", "a list of whole numbers")
    return {
        "image_size": fields.side("image_size"),
        "mean": fields.numbers("mean", Preprocessing.mean),
        "std": fields.numbers("std", Preprocessing.std),
        "crop_pct": fields.number("crop_pct", Preprocessing.crop_pct),
        "crop_mode": fields.text("crop_mode", Preprocessing.crop_mode),
        "interpolation": fields.text("interpolation", Preprocessing.interpolation),
        "background": tuple(background),
    }


def _timm(config: Fields) -> dict[str, Any]:
    """Old files have no pretrained_cfg but its fields."""
    fields = config.within("pretrained_cfg") if "pretrained_cfg" in config else config
    arguments = config.within("model_args")
    crop_pct = fields.number("crop_pct", 0) or 0.875
    crop_mode = fields.text("crop_mode", "") or "center"
    if crop_mode == "squash" and crop_pct < 1:
        crop_mode = "squash_center"
    if "img_size" in arguments:
        image_size = arguments.side("img_size")
    else:
        channels_and_size = fields.get("input_size", [3, 224, 224])
        if not isinstance(channels_and_size, list) or len(channels_and_size) != 3:
            raise fields.error("input_size", "channels, height and width")
        image_size = Fields({"input_size": channels_and_size[1:]}, fields.at).side("input_size")
    return {
        "image_size": image_size,
        "mean": fields.numbers("mean", _IMAGENET["image_mean"]),
        "std": fields.numbers("std", _IMAGENET["image_std"]),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": fields.text("interpolation", "") or "bicubic",
        "background": (),
    }


def _processor_in(folder: epath.Path) -> Fields | None:
    """The fields of an image processor of transformers, where the folder has one."""
    both, of_images = (folder / name for name in _PROCESSOR_FILES)
    if both.exists() and "image_processor" in (fields := Fields.read(both)):
        return fields.within("image_processor")
    return Fields.read(of_images) if of_images.exists() else None


def _processor(fields: Fields, model_type: str) -> str:
    named = fields.text("image_processor_type", "") or fields.text("feature_extractor_type", "")
    name = named.replace("FeatureExtractor", "ImageProcessor")
    name = name.removesuffix("Fast").removesuffix("Pil") or _PROCESSORS.get(model_type, "")
    if name not in _DEFAULTS:
        raise InputError(fields.at + unknown("image_processor_type", named, _DEFAULTS))
    return name


def _transformers(fields: Fields, defaults: dict[str, Any]) -> dict[str, Any]:
    """Pixels come to 0..1 here, and by nothing else."""
    wanted = {"do_rescale": True, "do_resize": True, "rescale_offset": False, "do_pad": False}
    for name, value in (wanted | {"do_grayscale": False, "do_flip_channel_order": False}).items():
        if fields.flag(name, value) != value:
            raise fields.error(name, f"{str(value).lower()}, for nothing else is done here")
    if not math.isclose(fields.number("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3):
        raise fields.error("rescale_factor", "1/255, for pixels are taken in 0..1 here")
    mean: tuple[float, ...] = (0.0,) * 3
    std: tuple[float, ...] = (1.0,) * 3
    if fields.flag("do_normalize", True):
        mean, std = (fields.numbers(name, defaults[name]) for name in ("image_mean", "image_std"))
    number = fields.get("resample", defaults["resample"])
    interpolations = {int(method): method.name.lower() for method in Image.Resampling}
    if not is_whole(number, 0) or number not in interpolations:
        names = ", ".join(f"{key} ({name})" for key, name in sorted(interpolations.items()))
        raise fields.error("resample", f"a number of Pillow's: {names}")
    return {
        **_geometry(fields, defaults),
        "mean": mean,
        "std": std,
        "interpolation": interpolations[number],
        "background": (255, 255, 255),  # where it converts to RGB at all, it does so on white
    }


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
