"""Specs of networks that a config.json of transformers describes."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flora_jax.errors import InputError, did_you_mean, unknown
from flora_jax.models.spec import Spec, whole_patches
from flora_jax.models.swin_spec import SwinSpec
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.metadata.fields import Fields

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}


def spec_of_config(config: Fields) -> Spec:
    """The spec of the network that a config.json of transformers describes.

    Of a model for images and texts it is that of the images' network. A field that the file leaves
    out has the default it has in transformers. Without a classifier among the `architectures` the
    network has none: it gives its pooled feature.

    Raises:
      InputError: another model_type, a network that this library cannot build, or a field of
        another kind of value than transformers writes; says which.
    """
    model_type = str(config.get("model_type"))
    if method := config.within("quantization_config").get("quant_method"):
        raise InputError(f"its weights are quantised ({method}); read are float16 to float32")
    if model_type not in _READERS:
        raise InputError(
            f"model_type {model_type!r} is not a vision transformer that flora_jax reads: accepted "
            f"are {', '.join(_READERS)}{did_you_mean(model_type, _READERS)}"
        )
    return _READERS[model_type](config)


def _of_images(config: Fields) -> Fields:
    """The part of a model for images and texts that its images' network is in."""
    return config.within("vision_config") if "vision_config" in config else config


def _vit(config: Fields) -> ViTSpec:
    return ViTSpec(**_plain(config, layer_norm_eps=1e-12), **_head(config))


def _deit(config: Fields) -> ViTSpec:
    """Where nobody classifies the distillation token, it is a register."""
    distilled = _class_of(config).endswith("WithTeacher")
    own = {"distilled": True} if distilled else {"num_registers": 1}
    return dataclasses.replace(_vit(config), blocks=(), **own)


def _beit(config: Fields) -> ViTSpec:
    """A table of biases that all blocks share becomes one of each."""
    shared, own = (config.flag(f"use_{w}relative_position_bias", False) for w in ("shared_", ""))
    if shared and own:
        raise InputError("relative position biases are shared and of each block: one of them here")
    has_positions = config.flag("use_absolute_position_embeddings", False)
    return ViTSpec(
        **_plain(config, layer_norm_eps=1e-12),
        **_head(config),
        k_bias=False,
        pool="mean" if config.flag("use_mean_pooling", True) else "token",
        positions="all" if has_positions else "none",
        relative_positions=shared or own,
        layer_scale=config.number("layer_scale_init_value", 0.1) > 0,
    )


def _dinov2(config: Fields) -> ViTSpec:
    fields = _plain(config, layer_norm_eps=1e-6, patch_size=14)
    mlp_ratio = fields["mlp_ratio"] = config.number("mlp_ratio", 4)
    if config.flag("use_swiglu_ffn", False):
        hidden = (int(int(fields["embed_dim"] * mlp_ratio) * 2 / 3) + 7) // 8 * 8
        fields |= {"mlp_ratio": hidden / fields["embed_dim"], "activation": "silu"}
        fields["gated_mlp"] = True
    if config["model_type"] == "dinov2_with_registers":
        fields |= {"num_registers": config.count("num_register_tokens", 4), "positions": "patches"}
    head = _head(config)
    pool = "token_and_mean" if head["num_classes"] else "token"
    return ViTSpec(**fields, **head, pool=pool, layer_scale=True)


def _dinov3(config: Fields) -> ViTSpec:
    if not (config.flag("proj_bias", True) and config.flag("mlp_bias", True)):
        raise InputError("proj_bias or mlp_bias is false: these layers always have a bias here")
    if _head(config)["num_classes"]:
        raise InputError(f"{_class_of(config)} is no class that this library knows the pool of")
    query, key, value = (config.flag(f"{n}_bias", n != "key") for n in ("query", "key", "value"))
    if query != value or (key and not query):
        raise InputError(
            f"query_bias, key_bias and value_bias are {query}, {key} and {value}; query and value "
            f"must be alike, and only with them can the key have one"
        )
    fields = _plain(config, layer_norm_eps=1e-5, embed_dim=384, num_heads=6)
    rope_theta = config.within("rope_parameters").number("rope_theta", 100.0)
    return ViTSpec(
        **fields | {"qkv_bias": query},
        num_classes=0,
        k_bias=key or not query,
        gated_mlp=config.flag("use_gated_mlp", False),
        num_registers=config.count("num_register_tokens", 0),
        positions="none",
        rope_theta=float(config.number("rope_theta", rope_theta)),
        layer_scale=True,
    )


