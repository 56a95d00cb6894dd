"""Specs of networks that a config.json of timm describes, by architecture and arguments."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flora_jax.errors import InputError, unknown
from flora_jax.models.spec import Spec, whole_patches
from flora_jax.models.swin_spec import SwinSpec, swin, swin_v2
from flora_jax.models.tiny_vit_spec import KERNEL_SIZE, TinyViTSpec, tiny_vit
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.metadata.fields import Fields

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
_FAMILIES = "vit_pe_core|vit|deit|deit3|eva02|beit|beitv2"  # of ViTs
_PROJECTIONS = (512, 640, 768, 1024, 1280)  # the widths of CLIP's joint spaces
_OF_CLIP = re.compile(r"openai|laion|datacomp|dfn|metaclip|tinyclip")
_POOLS = {"token": "token", "avg": "mean", "map": "attention"}


def _as(kind: Callable[[Fields, str], Any], *names: str, **renamed: str) -> dict[str, tuple]:
    """timm's arguments that are fields of a spec: their name there, and how they are read."""
    pairs = dict(zip(names, names, strict=True)) | renamed
    return {theirs: (ours, kind) for theirs, ours in pairs.items()}


_OF_ALL = (
    _as(Fields.side, img_size="image_size")
    | _as(Fields.size, in_chans="in_channels")
    | _as(Fields.count, "num_classes")
    | _as(Fields.number, "mlp_ratio")
)
_OF_VIT = (
    _OF_ALL
    | _as(Fields.side, "patch_size")
    | _as(Fields.size, "embed_dim", "depth", "num_heads")
    | _as(Fields.count, reg_tokens="num_registers", num_reg_tokens="num_registers")
    | _as(Fields.flag, "qkv_bias", "class_token", "pre_norm", swiglu_mlp="gated_mlp")
    | _as(Fields.flag, scale_mlp="mlp_norm", use_rel_pos_bias="relative_positions")
    | _as(Fields.text, act_layer="activation")
    | _as(Fields.flag, use_pre_transformer_norm="pre_norm")
    | _as(Fields.number, "layer_norm_eps", rope_temperature="rope_theta")
    | _as(Fields.number, rope_grid_offset="rope_offset", attn_pool_mlp_ratio="pool_mlp_ratio")
    | _as(Fields.size, attn_pool_num_heads="pool_num_heads")
    | _as(Fields.side, ref_feat_shape="rope_grid")
)
# Those of a ViT that say something of a spec together with others.
_ALSO_OF_VIT = {
    *("global_pool", "fc_norm", "use_fc_norm", "init_values", "no_embed_class", "use_abs_pos_emb")
}
_OF_SWIN = (
    _OF_ALL
    | _as(Fields.side, "patch_size", "window_size")
    | _as(Fields.size, "embed_dim")
    | _as(Fields.sizes, "depths", "num_heads")
    | _as(Fields.flag, "qkv_bias", "patch_norm", ape="absolute_pos_embed")
)
_OF_SWIN_V2 = _OF_SWIN | _as(Fields.counts, "pretrained_window_sizes")
_OF_TINY_VIT = (
    _OF_ALL
    | _as(Fields.sizes, "embed_dims", "depths", "num_heads", "window_sizes")
    | _as(Fields.number, "mbconv_expand_ratio")
)
# Arguments of training, or of other sizes at run time, which change no network.
_WITHOUT_EFFECT = re.compile(
    r".*drop_rate|dynamic_img_(size|pad)|strict_img_size|weight_init|fix_init|head_init_scale"
    r"|rope_(shift|jitter|rescale)_coords|fused_attn|qkv_fused|pretrained(?!_window).*"
    r"|checkpoint_path"
)


def spec_of_config(config: Fields) -> Spec:
    """The spec of the network that a config.json of timm describes.

    `architecture` says most of it; `model_args`, then `num_classes`, `global_pool` and
    `pretrained_cfg.input_size` beside it say what is different.

    Raises:
      InputError: an architecture or an argument that is not known here, a network that this
        library cannot build, or a field of another kind of value than timm writes; says which.
    """
    name = config.text("architecture").partition(".")[0]
    pretrained = config.within("pretrained_cfg")
    arguments: dict[str, Any] = {}
    if "input_size" in pretrained:
        arguments["img_size"] = pretrained.sizes("input_size")[-2:]
    if "num_classes" in pretrained:
        arguments["num_classes"] = pretrained["num_classes"]
    arguments |= {key: config[key] for key in ("num_classes", "global_pool") if key in config}
    arguments |= config.within("model_args")
    arguments = {k: v for k, v in arguments.items() if not _WITHOUT_EFFECT.fullmatch(k)}
    for pattern, read in _READERS.items():
        if match := re.fullmatch(pattern, name):
            spec = read(match, arguments)
            return dataclasses.replace(spec, outputs=_outputs(config, spec.num_classes))
    raise InputError(
        f"architecture {name!r} is not a vision transformer that flora_jax reads: accepted of timm "
        f"are vit_*, vit_pe_core_*, deit_*, deit3_*, eva02_*, beit_*, beitv2_*, swin_* and "
        f"swinv2_* with plain blocks, and tiny_vit_*, such as vit_base_patch16_224, "
        f"vit_base_patch14_dinov2, vit_base_patch16_siglip_224"
    )


