"""The config.json of timm: the network that its architecture's name and arguments make."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from flora_jax.errors import InputError, UnknownNetworkError
from flora_jax.models.spec import Spec
from flora_jax.models.swin_spec import SwinSpec, swin
from flora_jax.models.tiny_vit_spec import KERNEL_SIZE, TinyViTSpec, tiny_vit
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
    Kind,
    check_kinds,
    or_null,
)
from flora_jax.weights.metadata.strangers import kind_of_model

_SIZES: dict[str, tuple[int, int, int, float]] = {  # width, depth, heads, MLP ratio
    "tiny": (192, 12, 3, 4),
    "xsmall": (256, 10, 4, 4),
    "small": (384, 12, 6, 4),
    "small_plus": (384, 12, 6, 4),
    "medium": (512, 12, 8, 4),
    "betwixt": (640, 12, 10, 4),
    "base": (768, 12, 12, 4),
    "large": (1024, 24, 16, 4),
    "so400m": (1152, 27, 16, 3.7362),
    "huge": (1280, 32, 16, 4),
    "huge_plus": (1280, 32, 20, 4),
    "giant": (1408, 40, 16, 48 / 11),
    "giantopt": (1536, 40, 16, 4),
    "gigantic": (1664, 48, 16, 64 / 13),
    "7b": (4096, 40, 32, 2),
}
_PLAIN = re.compile(r"(vit|deit3?)_([a-z0-9]+(?:_plus)?)(_distilled)?_patch(\d+)_(.*)")
_SWIN = re.compile(r"swin_([a-z]+)_patch(\d+)_window(\d+)_(\d+)")
_TINY_VIT = re.compile(r"tiny_vit_(\d+m)_(\d+)")
_POOLS = {"token": "token", "avg": "mean", "map": "attention"}
_KINDS: dict[str, Kind] = {
    "model_args": OBJECT,
    "pretrained_cfg": OBJECT,
    "input_size": SIZES,
    "depths": SIZES,
    "init_values": or_null(NUMBER),
    "act_layer": or_null(TEXT),
    **dict.fromkeys(("fc_norm", "use_fc_norm"), or_null(FLAG)),
    **dict.fromkeys(("architecture", "global_pool"), TEXT),
    **dict.fromkeys(("num_classes", "reg_tokens", "num_reg_tokens"), COUNT),
    **dict.fromkeys(("embed_dims", "window_sizes"), SIZES),
    **dict.fromkeys(("embed_dim", "depth", "in_chans", "local_conv_size"), SIZE),
    **dict.fromkeys(("img_size", "patch_size", "window_size", "num_heads"), SIZE_OR_SIZES),
    **dict.fromkeys(("mlp_ratio", "mbconv_expand_ratio", "layer_norm_eps"), NUMBER),
    **dict.fromkeys(
        (
            *("qkv_bias", "class_token", "no_embed_class", "pre_norm", "swiglu_mlp"),
            *("use_abs_pos_emb", "ape", "patch_norm", "absolute_pos_embed"),
        ),
        FLAG,
    ),
}
# Arguments of training, or of other sizes at run time, which change no network.
_WITHOUT_EFFECT = re.compile(
    r".*drop_rate|dynamic_img_(size|pad)|strict_img_size|weight_init|fix_init|head_init_scale"
    r"|rope_(shift|jitter|rescale)_coords|fused_attn|pretrained.*|checkpoint_path"
)


def spec_of_config(config: Mapping[str, Any]) -> Spec:
    """The spec of the network that a config.json of timm describes.

    `architecture` says most of it; `model_args`, then `num_classes`, `global_pool` and
    `pretrained_cfg.input_size` beside it say what is different.

    Raises:
      UnknownNetworkError: an architecture or an argument that is not known here.
      InputError: a network that this library cannot build, or a field of another kind of value
        than timm writes; says which.
    """
    config = {key: value for key, value in config.items() if value is not None}
    check_kinds(config, _KINDS)
    name = config.get("architecture", "").partition(".")[0]
    arguments = dict(config.get("model_args", {}))
    check_kinds(arguments, _KINDS, at="model_args.")
    pretrained = {k: v for k, v in config.get("pretrained_cfg", {}).items() if v is not None}
    check_kinds(pretrained, _KINDS, at="pretrained_cfg.")
    for key in ("num_classes", "global_pool"):
        if key in config:
            arguments.setdefault(key, config[key])
    if "num_classes" in pretrained:
        arguments.setdefault("num_classes", pretrained["num_classes"])
    if "input_size" in pretrained:
        arguments.setdefault("img_size", pretrained["input_size"][-2:])
    arguments = {k: v for k, v in arguments.items() if not _WITHOUT_EFFECT.fullmatch(k)}
    if match := _SWIN.fullmatch(name):
        return _swin(match, name, arguments)
    if match := _TINY_VIT.fullmatch(name):
        return _tiny_vit(match, name, arguments)
    match = _PLAIN.fullmatch(name)
    if match is None or match[2] not in _SIZES:
        if kind := kind_of_model(name):
            raise UnknownNetworkError(
                f"architecture {name!r} is {kind}; read are vision transformers"
            )
        raise UnknownNetworkError(
            f"unknown architecture {name!r}; known of timm: vit_*, deit_*, deit3_* and swin_* with "
            f"plain blocks, and tiny_vit_*; such as vit_base_patch16_224, vit_base_patch14_dinov2, "
            f"vit_base_patch16_dinov3, vit_base_patch16_siglip_224, vit_base_patch16_clip_224"
        )
    family, size, distilled, patch_size, variant = match.groups()
    defaults = _defaults(family, size, variant) | {"patch_size": int(patch_size)}
    if distilled:
        defaults["distilled"] = True
    return _vit(defaults | _renamed(arguments, name))


def _defaults(family: str, size: str, variant: str) -> dict[str, Any]:
    """What the name says, as timm's arguments."""
    width, depth, num_heads, mlp_ratio = _SIZES[size]
    found: dict[str, Any] = {
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
        "img_size": _image_size(variant),
    }
    if family == "deit3":
        return found | {"no_embed_class": True, "init_values": 1e-6}
    if match := re.fullmatch(r"(reg\d+_)?dinov2", variant):
        found |= {"init_values": 1e-5, "img_size": 518}
        if match[1]:
            found |= {"reg_tokens": int(match[1][3:-1]), "no_embed_class": True}
        if size == "giant":
            found |= {"embed_dim": 1536, "num_heads": 24, "swiglu_mlp": True}
            found["mlp_ratio"] = 4096 / 1536
        return found
    if match := re.fullmatch(r"dinov3(_qkvb)?", variant):
        return found | {
            "img_size": 256,
            "qkv_bias": match[1] is not None,
            "k_bias": match[1] is None,
            "init_values": 1e-5,
            "rope": True,
            "use_abs_pos_emb": False,
            "reg_tokens": 4,
            "fc_norm": False,
            "global_pool": "avg",
            "layer_norm_eps": 1e-5,
            "swiglu_mlp": size in ("small_plus", "huge_plus", "7b"),
        }
    if match := re.fullmatch(r"clip(_quickgelu)?_\d+", variant):
        act = "quick_gelu" if match[1] else "gelu"
        return found | {"pre_norm": True, "layer_norm_eps": 1e-5, "act_layer": act}
    if match := re.fullmatch(r"siglip(_gap)?_\d+", variant):
        found |= {"class_token": False, "global_pool": "avg" if match[1] else "map"}
        return found | ({"fc_norm": False} if match[1] else {})
    if re.fullmatch(r"\d+", variant):
        return found
    raise UnknownNetworkError(f"unknown kind of {family}: {variant!r} in its architecture's name")