def _clip(config: Fields) -> ViTSpec:
    """Its class with projection, and that for images and texts, embed images in one space."""
    if _head(config)["num_classes"]:
        raise InputError(
            f"{_class_of(config)} averages tokens without a norm, which no spec here does; "
            f"CLIPVisionModel is the same network without the classifier"
        )
    fields = _plain(_of_images(config), layer_norm_eps=1e-5, patch_size=32, activation="quick_gelu")
    head: dict[str, Any] = {"num_classes": 0}
    if _class_of(config) in ("CLIPVisionModelWithProjection", "CLIPModel"):
        head = {"num_classes": config.size("projection_dim", 512)}
        head |= {"outputs": "embedding", "head_bias": False}
    return ViTSpec(**fields, **head, pre_norm=True, patch_bias=False)


def _siglip(config: Fields) -> ViTSpec:
    head = _head(config)
    config = _of_images(config)
    has_pool = config.flag("vision_use_head", True) and not head["num_classes"]
    return ViTSpec(
        **_plain(config, layer_norm_eps=1e-6, activation="gelu_pytorch_tanh"),
        **head,
        class_token=False,
        pool="attention" if has_pool else "mean",
        fc_norm=has_pool,  # it averages tokens that are normalised already
    )


def _swin(config: Fields) -> SwinSpec:
    if (activation := _activation(config, "gelu")) != "gelu":
        raise InputError(f"hidden_act is {activation!r}, but a Swin has 'gelu' here")
    return SwinSpec(
        image_size=config.side("image_size", 224),
        patch_size=config.side("patch_size", 4),
        in_channels=config.size("num_channels", 3),
        **_head(config),
        embed_dim=config.size("embed_dim", 96),
        depths=config.sizes("depths", (2, 2, 6, 2)),
        num_heads=config.sizes("num_heads", (3, 6, 12, 24)),
        window_size=config.size("window_size", 7),
        mlp_ratio=config.number("mlp_ratio", 4),
        qkv_bias=config.flag("qkv_bias", True),
        absolute_pos_embed=config.flag("use_absolute_embeddings", False),
        layer_norm_eps=config.number("layer_norm_eps", 1e-5),
    )


def _swin_v2(config: Fields) -> SwinSpec:
    windows = config.counts("pretrained_window_sizes", ())
    return dataclasses.replace(
        _swin(config),
        post_norm=True,
        cosine_attention=True,
        k_bias=False,
        pretrained_window_sizes=windows if any(windows) else (),
    )


_READERS: dict[str, Callable[[Fields], Spec]] = {
    "vit": _vit,
    "deit": _deit,
    "beit": _beit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
    "clip": _clip,
    "clip_vision_model": _clip,
    "siglip": _siglip,
    "siglip_vision_model": _siglip,
    "swin": _swin,
    "swinv2": _swin_v2,
}


def _plain(
    config: Fields,
    layer_norm_eps: float,
    patch_size: int = 16,
    embed_dim: int = 768,
    num_heads: int = 12,
    activation: str = "gelu",
) -> dict[str, Any]:
    """The fields that every ViT has; the arguments are the defaults of its kind."""
    width = config.size("hidden_size", embed_dim)
    hidden = config.size("intermediate_size", 4 * embed_dim)
    patch_size = config.side("patch_size", patch_size)
    return {
        "image_size": whole_patches(config.side("image_size", 224), patch_size),
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": config.size("num_hidden_layers", 12),
        "num_heads": config.size("num_attention_heads", num_heads),
        "in_channels": config.size("num_channels", 3),
        "qkv_bias": config.flag("qkv_bias", True),
        "layer_norm_eps": config.number("layer_norm_eps", layer_norm_eps),
        "mlp_ratio": hidden // width if hidden % width == 0 else hidden / width,
        "activation": _activation(config, activation),
    }


def _activation(config: Fields, default: str) -> str:
    name = config.text("hidden_act", default)
    if name not in _ACTIVATIONS:
        raise InputError(unknown("hidden_act", name, _ACTIVATIONS))
    return _ACTIVATIONS[name]


def _class_of(config: Fields) -> str:
    return (*config.texts("architectures", ()), "")[0]


def _head(config: Fields) -> dict[str, Any]:
    """How many outputs there are, and what they mean."""
    if "ForImageClassification" not in _class_of(config):
        return {"num_classes": 0}
    number = len(config.within("id2label")) or config.count("num_labels", 2)
    return {"num_classes": number, "outputs": config.problem()}