def _outputs(config: Fields, number: int) -> str:
    """What the outputs of a head mean: CLIP's is the projection to what images and texts share.

    A file says so by the tag of weights that no classifier was trained on; where it has none, by
    the size of a published projection.
    """
    name, _, tag = config.text("architecture").partition(".")
    pretrained = config.within("pretrained_cfg")
    tag, published = tag or pretrained.text("tag", ""), pretrained.get("num_classes", number)
    is_trained = "_ft" in tag or published != number or "problem_type" in config
    is_trained |= any("label_names" in place for place in (config, pretrained))
    is_of_clip = _OF_CLIP.match(tag) or number in _PROJECTIONS
    has_texts = re.search("_clip_|_pe_core_", name) and is_of_clip
    return "embedding" if has_texts and not is_trained else config.problem()


def _read(
    name: str, arguments: Mapping[str, Any], known: Mapping, also: Collection[str] = ()
) -> tuple[Fields, dict[str, Any]]:
    """The arguments, and the fields of a spec that they are one by one."""
    if odd := sorted(arguments.keys() - known.keys() - {*also}):
        raise InputError(f"model_args of {name} have {', '.join(odd)}, which is not known here")
    given = Fields(arguments)
    return given, {ours: read(given, key) for key, (ours, read) in known.items() if key in given}


def _vit(match: re.Match, arguments: dict[str, Any]) -> ViTSpec:
    family, size, distilled, patch_size, variant = match.groups()
    defaults = _defaults(family, size, variant) | {"patch_size": int(patch_size)}
    k_bias = defaults.pop("k_bias", True)
    given, fields = _read(match[0], defaults | arguments, _OF_VIT, _ALSO_OF_VIT)
    fields["image_size"] = whole_patches(fields["image_size"], fields["patch_size"])
    width, ratio = fields["embed_dim"], fields["mlp_ratio"]
    if round(width * ratio) != int(width * ratio):
        fields["mlp_ratio"] = int(width * ratio) / width
    pool = given.text("global_pool", "token")
    if pool not in _POOLS:
        raise InputError(unknown("global_pool", pool, _POOLS))
    fc_norm = given.flag("use_fc_norm", given.flag("fc_norm", pool == "avg"))
    if fc_norm and pool != "avg":
        raise InputError(f"fc_norm is true, but global_pool is {pool!r}: only 'avg' has it here")
    positions = "patches" if given.flag("no_embed_class", False) else "all"
    if fields.get("gated_mlp"):
        fields["activation"] = "silu"
    return ViTSpec(
        **fields,
        distilled=distilled is not None,
        k_bias=k_bias,
        pool=_POOLS[pool],
        fc_norm=fc_norm or pool != "avg",
        positions=positions if given.flag("use_abs_pos_emb", True) else "none",
        patch_bias=not fields.get("pre_norm", False),
        layer_scale="init_values" in given,
    )


