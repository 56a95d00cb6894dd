"""Specs as JSON: {"family": "vit", "swin" or "tiny_vit", their fields}."""

import dataclasses

from flora_jax.errors import InputError, did_you_mean
from flora_jax.models.spec import BlockSpec, Spec
from flora_jax.models.swin_spec import SwinSpec
from flora_jax.models.tiny_vit_spec import TinyViTSpec
from flora_jax.models.vit_spec import ViTSpec

_SPECS: dict[str, type[Spec]] = {spec.family: spec for spec in (ViTSpec, SwinSpec, TinyViTSpec)}


def spec_to_json(spec: Spec) -> dict:
    """Writes a spec as plain values, which `spec_from_json` reads."""
    return {"family": spec.family, **_fields(spec)}


def _fields(spec: Spec | BlockSpec) -> dict:
    """The fields of a spec; what only some networks have, where this one does."""
    fields = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if "later" in field.metadata and value == field.default:
            continue
        fields[field.name] = tuple(map(_fields, value)) if field.name == "blocks" else value
    return fields


def spec_from_json(value: dict) -> Spec:
    """Reads the spec of {"family": "vit", "swin" or "tiny_vit", its fields}.

    Raises:
      InputError: a family or a field that does not exist, or fields that make no network.
    """
    fields = dict(value)
    family = fields.pop("family", None)
    if family not in _SPECS:
        raise InputError(f"unknown model family {family!r}; known: {', '.join(_SPECS)}")
    blocks = [_block_from_json(block) for block in fields.get("blocks", ())]
    return _from_fields(_SPECS[family], {**fields, "blocks": tuple(blocks)})


def _block_from_json(value: dict) -> BlockSpec:
    tokens, pairs = value.get("tokens"), value.get("rotary_pairs")
    tuples = {
        "ranks": tuple(value.get("ranks", ())),
        "tokens": None if tokens is None else tuple(tokens),
        "rotary_pairs": None if pairs is None else tuple(map(tuple, pairs)),
    }
    return _from_fields(BlockSpec, {**value, **tuples})


def _from_fields(spec_class: type, fields: dict):
    known = [field.name for field in dataclasses.fields(spec_class)]
    for name in sorted(fields.keys() - set(known)):
        raise InputError(f"{spec_class.__name__} has no field {name}{did_you_mean(name, known)}")
    return spec_class(**fields)