def _renamed(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """What DINOv3's class calls otherwise, under the names of timm's plain ViT."""
    others = {"num_reg_tokens": "reg_tokens", "use_fc_norm": "fc_norm", "in_chans": "in_channels"}
    found = {others.get(key, key): value for key, value in arguments.items()}
    known = {
        *("img_size", "patch_size", "in_channels", "num_classes", "global_pool", "embed_dim"),
        *("depth", "num_heads", "mlp_ratio", "qkv_bias", "init_values", "class_token"),
        *("no_embed_class", "reg_tokens", "pre_norm", "fc_norm", "act_layer", "swiglu_mlp"),
        "use_abs_pos_emb",
    }
    if odd := sorted(found.keys() - known):
        raise _unknown_arguments(name, odd)
    return found


def _vit(arguments: dict[str, Any]) -> ViTSpec:
    """A spec out of timm's arguments."""
    check_kinds(arguments, {"num_heads": SIZE}, at="model_args.")
    is_rotary = arguments.get("rope", False)
    pool = arguments.get("global_pool", "token")
    if pool not in _POOLS:
        raise InputError(f"global_pool {pool!r} is unknown; choose one of {', '.join(_POOLS)}")
    fc_norm = arguments.get("fc_norm")
    if fc_norm and pool != "avg":
        raise InputError(f"fc_norm is true, but global_pool is {pool!r}: only 'avg' has it here")
    positions = "patches" if arguments.get("no_embed_class", False) else "all"
    is_gated = arguments.get("swiglu_mlp", False)
    pre_norm = arguments.get("pre_norm", False)
    return ViTSpec(
        image_size=_side(arguments, "img_size"),
        patch_size=_side(arguments, "patch_size"),
        embed_dim=arguments["embed_dim"],
        depth=arguments["depth"],
        num_heads=arguments["num_heads"],
        mlp_ratio=arguments["mlp_ratio"],
        num_classes=arguments.get("num_classes", 1000),
        in_channels=arguments.get("in_channels", 3),
        qkv_bias=arguments.get("qkv_bias", True),
        k_bias=arguments.get("k_bias", True),
        distilled=arguments.get("distilled", False),
        class_token=arguments.get("class_token", True),
        pool=_POOLS[pool],
        fc_norm=pool != "avg" or fc_norm in (None, True),
        num_registers=arguments.get("reg_tokens", 0),
        positions=positions if arguments.get("use_abs_pos_emb", True) else "none",
        rope_theta=100.0 if is_rotary else None,
        pre_norm=pre_norm,
        patch_bias=not pre_norm,
        activation="silu" if is_gated else arguments.get("act_layer") or "gelu",
        gated_mlp=is_gated,
        layer_norm_eps=arguments.get("layer_norm_eps", 1e-6),
        layer_scale=arguments.get("init_values") is not None,
    )


def _swin(match: re.Match, name: str, arguments: dict[str, Any]) -> SwinSpec:
    size, patch_size, window_size, image_size = match.groups()
    fields: dict[str, Any] = {
        "img_size": int(image_size),
        "window_size": int(window_size),
        "patch_size": int(patch_size),
    } | arguments
    fields |= {key: _side(fields, key) for key in ("img_size", "window_size", "patch_size")}
    fields.pop("global_pool", None)
    if (activation := fields.pop("act_layer", None) or "gelu") != "gelu":
        raise InputError(f"act_layer is {activation!r}, but a Swin has 'gelu' here")
    names = {"img_size": "image_size", "in_chans": "in_channels", "ape": "absolute_pos_embed"}
    fields = {names.get(key, key): value for key, value in fields.items()}
    if odd := sorted(fields.keys() - {field.name for field in dataclasses.fields(SwinSpec)}):
        raise _unknown_arguments(name, odd)
    if size == "large":
        large: dict[str, Any] = {
            "embed_dim": 192,
            "depths": (2, 2, 18, 2),
            "num_heads": (6, 12, 24, 48),
        }
        return SwinSpec(**large | fields)
    return swin(size, **fields)


def _tiny_vit(match: re.Match, name: str, arguments: dict[str, Any]) -> TinyViTSpec:
    size, image_size = match.groups()
    fields = {"img_size": int(image_size)} | arguments
    fields["img_size"] = _side(fields, "img_size")
    only = {"global_pool": "avg", "act_layer": "gelu", "local_conv_size": KERNEL_SIZE}
    for key, value in only.items():
        if (given := fields.pop(key, None) or value) != value:
            raise InputError(f"{key} is {given!r}, but a TinyViT has {value!r} here")
    names = {"img_size": "image_size", "in_chans": "in_channels"}
    fields = {names.get(key, key): value for key, value in fields.items()}
    if odd := sorted(fields.keys() - {field.name for field in dataclasses.fields(TinyViTSpec)}):
        raise _unknown_arguments(name, odd)
    named = tiny_vit(
        size, int(image_size)
    )  # its windows are those of the name, whatever the images
    return dataclasses.replace(named, blocks=(), **fields)


def _unknown_arguments(name: str, odd: list[str]) -> UnknownNetworkError:
    return UnknownNetworkError(
        f"model_args of {name} have {', '.join(odd)}, which is not known here"
    )


def _side(arguments: dict[str, Any], name: str) -> int:
    value = arguments[name]
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise InputError(f"{name} is {value}, but images, patches and windows are square here")
    return sides.pop()


def _image_size(variant: str) -> int:
    sizes = re.findall(r"\d+", variant)
    return int(sizes[-1]) if sizes else 224
