"""Network architectures: specs, NNX modules, and weights by name."""

import dataclasses
import difflib

from flax import nnx

from flora_jax.models.spec import BlockSpec, Spec
from flora_jax.models.swin import Swin
from flora_jax.models.swin_spec import SwinSpec
from flora_jax.models.vit import ViT
from flora_jax.models.vit_spec import ViTSpec

_FAMILIES = {"vit": (ViTSpec, ViT), "swin": (SwinSpec, Swin)}


def create(spec: Spec, seed: int = 0) -> nnx.Module:
    """A model of this spec with random weights (Xavier uniform; zero biases)."""
    return _FAMILIES[spec.family][1](spec, rngs=nnx.Rngs(seed))


def create_abstract(spec: Spec) -> nnx.Module:
    """A model of this spec whose parameters are shapes without values."""
    return nnx.eval_shape(lambda: create(spec))


def spec_to_json(spec: Spec) -> dict:
    return {"family": spec.family, **dataclasses.asdict(spec)}


def spec_from_json(value: dict) -> Spec:
    """The spec of {"family": "vit" or "swin", its fields}.

    Raises:
      ValueError: a family or a field that does not exist, or fields that make no network.
    """
    fields = dict(value)
    family = fields.pop("family", None)
    if family not in _FAMILIES:
        raise ValueError(f"unknown model family {family!r}; known: {', '.join(_FAMILIES)}")
    blocks = [_block_from_json(block) for block in fields.get("blocks", ())]
    return _from_fields(_FAMILIES[family][0], {**fields, "blocks": tuple(blocks)})


def _block_from_json(value: dict) -> BlockSpec:
    tokens = value.get("tokens")
    tuples = {
        "ranks": tuple(value.get("ranks", ())),
        "tokens": None if tokens is None else tuple(tokens),
    }
    return _from_fields(BlockSpec, {**value, **tuples})


def _from_fields(spec_class: type, fields: dict):
    known = [field.name for field in dataclasses.fields(spec_class)]
    for name in sorted(fields.keys() - set(known)):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"{spec_class.__name__} has no field {name}{hint}")
    return spec_class(**fields)
