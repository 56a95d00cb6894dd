"""The preprocessor_config.json of transformers: what its image processors do to a picture."""

import math
from typing import Any

from etils import epath
from PIL import Image

from flora_jax.errors import InputError, did_you_mean
from flora_jax.weights.metadata.fields import Fields
from flora_jax.weights.metadata.kinds import is_whole

FILES = ("processor_config.json", "preprocessor_config.json")

_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_STANDARD = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_OPENAI = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_BILINEAR, _BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)
_SQUARE = {"size": {"height": 224, "width": 224}, "do_center_crop": False, "is_square": True}
_CROPPED = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "is_square": False,
    "resample": _BICUBIC,
} | _OPENAI
# What the image processors of transformers 5 do where a file does not say; is_square: whether
# one number for the size is both sides, or the shorter one.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": _SQUARE | _STANDARD | {"resample": _BILINEAR},
    "DeiTImageProcessor": _STANDARD
    | {
        "size": {"height": 256, "width": 256},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "is_square": True,
        "resample": _BICUBIC,
    },
    "SiglipImageProcessor": _SQUARE | _STANDARD | {"resample": _BICUBIC, "is_square": False},
    "DINOv3ViTImageProcessor": _SQUARE | _IMAGENET | {"resample": _BILINEAR},
    "CLIPImageProcessor": _CROPPED,
    "BitImageProcessor": _CROPPED,
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


def processor_in(folder: epath.Path) -> Fields | None:
    """What the folder says of an image processor: newer files have it beside those of texts."""
    for path in (folder / name for name in FILES):
        if path.exists():
            fields = Fields.read(path)
            if path.name == FILES[1]:
                return fields
            if "image_processor" in fields:
                return fields.within("image_processor")
    return None


def read(fields: Fields, model_type: str) -> dict[str, Any]:
    """The fields of a Preprocessing.

    Args:
      fields: of an image processor.
      model_type: that `config.json` names, or "".

    Raises:
      InputError: an unknown processor, or one that is told to do what is not done here.
    """
    defaults = _DEFAULTS[_processor(fields, model_type)]
    _check_pixels(fields)
    return {
        **_geometry(fields, defaults),
        **_normalization(fields, defaults),
        "interpolation": _interpolation(fields, defaults["resample"]),
        "background": (255, 255, 255),  # where it converts to RGB at all, it does so on white
    }


def _processor(fields: Fields, model_type: str) -> str:
    named = fields.text("image_processor_type", "") or fields.text("feature_extractor_type", "")
    name = named.replace("FeatureExtractor", "ImageProcessor")
    name = name.removesuffix("Fast").removesuffix("Pil") or _PROCESSORS.get(model_type, "")
    if name not in _DEFAULTS:
        raise InputError(
            f"{fields.where}: image_processor_type {named or 'of ' + repr(model_type)} is not "
            f"known here; known: {', '.join(_DEFAULTS)}{did_you_mean(name, _DEFAULTS)}"
        )
    return name


def _check_pixels(fields: Fields) -> None:
    """Pixels come to 0..1 here, and by nothing else."""
    if not fields.flag("do_rescale", True):
        raise InputError(f"{fields.where}: do_rescale is false, but pixels are taken in 0..1 here")
    if fields.flag("rescale_offset", False):
        raise InputError(f"{fields.where}: rescale_offset is true, but pixels are in 0..1 here")
    factor = fields.number("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise InputError(
            f"{fields.where}: rescale_factor is {factor}, but pixels are taken in 0..1 here, a "
            f"factor of 1/255"
        )
    for name in ("do_pad", "do_grayscale", "do_flip_channel_order"):
        if fields.flag(name, False):
            raise InputError(f"{fields.where}: {name} is true, which is not done here")


def _geometry(fields: Fields, defaults: dict[str, Any]) -> dict[str, Any]:
    if not fields.flag("do_resize", True):
        raise InputError(f"{fields.where}: do_resize is false, but pictures have any size")
    size = _size(fields, "size", defaults["size"], defaults["is_square"])
    crops = fields.flag("do_center_crop", defaults["do_center_crop"])
    if "shortest_edge" in size:
        if not crops:
            raise InputError(
                f"{fields.where}: size has a shortest_edge, but do_center_crop is false: pictures "
                f"would not be square"
            )
        short, mode = size["shortest_edge"], "center"
    else:
        short, mode = size["height"], "squash"
    if not crops:
        return {"image_size": short, "crop_mode": mode}
    crop = _size(fields, "crop_size", defaults.get("crop_size", size), True)
    if "height" not in crop:
        raise fields.error("crop_size", "a height and a width")
    if crop["height"] > short:
        raise InputError(
            f"{fields.where}: crop_size {crop['height']} is more than size {short}: pictures would "
            f"be padded, which is not done here"
        )
    if mode == "squash" and crop["height"] < short:
        mode = "squash_center"
    return {
        "image_size": crop["height"],
        "crop_pct": _crop_pct(crop["height"], short),
        "crop_mode": mode,
    }


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
    if not all(is_whole(side) for side in value.values()):
        raise fields.error(name, "whole numbers of pixels")
    if len(set(value.values())) > 1:
        raise fields.error(name, "a square")
    return value


def _crop_pct(size: int, short: int) -> float:
    """The share for which int(size / share) is `short`: rounding may take one pixel off."""
    share = size / short
    while int(size / share) < short:
        share = math.nextafter(share, 0)
    return share


def _normalization(fields: Fields, defaults: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    if not fields.flag("do_normalize", True):
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return {
        "mean": fields.numbers("image_mean", defaults["image_mean"]),
        "std": fields.numbers("image_std", defaults["image_std"]),
    }


def _interpolation(fields: Fields, default: int) -> str:
    number = fields.get("resample", default)
    known = {int(method): method.name.lower() for method in Image.Resampling}
    if not is_whole(number, 0) or number not in known:
        names = ", ".join(f"{key} ({name})" for key, name in sorted(known.items()))
        raise fields.error("resample", f"a number of Pillow's: {names}")
    return known[number]