def _defaults(family: str, size: str, variant: str) -> dict[str, Any]:
    """What the name says, as timm's arguments, and `k_bias`, which is none."""
    if size not in _SIZES:
        raise InputError(unknown(f"size of {family}", size, _SIZES))
    width, depth, num_heads, mlp_ratio = _SIZES[size]
    image_sizes = re.findall(r"\d+", variant)
    found: dict[str, Any] = {
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
        "img_size": int(image_sizes[-1]) if image_sizes else 224,
    }
    if family in ("eva02", "beit", "beitv2", "vit_pe_core") and not variant.isdecimal():
        raise InputError(f"unknown kind of {family}: {variant!r} in its architecture's name")
    if family in ("beit", "beitv2"):
        return found | {
            "k_bias": False,
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": True,
            "init_values": 0.1,
            "global_pool": "avg",
        }
    if family == "vit_pe_core":
        found |= {
            "pre_norm": True,
            "rope_temperature": 10000.0,
            "ref_feat_shape": {"base": 14, "gigantic": 32}.get(size, 24),
            "rope_grid_offset": 1.0,
            "layer_norm_eps": 1e-5,
            "global_pool": "map",
            "attn_pool_num_heads": 8,
        }
        if size == "gigantic":
            found |= {"embed_dim": 1536, "depth": 50, "mlp_ratio": 8960 / 1536}
            found |= {"class_token": False, "rope_grid_offset": 0.0, "attn_pool_mlp_ratio": 4.0}
        return found
    if family == "eva02":
        return found | {
            "mlp_ratio": 8 / 3,
            "k_bias": False,
            "rope_temperature": 10000.0,
            "ref_feat_shape": 16,
            "global_pool": "avg",
            "swiglu_mlp": True,
            "scale_mlp": size in ("base", "large"),
        }
    if family == "deit3":
        return found | {"no_embed_class": True, "init_values": 1e-6}
    if match := re.fullmatch(r"(?:reg(\d+)_)?dinov2", variant):
        found |= {"init_values": 1e-5, "img_size": 518}
        if match[1]:
            found |= {"reg_tokens": int(match[1]), "no_embed_class": True}
        if size == "giant":
            found |= {"embed_dim": 1536, "num_heads": 24, "mlp_ratio": 4096 / 1536}
            found["swiglu_mlp"] = True
        return found
    if match := re.fullmatch(r"dinov3(_qkvb)?", variant):
        return found | {
            "img_size": 256,
            "qkv_bias": match[1] is not None,
            "k_bias": match[1] is None,
            "init_values": 1e-5,
            "rope_temperature": 100.0,
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
    raise InputError(f"unknown kind of {family}: {variant!r} in its architecture's name")


def _swin(match: re.Match, arguments: dict[str, Any]) -> SwinSpec:
    size, patch_size, window_size, image_size = match.groups()
    defaults = {"img_size": image_size, "window_size": window_size, "patch_size": patch_size}
    arguments = {key: int(value) for key, value in defaults.items()} | arguments
    _, fields = _read(match[0], _without(arguments, "Swin", act_layer="gelu"), _OF_SWIN)
    return swin(size, **fields)


def _swin_v2(match: re.Match, arguments: dict[str, Any]) -> SwinSpec:
    """A name such as window12to16_192to256 says on what it was trained first."""
    size, window_before, window_size, image_before, image_size = match.groups()
    arguments = {"img_size": int(image_size), "window_size": int(window_size)} | arguments
    if window_before and image_before:
        grids = [int(image_before) // 4 // 2**stage for stage in range(4)]
        windows = [min(int(window_before), grid) for grid in grids]
        arguments = {"pretrained_window_sizes": windows} | arguments
    _, fields = _read(match[0], _without(arguments, "Swin V2", act_layer="gelu"), _OF_SWIN_V2)
    if not any(fields.get("pretrained_window_sizes", ())):
        fields["pretrained_window_sizes"] = ()
    return swin_v2(size, **fields)


def _tiny_vit(match: re.Match, arguments: dict[str, Any]) -> TinyViTSpec:
    size, image_size = match.groups()
    only = {"act_layer": "gelu", "local_conv_size": KERNEL_SIZE}
    _, fields = _read(match[0], _without(arguments, "TinyViT", **only), _OF_TINY_VIT)
    named = tiny_vit(size, int(image_size))  # its windows are the name's, whatever the images
    return dataclasses.replace(named, blocks=(), **fields)


def _without(arguments: dict[str, Any], title: str, **only: Any) -> dict[str, Any]:
    """The arguments less those that have one value here, which these are checked to have."""
    for key, value in (only | {"global_pool": "avg"}).items():
        if (given := arguments.get(key) or value) != value:
            raise InputError(f"{key} is {given!r}, but a {title} has {value!r} here")
    return {k: v for k, v in arguments.items() if k not in only and k != "global_pool"}


_READERS: dict[str, Callable[[re.Match, dict[str, Any]], Spec]] = {
    r"swin_([a-z]+)_patch(\d+)_window(\d+)_(\d+)": _swin,
    r"swinv2_([a-z]+)_window(?:(\d+)to)?(\d+)_(?:(\d+)to)?(\d+)": _swin_v2,
    r"tiny_vit_(\d+m)_(\d+)": _tiny_vit,
    rf"({_FAMILIES})_([a-z0-9]+(?:_plus)?)(_distilled)?_patch(\d+)_(.*)": _vit,
}
