"""Every layout of weights: its names, its shapes, and that it reads the same model."""

import dataclasses
import functools
import re

import pytest

from flora_jax.weights import layouts
from flora_jax.weights.pretrained import from_state_dict
from tests.helpers.weights import SWINS, VITS, assert_same, written

TO_VERSION_5 = {  # of transformers
    r"attention\.(?:attention|self)\.(query|key|value)\b": lambda m: f"attention.{m[1][0]}_proj",
    r"attention\.self\.(?=relative)": "attention.relative_position_bias.",
    r"attention\.output\.dense": "attention.o_proj",
    r"intermediate\.dense": "mlp.fc1",
    r"\boutput\.dense": "mlp.fc2",
    r"vit\.encoder\.layer\.|deit\.encoder\.layer\.": lambda m: m[0].split(".")[0] + ".layers.",
}


def version_5(table):
    """The table under the names that transformers 5 has in memory."""

    def renamed(name):
        return functools.reduce(lambda n, new: re.sub(*new, n), TO_VERSION_5.items(), name)

    return lambda spec: [
        dataclasses.replace(row, sources=tuple(map(renamed, row.sources))) for row in table(spec)
    ]


TABLES = {
    "own": layouts.own,
    "timm": layouts.timm,
    "timm_head": lambda spec: layouts.timm_swin(spec, ["head.weight"]),
    "release": lambda spec: layouts.timm_swin(spec, ["head.weight", "layers.0.downsample."]),
    "release_head_fc": lambda spec: layouts.timm_swin(spec, ["layers.0.downsample."]),
    "hugging_face_vit": layouts.hugging_face_vit,
    "hugging_face_vit_5": version_5(layouts.hugging_face_vit),
    "hugging_face_swin": layouts.hugging_face_swin,
    "hugging_face_swin_5": version_5(layouts.hugging_face_swin),
}
PAIRS = [
    *((spec, table) for spec in VITS for table in ("own", "timm")),
    *(
        (spec, f"hugging_face_vit{version}")
        for spec in ("vit", "distilled", "no_qkv_bias")
        for version in ("", "_5")
    ),
    *((spec, table) for spec in SWINS for table in TABLES if "vit" not in table),
]


@pytest.mark.parametrize(("spec", "table"), PAIRS)
def test_every_layout_reads_the_same_model(models, spec, table):
    arrays = written(models[spec], TABLES[table])
    assert_same(from_state_dict(arrays, models[spec].spec), models[spec])


SWIN = "swin.encoder.layers"


# Those that no golden file has.
@pytest.mark.parametrize(
    ("spec", "table", "names"),
    [
        ("distilled", "timm", "dist_token head_dist.bias blocks.1.mlp.fc2.weight norm.weight"),
        ("absolute", "timm", "absolute_pos_embed head.fc.weight patch_embed.norm.bias "
         "layers.1.downsample.norm.bias layers.1.blocks.0.attn.relative_position_bias_table"),
        ("swin", "release", "head.bias layers.0.downsample.norm.weight norm.weight"),
        ("distilled", "hugging_face_vit", "deit.embeddings.distillation_token cls_classifier.bias "
         "distillation_classifier.weight deit.embeddings.position_embeddings"),
        ("vit", "hugging_face_vit_5", "vit.layers.1.attention.q_proj.bias vit.layernorm.bias"),
        ("absolute", "hugging_face_swin", "swin.embeddings.position_embeddings "
         f"swin.layernorm.weight {SWIN}.0.downsample.reduction.weight "
         f"{SWIN}.1.blocks.0.attention.self.relative_position_bias_table "
         f"{SWIN}.0.blocks.1.attention.self.value.weight"),
    ],
)  # fmt: skip
def test_published_names(models, spec, table, names):
    assert set(names.split()) <= written(models[spec], TABLES[table]).keys()
