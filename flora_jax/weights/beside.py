"""What the file beside the weights says of their network, held against the spec.

Heads, the eps of norms, the activation and the sides of an image leave no trace in names and
shapes: read with another of them, weights make another network in silence. What a file does not
say is not checked. Another resolution or window is no contradiction, for positions are
interpolated; nor are other classes.
"""

import dataclasses
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from etils import epath

from flora_jax.errors import InputError
from flora_jax.io.files import read_json
from flora_jax.models.spec import Spec
from flora_jax.models.swin_spec import SwinSpec, swin
from flora_jax.models.vit_spec import deit
from flora_jax.weights.folder import SPEC_FILE, WEIGHTS_FILE, load_spec

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
_ACTIVATION = "gelu"  # by the error function, as transformers and timm call it

# A file's name of a fact -> ours.
_HUGGING_FACE = {
    "hidden_act": "activation",
    "layer_norm_eps": "layer_norm_eps",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "in_channels",
    "qkv_bias": "qkv_bias",
}
_HUGGING_FACE_VIT = _HUGGING_FACE | {
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
}
_HUGGING_FACE_SWIN = _HUGGING_FACE | {
    "embed_dim": "embed_dim",
    "depths": "depths",
    "num_heads": "num_heads",
    "window_size": "window_size",
    "mlp_ratio": "mlp_ratio",
    "use_absolute_embeddings": "absolute_pos_embed",
}
_TIMM = {
    "num_features": "num_features",
    "model_args.act_layer": "activation",
    "model_args.img_size": "image_size",
    "pretrained_cfg.input_size": "image_size",
    "model_args.patch_size": "patch_size",
    "model_args.in_chans": "in_channels",
    "model_args.embed_dim": "embed_dim",
    "model_args.num_heads": "num_heads",
    "model_args.mlp_ratio": "mlp_ratio",
    "model_args.qkv_bias": "qkv_bias",
}
_TIMM_VIT = _TIMM | {
    "global_pool": "pool",
    "model_args.depth": "depth",
    "model_args.class_token": "class_token",
}
_TIMM_SWIN = _TIMM | {"model_args.depths": "depths", "model_args.window_size": "window_size"}

_MODEL_TYPES = {"vit": ("vit", "deit"), "swin": ("swin",)}
_ARCHITECTURES = {"vit": ("vit_", "deit_", "deit3_"), "swin": ("swin_",)}
# An architecture of timm whose heads and eps are those of `deit` or `swin` of that size.
_PLAIN = re.compile(r"(vit|deit|swin)_(tiny|small|base)(_distilled)?_patch\d+(_window\d+)?_\d+$")
_INTERPOLATED = ("image_size", "window_size")
_SYNONYMS: dict[str, dict[object, object]] = {
    "activation": {"gelu_python": _ACTIVATION},
    "pool": {"avg": "mean"},
}


class Claim(NamedTuple):
    """What a file says of a network: its own name of the fact, our name, and the value."""

    said_as: str
    fact: str
    value: object


def check_description(path: epath.Path, spec: Spec, strict: bool) -> None:
    """Compares the spec with the `spec.json` or `config.json` beside a file, or in our own folder.

    Raises:
      InputError: they contradict each other, which is a warning where not `strict`; names both
        values.
    """
    folder = path if path.is_dir() else path.parent
    if path in (folder, folder / WEIGHTS_FILE) and (folder / SPEC_FILE).exists():
        file, claims = folder / SPEC_FILE, _claims_of_spec(load_spec(folder), spec.family)
    elif (folder / CONFIG_FILE).is_file():
        file = folder / CONFIG_FILE
        claims = _claims_of_config(read_json(file), spec.family)
    else:
        return
    facts, contradictions = _facts(spec), []
    for said_as, fact, said in claims:
        value = _normalised(fact, said)
        if fact not in facts or value == facts[fact]:
            continue
        if fact in _INTERPOLATED and isinstance(value, int):
            log.info("%s: %s is %s, and %s in the spec", file, said_as, said, facts[fact])
        else:
            ours = "" if fact == said_as else f"{fact} "
            contradictions.append(f"{said_as} is {said!r}, and {ours}{facts[fact]!r} in the spec")
    if not contradictions:
        return
    message = f"{file} contradicts the spec: {'; '.join(contradictions)}"
    if strict:
        raise InputError(message)
    warnings.warn(message, stacklevel=3)


def _facts(spec: Spec) -> dict[str, object]:
    """The fields of a spec, and what it says without a field."""
    facts = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    facts |= {"activation": _ACTIVATION}
    del facts["blocks"]
    if isinstance(spec, SwinSpec):
        return facts | {"num_features": spec.num_features}
    heads = tuple(block.num_heads for block in spec.blocks)
    return facts | {
        "num_features": facts["embed_dim"],
        "num_heads": heads[0] if len(set(heads)) == 1 else heads,
        "mlp_dim": spec.blocks[0].mlp_dim,
    }


def _claims_of_spec(described: Spec, family: str) -> Iterator[Claim]:
    facts = _facts(described) if described.family == family else {}
    for fact in sorted(facts.keys() - {"num_classes"}):
        yield Claim(fact, fact, facts[fact])


def _claims_of_config(config, family: str) -> Iterator[Claim]:
    """What transformers' or timm's config.json says of a network of this family."""
    if not isinstance(config, Mapping):
        return
    architecture = str(config.get("architecture"))
    if architecture.startswith(_ARCHITECTURES[family]):
        names = _TIMM_SWIN if family == "swin" else _TIMM_VIT
        yield from _claims_of_architecture(architecture, config.get("model_args") or {}, family)
    elif config.get("model_type") in _MODEL_TYPES[family]:
        names = _HUGGING_FACE_SWIN if family == "swin" else _HUGGING_FACE_VIT
    else:
        return
    for said_as, fact in names.items():
        value: object = config
        for key in said_as.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            yield Claim(said_as, fact, value)


def _claims_of_architecture(architecture: str, arguments, family: str) -> Iterator[Claim]:
    plain = _PLAIN.match(architecture)
    if plain is None:
        return
    known = swin(plain[2]) if family == "swin" else deit(plain[2])
    for fact in sorted({"num_heads", "layer_norm_eps"} - set(arguments)):
        yield Claim(f"architecture {architecture!r}: {fact}", fact, getattr(known, fact))


def _normalised(fact: str, value):
    """Sides [..., 8, 8] -> 8, or (8, 4) of what is no square; other lists -> tuples."""
    if isinstance(value, list):
        sides = tuple(value[-2:] if fact.endswith("_size") else value)
        return sides[0] if fact.endswith("_size") and len(set(sides)) == 1 else sides
    return _SYNONYMS.get(fact, {}).get(value, value)
