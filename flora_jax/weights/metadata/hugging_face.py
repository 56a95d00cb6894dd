"""The config.json of transformers: what network its weights belong to."""

from collections.abc import Callable, Mapping
from typing import Any

from flora_jax.errors import InputError, UnknownNetworkError, unknown
from flora_jax.models.spec import Spec
from flora_jax.models.swin_spec import SwinSpec
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.metadata.kinds import (
    COUNT,
    FLAG,
    NUMBER,
    OBJECT,
    SIZE,
    SIZE_OR_SIZES,
    SIZES,
    TEXT,
    TEXTS,
    Kind,
    check_kinds,
)
from flora_jax.weights.metadata.strangers import kind_of_model

Config = Mapping[str, Any]

# Fields of a spec that a file may leave to transformers' defaults, by their names there.
_SAID_AS = {
    "num_heads": ("num_attention_heads", "num_heads"),
    "layer_norm_eps": ("layer_norm_eps",),
    "activation": ("hidden_act",),
    "rope_theta": ("rope_theta", "rope_parameters"),
    "image_size": ("image_size",),
    "window_size": ("window_size",),
}

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
_CLASSIFIER = "ForImageClassification"
_KINDS: dict[str, Kind] = {
    "architectures": TEXTS,
    "hidden_act": TEXT,
    "id2label": OBJECT,
    "rope_parameters": OBJECT,
    "vision_config": OBJECT,
    "depths": SIZES,
    "num_heads": SIZE_OR_SIZES,
    "image_size": SIZE_OR_SIZES,
    "patch_size": SIZE_OR_SIZES,
    **dict.fromkeys(("num_labels", "num_register_tokens"), COUNT),
    **dict.fromkeys(("layer_norm_eps", "mlp_ratio", "rope_theta"), NUMBER),
    **dict.fromkeys(
        (
            *("embed_dim", "hidden_size", "num_hidden_layers", "num_attention_heads"),
            *("intermediate_size", "num_channels", "window_size"),
        ),
        SIZE,
    ),
    **dict.fromkeys(
        (
            *("qkv_bias", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"),
            *("use_swiglu_ffn", "use_gated_mlp", "use_absolute_embeddings", "vision_use_head"),
        ),
        FLAG,
    ),
}


def spec_of_config(config: Config) -> Spec:
    """The spec of the network that a config.json of transformers describes.

    Of a model for images and texts it is that of the images' network. A field that the file leaves
    out has the default it has in transformers. Without a classifier among the `architectures` the
    network has none: it gives its pooled feature. What is null says nothing.

    Raises:
      UnknownNetworkError: another model_type.
      InputError: a network that this library cannot build, or a field of another kind of value
        than transformers writes; says which.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _READERS:
        if kind := kind_of_model(str(model_type)):
            raise UnknownNetworkError(
                f"model_type {model_type!r} is {kind}; read are vision transformers: "
                f"{', '.join(_READERS)}"
            )
        raise UnknownNetworkError(unknown("model_type", str(model_type), _READERS))
    said = _said(config)
    check_kinds(said, _KINDS)
    check_kinds(_said(said.get("vision_config", {})), _KINDS, at="vision_config.")
    return _READERS[model_type](said)


def says(config: Config, field: str) -> bool:
    """Whether the file itself says this field of its spec, and no default of transformers."""
    said = _said(_of_images(_said(config)))
    return field not in _SAID_AS or any(name in said for name in _SAID_AS[field])


def _said(config: Config) -> Config:
    return {name: value for name, value in config.items() if value is not None}


def _of_images(config: Config) -> Config:
    """The part of a model for images and texts that its images' network is in."""
    return config.get("vision_config", config)


def _vit(config: Config) -> ViTSpec:
    return ViTSpec(
        **_sizes(config, layer_norm_eps=1e-12), num_classes=_num_classes(config), **_mlp(config)
    )


def _deit(config: Config) -> ViTSpec:
    """Where nobody classifies the distillation token, it is a register."""
    distilled = _class_of(config).endswith("WithTeacher")
    return ViTSpec(
        **_sizes(config, layer_norm_eps=1e-12),
        **_mlp(config),
        num_classes=_num_classes(config),
        distilled=distilled,
        num_registers=0 if distilled else 1,
    )


def _dinov2(config: Config) -> ViTSpec:
    width, mlp_ratio = config.get("hidden_size", 768), config.get("mlp_ratio", 4)
    mlp: dict[str, Any] = {"mlp_ratio": mlp_ratio, "activation": _activation(config, "gelu")}
    if config.get("use_swiglu_ffn", False):
        hidden = (int(int(width * mlp_ratio) * 2 / 3) + 7) // 8 * 8
        mlp = {"mlp_ratio": hidden / width, "activation": "silu", "gated_mlp": True}
    registers = {}
    if config["model_type"] == "dinov2_with_registers":
        registers = {
            "num_registers": config.get("num_register_tokens", 4),
            "positions": "patches",
        }
    num_classes = _num_classes(config)
    return ViTSpec(
        **_sizes(config, patch_size=14, layer_norm_eps=1e-6),
        **mlp,
        **registers,
        num_classes=num_classes,
        pool="token_and_mean" if num_classes else "token",
        layer_scale=True,
    )


def _dinov3(config: Config) -> ViTSpec:
    for name in ("proj_bias", "mlp_bias"):
        if not config.get(name, True):
            raise InputError(f"{name} is false: these layers always have a bias here")
    if _num_classes(config):
        raise InputError(f"{_class_of(config)} is no class that this library knows the pool of")
    biases = [config.get(f"{name}_bias", name != "key") for name in ("query", "key", "value")]
    if biases[0] != biases[2] or (biases[1] and not biases[0]):
        raise InputError(
            "query_bias, key_bias and value_bias are {}, {} and {}; query and value must be alike, "
            "and only with them can the key have one".format(*biases)
        )
    rope = _said(config.get("rope_parameters", {}))
    check_kinds(rope, _KINDS, at="rope_parameters.")
    sizes = _sizes(config, hidden_size=384, num_attention_heads=6, layer_norm_eps=1e-5)
    return ViTSpec(
        **sizes | {"qkv_bias": biases[0]},
        **_mlp(config, hidden_size=384),
        num_classes=0,
        k_bias=biases[1] or not biases[0],
        gated_mlp=config.get("use_gated_mlp", False),
        num_registers=config.get("num_register_tokens", 0),
        positions="none",
        rope_theta=float(config.get("rope_theta", rope.get("rope_theta", 100.0))),
        layer_scale=True,
    )


def _clip(config: Config) -> ViTSpec:
    if _num_classes(config):
        raise InputError(
            f"{_class_of(config)} averages tokens without a norm, which no spec here does; "
            f"CLIPVisionModel is the same network without the classifier"
        )
    config = _said(_of_images(config))
    return ViTSpec(
        **_sizes(config, patch_size=32, layer_norm_eps=1e-5),
        **_mlp(config, hidden_act="quick_gelu"),
        num_classes=0,
        pre_norm=True,
        patch_bias=False,
    )


def _siglip(config: Config) -> ViTSpec:
    num_classes = _num_classes(config)
    config = _said(_of_images(config))
    has_pool = bool(config.get("vision_use_head", True)) and not num_classes
    return ViTSpec(
        **_sizes(config, layer_norm_eps=1e-6),
        **_mlp(config, hidden_act="gelu_pytorch_tanh"),
        num_classes=num_classes,
        class_token=False,
        pool="attention" if has_pool else "mean",
        fc_norm=has_pool,  # it averages tokens that are normalised already
    )


def _swin(config: Config) -> SwinSpec:
    if (activation := _activation(config, "gelu")) != "gelu":
        raise InputError(f"hidden_act is {activation!r}, but a Swin has 'gelu' here")
    names = ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias")
    fields = {name: config[name] for name in (*names, "layer_norm_eps") if name in config}
    return SwinSpec(
        image_size=_side(config, "image_size", 224),
        patch_size=_side(config, "patch_size", 4),
        in_channels=config.get("num_channels", 3),
        num_classes=_num_classes(config),
        absolute_pos_embed=config.get("use_absolute_embeddings", False),
        **fields,
    )


_READERS: dict[str, Callable[[Config], Spec]] = {
    "vit": _vit,
    "deit": _deit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
    "clip": _clip,
    "clip_vision_model": _clip,
    "siglip": _siglip,
    "siglip_vision_model": _siglip,
    "swin": _swin,
}


def _sizes(config: Config, **defaults) -> dict[str, Any]:
    """The fields that every ViT has; `defaults` are under the names of transformers."""
    known = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    values = known | defaults | dict(config)
    return {
        "image_size": _side(config, "image_size", 224),
        "patch_size": _side(config, "patch_size", defaults.get("patch_size", 16)),
        "embed_dim": values["hidden_size"],
        "depth": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "in_channels": values.get("num_channels", 3),
        "qkv_bias": values.get("qkv_bias", True),
        "layer_norm_eps": values["layer_norm_eps"],
    }


def _mlp(config: Config, hidden_size: int = 768, hidden_act: str = "gelu") -> dict[str, Any]:
    width = config.get("hidden_size", hidden_size)
    hidden = config.get("intermediate_size", 4 * hidden_size)
    ratio = hidden // width if hidden % width == 0 else hidden / width
    return {"mlp_ratio": ratio, "activation": _activation(config, hidden_act)}


def _activation(config: Config, default: str) -> str:
    name = config.get("hidden_act", default)
    if name not in _ACTIVATIONS:
        raise InputError(unknown("hidden_act", name, _ACTIVATIONS))
    return _ACTIVATIONS[name]


def _side(config: Config, name: str, default: int) -> int:
    value = config.get(name, default)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise InputError(f"{name} is {value}, but images and patches are square here")
    return sides.pop()


def _class_of(config: Config) -> str:
    return (config.get("architectures") or [""])[0]


def _num_classes(config: Config) -> int:
    if _CLASSIFIER not in _class_of(config):
        return 0
    return len(config.get("id2label") or ()) or config.get("num_labels", 2)
