"""What is no vision transformer, or no file of one, is named for what it is."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import flora_jax as flora
from flora_jax.errors import InputError, MissingFileError
from flora_jax.weights.metadata.spec import read_spec, spec_of_config
from flora_jax.weights.pretrained import from_pretrained
from tests.helpers import modern
from tests.helpers.weights import VIT
from tests.pretrained.test_beside import HUGGING_FACE_SWIN, HUGGING_FACE_VIT, TIMM_SWIN, TIMM_VIT


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "modernbert"}, "model_type 'modernbert' is a model of texts; read are vis"),
        ({"model_type": "gpt2"}, "'gpt2' is a model of texts"),
        ({"model_type": "llama", "hidden_size": 8}, "'llama' is a model of texts"),
        ({"model_type": "wav2vec2"}, "'wav2vec2' is a model of sound"),
        ({"model_type": "whisper"}, "'whisper' is a model of sound"),
        ({"model_type": "resnet"}, "'resnet' is a convolutional network"),
        ({"architecture": "convnext_tiny.in12k"}, "'convnext_tiny' is a convolutional network"),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel is a model of diffusers"),
        ({"model_type": "vit_msn"}, "unknown model_type 'vit_msn'; choose one of vit, deit"),
        ({"model_type": ["vit"]}, r"unknown model_type \"\['vit'\]\""),
    ],
)
def test_configs_of_other_networks(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"w": np.zeros(2)}, tmp_path / "model.safetensors")
    for read in (read_spec, from_pretrained):
        with pytest.raises(InputError, match=rf"config\.json: .*{message}"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (HUGGING_FACE_VIT, {"hidden_size": "8"}, "hidden_size is '8'; expected a whole number of"),
        (HUGGING_FACE_VIT, {"num_hidden_layers": 2.5}, r"num_hidden_layers is 2\.5; expected a wh"),
        (HUGGING_FACE_VIT, {"image_size": {"height": 12}}, "image_size is {'height': 12}; expect"),
        (HUGGING_FACE_VIT, {"layer_norm_eps": [1e-6]}, r"layer_norm_eps is \[1e-06\]; expected"),
        (HUGGING_FACE_VIT, {"qkv_bias": "false"}, "qkv_bias is 'false'; expected true or false"),
        (HUGGING_FACE_VIT, {"architectures": "ViTModel"}, "architectures is 'ViTModel'"),
        (HUGGING_FACE_SWIN, {"depths": 2}, "depths is 2; expected a list of whole numbers"),
        ({"model_type": "clip", "vision_config": {"hidden_size": True}}, {},
         r"vision_config\.hidden_size is True; expected a whole number"),
        ({"model_type": "siglip", "vision_config": "large"}, {}, "vision_config is 'large'; expec"),
        ({"model_type": "dinov3_vit", "rope_parameters": {"rope_theta": "100"}}, {},
         r"rope_parameters\.rope_theta is '100'; expected a number"),
        (TIMM_VIT, {"model_args": [1]}, r"model_args is \[1\]; expected an object with fields"),
        (TIMM_VIT, {"model_args": {"depth": None}}, r"model_args\.depth is None; expected a whole"),
        (TIMM_VIT, {"pretrained_cfg": {"input_size": 12}}, r"pretrained_cfg\.input_size is 12; ex"),
        (TIMM_SWIN, {"model_args": {"num_heads": "2, 3"}}, r"model_args\.num_heads is '2, 3'; exp"),
    ],
)  # fmt: skip
def test_values_of_another_kind_name_file_and_key(tmp_path, config, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        read_spec(tmp_path)


def places_in(config, at=()):
    for key, value in config.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from places_in(value, (*at, key))


@pytest.mark.parametrize("odd", [None, "8", [], [[1]], {"a": 1}, True, -1, 0, 1.5, float("nan")])
def test_no_value_anywhere_is_a_fault_of_ours(odd):
    configs = [HUGGING_FACE_VIT, HUGGING_FACE_SWIN, TIMM_VIT, TIMM_SWIN]
    configs += [modern.config(n)["config"] for n in modern.SPECS if n.startswith("hf")]
    refused = 0
    for config in configs:
        for *parents, key in places_in(config):
            changed = inner = json.loads(json.dumps(config))
            for parent in parents:
                inner = inner[parent]
            inner[key] = odd
            try:
                spec_of_config(changed)
            except InputError:
                refused += 1
    assert refused > 3 or odd is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it is empty"),
        ({".gitattributes": "", "README.md": ""}, r"it holds \.gitattributes, README\.md"),
        ({"model_index.json": '{"_class_name": "FluxPipeline"}'}, r"of diffusers \(FluxPipeline\)"),
        ({"adapter_config.json": '{"base_model_name_or_path": "a/b"}', "config.json": "{}",
          "adapter_model.safetensors": ""}, "an adapter of a/b, not a whole model: merge it"),
        ({"tf_model.h5": "", "config.json": "{}"}, r"tf_model\.h5 \(a Keras file of TensorFlow\)"),
        ({"flax_model.msgpack": ""}, r"flax_model\.msgpack \(a msgpack file of Flax\)"),
    ],
)  # fmt: skip
def test_folders_without_weights_say_what_they_hold(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    reads = (from_pretrained,) if "config.json" in files else (from_pretrained, read_spec)
    for read in reads:
        with pytest.raises(MissingFileError, match=message):
            read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q4.gguf", b"GGUF", "is no file of weights but a GGUF file of llama.cpp: its name must"),
        ("vit.onnx", b"\x08", "is no file of weights but an ONNX graph"),
        ("vit.h5", b"\x89HDF", "is no file of weights but a Keras file of TensorFlow"),
        ("vit.msgpack", b"\x81", "is no file of weights but a msgpack file of Flax"),
        ("vit.pkl", b"\x80", "but a pickle, which could run any program"),
        ("q4.bin", b"GGUF\x03", "is a GGUF file of llama.cpp, whatever its name says"),
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "pointer that Git"),
        ("m.pth", b"version https://git-lfs.github.com/spec/v1\noid", "pointer that Git LFS left"),
    ],
)
def test_files_of_other_kinds(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} .*{message}"):
        from_pretrained(tmp_path / name, VIT)


def test_weights_of_an_adapter(tmp_path):
    name = "base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight"
    save_file({name: np.zeros((2, 8), np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"adapter \(.*lora_A\.weight\), not a whole model"):
        flora.from_pretrained(tmp_path / "adapter_model.safetensors", VIT)
