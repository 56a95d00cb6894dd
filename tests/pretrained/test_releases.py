"""Files as their authors released them, DINOv2, DINOv3, DeiT III, CLIP; and what goes unused.

The names here are the inverse of what timm's readers do; where timm is installed, it checks them.
"""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

import flora_jax as flora
from flora_jax.weights import layouts
from flora_jax.weights.metadata.spec import read_spec
from tests.helpers import modern
from tests.helpers.weights import assert_same, random_model, written

RENAMED = {
    "timm_deit3": [(r"ls([12])\.gamma", r"gamma_\1")],
    "timm_dinov3": [("reg_token", "storage_tokens"), (r"gamma_([12])", r"ls\1.gamma")],
    "timm_clip": [
        (r"norm_pre\.", "ln_pre."), (r"^norm\.", "ln_post."), (r"norm([12])\.", r"ln_\1."),
        (r"^blocks\.", "transformer.resblocks."), (r"qkv\.", "in_proj_"),
        (r"attn\.proj", "attn.out_proj"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
        (r"patch_embed\.proj", "conv1"), ("pos_embed", "positional_embedding"),
        ("cls_token", "class_embedding"),
    ],
}  # fmt: skip
_GATED = [(r"mlp\.fc1_g", "mlp.w1"), (r"mlp\.fc1_x", "mlp.w2"), (r"mlp\.fc2", "mlp.w3")]
RENAMED["timm_dinov3_swiglu"] = RENAMED["timm_dinov3"] + _GATED


def released(name) -> dict[str, np.ndarray]:
    """The golden weights of timm's network, as its release would hold them."""
    arrays, width = modern.arrays(name), modern.SPECS[name].embed_dim
    if name.startswith("timm_dinov2"):
        arrays["mask_token"] = np.ones((1, width), np.float32)
    if name == "timm_dinov2_registers":
        first = np.full((1, 1, width), 0.25, np.float32)
        arrays["register_tokens"] = arrays.pop("reg_token")
        arrays["cls_token"] = arrays["cls_token"] - first
        arrays["pos_embed"] = np.concatenate([first, arrays["pos_embed"]], axis=1)
    if name == "timm_clip":
        arrays = {k: a for k, a in arrays.items() if not k.startswith("head.")}
        arrays["cls_token"], arrays["pos_embed"] = arrays["cls_token"][0, 0], arrays["pos_embed"][0]
    for pattern, name_there in RENAMED.get(name, ()):
        arrays = {re.sub(pattern, name_there, key): array for key, array in arrays.items()}
    if name == "timm_clip":
        texts = {"transformer.resblocks.0.ln_1.weight": np.ones(8), "logit_scale": np.ones(())}
        arrays = {f"visual.{key}": array for key, array in arrays.items()} | texts
        arrays["visual.proj"] = np.ones((width, 5), np.float32)
    if name.startswith("timm_dinov3"):
        arrays["rope_embed.periods"] = np.ones(4, np.float32)
        arrays["local_cls_norm.weight"] = np.ones(width, np.float32)
    return arrays


def spec_of(name) -> flora.ViTSpec:
    """A CLIP's release has no classifier."""
    spec = modern.SPECS[name]
    return dataclasses.replace(spec, num_classes=0) if name == "timm_clip" else spec


NAMES = [n for n in modern.SPECS if re.match("timm_(deit3|dinov[23]|clip)", n)]


@pytest.mark.parametrize("name", NAMES)
def test_a_release(name):
    arrays, spec = released(name), spec_of(name)
    assert arrays.keys() != modern.arrays(name).keys()
    expected = flora.from_state_dict(modern.arrays(name), spec)
    given = flora.from_state_dict(arrays, spec)
    if name == "timm_dinov2_registers":  # a sum of two
        np.testing.assert_allclose(given.cls_token[...], expected.cls_token[...], atol=1e-6)
        given.cls_token[...] = expected.cls_token[...]
    assert_same(given, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_release_is_what_timm_makes_of_it(name):
    torch = pytest.importorskip("torch", reason="timm reads releases with torch")
    timm = pytest.importorskip("timm", reason="timm's own reading of a release")
    arrays, spec, config = released(name), spec_of(name), modern.config(name)
    theirs = timm.create_model(config["model"], pretrained=False, **config["arguments"])
    module = timm.models.eva if "dinov3" in name else timm.models.vision_transformer
    options = {"adapt_layer_scale": True} if name == "timm_deit3" else {}
    tensors = {key: torch.tensor(array) for key, array in arrays.items()}
    read = module.checkpoint_filter_fn(tensors, theirs, **options)
    in_timm = {key: tensor.numpy() for key, tensor in read.items() if key != "proj"}
    assert_same(flora.from_state_dict(in_timm, spec), flora.from_state_dict(arrays, spec))


def test_the_masked_bias_of_dinov3s_keys():
    """Its release stores biases of query, key and value, and a mask that takes the key's out."""
    spec = dataclasses.replace(modern.SPECS["timm_dinov3"], qkv_bias=True, k_bias=False)
    model = random_model(spec)
    arrays = written(model, layouts.timm)
    arrays["storage_tokens"] = arrays.pop("reg_token")
    for block in range(spec.depth):
        at = f"blocks.{block}.attn"
        query, value = arrays.pop(f"{at}.q_bias"), arrays.pop(f"{at}.v_bias")
        arrays[f"{at}.qkv.bias"] = np.concatenate([query, np.ones_like(query), value])
        arrays[f"{at}.qkv.bias_mask"] = np.repeat(np.float32([1, np.nan, 1]), len(query))
    assert_same(flora.from_state_dict(arrays, spec), model)


def test_chunks_of_dinov2s_training():
    spec, arrays = modern.SPECS["timm_dinov2"], modern.arrays("timm_dinov2")
    chunked = {
        re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", key): array
        for key, array in arrays.items()
    }
    assert "blocks.0.1.norm1.weight" in chunked
    teacher = {f"teacher.backbone.{key}": array for key, array in chunked.items()}
    assert_same(flora.from_state_dict(teacher, spec), flora.from_state_dict(arrays, spec))


def test_packed_gates_of_dinov2():
    spec = dataclasses.replace(
        modern.SPECS["timm_dinov2"], gated_mlp=True, activation="silu", mlp_ratio=2, blocks=()
    )
    model = random_model(spec)
    arrays = {
        key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): array
        for key, array in written(model, layouts.timm).items()
    }
    assert_same(flora.from_state_dict(arrays, spec), model)


def test_openclip_with_a_tower_of_timm():
    arrays = {f"module.visual.trunk.{k}": a for k, a in modern.arrays("timm_siglip").items()}
    arrays["module.visual.head.proj.weight"] = np.ones((5, 48), np.float32)
    arrays["module.text.transformer.resblocks.0.ln_1.weight"] = np.ones(8, np.float32)
    arrays["module.logit_bias"] = np.ones((), np.float32)
    spec = modern.SPECS["timm_siglip"]
    assert_same(flora.from_state_dict(arrays, spec), modern.model("timm_siglip"))


def test_no_registers_in_a_dinov3_of_transformers():
    arrays = modern.arrays("hf_dinov3")
    arrays["embeddings.register_tokens"] = arrays["embeddings.register_tokens"][:, :0]
    spec = dataclasses.replace(modern.SPECS["hf_dinov3"], num_registers=0)
    assert flora.from_state_dict(arrays, spec).spec == spec


def test_a_pool_that_a_siglip_classifier_does_not_use(tmp_path):
    arrays = modern.arrays("hf_siglip")
    arrays |= {"classifier.weight": np.eye(10, 48, dtype=np.float32)}
    arrays["classifier.bias"] = np.ones(10, np.float32)
    save_file(arrays, tmp_path / "model.safetensors")
    config = modern.config("hf_siglip")["config"]
    config |= {"architectures": ["SiglipForImageClassification"], "num_labels": 10}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = flora.from_pretrained(tmp_path)
    assert (model.spec.pool, model.spec.num_classes) == ("mean", 10)
    assert read_spec(tmp_path) == model.spec
    with pytest.raises(ValueError, match=r"unexpected .*head\.attention"):
        flora.from_state_dict(
            modern.arrays("hf_siglip"), dataclasses.replace(model.spec, num_classes=0)
        )
