"""What the model in a folder wants done to pictures, whoever wrote it down."""

import dataclasses

from etils import epath

from flora_jax.data.preprocessing import Preprocessing
from flora_jax.errors import InputError, did_you_mean
from flora_jax.io.files import write_json
from flora_jax.io.paths import user_path
from flora_jax.weights.hub import local_folder
from flora_jax.weights.metadata import image_processors
from flora_jax.weights.metadata.fields import Fields
from flora_jax.weights.metadata.kinds import is_whole
from flora_jax.weights.metadata.spec import CONFIG_FILE

PREPROCESSING_FILE = "preprocessing.json"


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
        return _own(Fields.read(path))
    config = folder / CONFIG_FILE
    fields = Fields.read(config) if config.exists() else None
    if fields and "architecture" in fields:
        return _checked(fields, _timm(fields))
    if processor := image_processors.processor_in(folder):
        model_type = fields.text("model_type", "") if fields else ""
        return _checked(processor, image_processors.read(processor, model_type))
    return None


def save_preprocessing(folder: epath.PathLike, preprocessing: Preprocessing) -> None:
    """Writes `preprocessing.json` beside a model; `read_preprocessing` reads it back."""
    write_json(user_path(folder) / PREPROCESSING_FILE, dataclasses.asdict(preprocessing))


def _own(fields: Fields) -> Preprocessing:
    defaults = {f.name: f.default for f in dataclasses.fields(Preprocessing)}
    for name in fields:
        if name not in defaults:
            hint = did_you_mean(name, defaults)
            raise InputError(f"{fields.where}: unknown field {name!r}{hint}")
    background = fields.get("background", list(Preprocessing.background))
    if not isinstance(background, list) or not all(is_whole(each, 0) for each in background):
        raise fields.error("background", "a list of whole numbers")
    values = {
        "image_size": fields.side("image_size"),
        "mean": fields.numbers("mean", Preprocessing.mean),
        "std": fields.numbers("std", Preprocessing.std),
        "crop_pct": fields.number("crop_pct", Preprocessing.crop_pct),
        "crop_mode": fields.text("crop_mode", Preprocessing.crop_mode),
        "interpolation": fields.text("interpolation", Preprocessing.interpolation),
        "background": tuple(background),
    }
    return _checked(fields, values)


def _timm(config: Fields) -> dict:
    """The fields of a Preprocessing; old files have no pretrained_cfg but its fields."""
    fields = config.within("pretrained_cfg") if "pretrained_cfg" in config else config
    arguments = config.within("model_args")
    crop_pct = fields.number("crop_pct", 0) or 0.875
    crop_mode = fields.text("crop_mode", "") or "center"
    if crop_mode == "border":
        raise InputError(
            f"{fields.where}: crop_mode 'border' pads pictures, which is not done here; set "
            f"'center' or 'squash' to go on without"
        )
    if crop_mode == "squash" and crop_pct < 1:
        crop_mode = "squash_center"
    if "img_size" in arguments:
        image_size = arguments.side("img_size")
    else:
        channels_and_size = fields.get("input_size", [3, 224, 224])
        if not isinstance(channels_and_size, list) or len(channels_and_size) != 3:
            raise fields.error("input_size", "channels, height and width")
        size = Fields(fields.where, {"input_size": channels_and_size[1:]})
        image_size = size.side("input_size")
    return {
        "image_size": image_size,
        "mean": fields.numbers("mean", (0.485, 0.456, 0.406)),
        "std": fields.numbers("std", (0.229, 0.224, 0.225)),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": fields.text("interpolation", "") or "bicubic",
        "background": (),
    }


def _checked(fields: Fields, values: dict) -> Preprocessing:
    try:
        return Preprocessing(**values)
    except InputError as error:
        raise InputError(f"{fields.where}: {error}") from error
