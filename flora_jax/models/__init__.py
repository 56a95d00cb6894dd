"""Network architectures: specs, NNX modules, and weights by name."""

import dataclasses

from flax import nnx

from flora_jax.models.spec import BlockSpec, ViTSpec
from flora_jax.models.vit import ViT

Spec = ViTSpec
_FAMILIES = {"vit": (ViTSpec, ViT)}


def create(spec: Spec, seed: int = 0) -> nnx.Module:
    """A model of this spec with random weights (Xavier uniform; zero biases)."""
    return _FAMILIES[spec.family][1](spec, rngs=nnx.Rngs(seed))


def create_abstract(spec: Spec) -> nnx.Module:
    """A model of this spec whose parameters are shapes without values."""
    return nnx.eval_shape(lambda: create(spec))


def spec_to_json(spec: Spec) -> dict:
    return {"family": spec.family, **dataclasses.asdict(spec)}


def spec_from_json(value: dict) -> Spec:
    """Raises ValueError for a family or a field that this version does not know."""
    fields = dict(value)
    family = fields.pop("family", None)
    if family not in _FAMILIES:
        raise ValueError(f"unknown model family {family!r}; known: {', '.join(_FAMILIES)}")
    blocks = [
        _from_fields(BlockSpec, {**block, "ranks": tuple(block.get("ranks", ()))})
        for block in fields.get("blocks", ())
    ]
    return _from_fields(_FAMILIES[family][0], {**fields, "blocks": tuple(blocks)})


def _from_fields(spec_class: type, fields: dict):
    unknown = fields.keys() - {field.name for field in dataclasses.fields(spec_class)}
    if unknown:
        raise ValueError(f"unknown fields of {spec_class.__name__}: {', '.join(sorted(unknown))}")
    return spec_class(**fields)
