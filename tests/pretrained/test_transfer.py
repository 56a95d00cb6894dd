"""What a transfer may begin with: any folder that says its network, or a file and the config's."""

import dataclasses
import json

import pytest
from flora_jax.stages.run import network_spec
from safetensors.numpy import save_file

import flora_jax as flora
from flora_jax.configs import transfer
from flora_jax.runs import validation
from flora_jax.runs.settings import Settings
from flora_jax.weights import hub, layouts
from tests.helpers.weights import VIT, random_model, written
from tests.pretrained.test_beside import HUGGING_FACE_VIT, TIMM_VIT

SPEC = dataclasses.replace(VIT, image_size=8, in_channels=1, num_classes=0, blocks=())
OF_THE_DIGITS = {"num_channels": 1, "image_size": 8, "model_type": "vit"}
TIMM = TIMM_VIT | {"pretrained_cfg": {"input_size": [1, 8, 8]}, "num_classes": 0}
TIMM["model_args"] = TIMM_VIT["model_args"] | {"in_chans": 1}


def settings(path, **changes):
    config = transfer.get_config("digits")
    config.pretrained = str(path)
    config.update_from_flattened_dict(changes)
    return Settings.from_config(config)


@pytest.mark.parametrize(
    ("table", "config"),
    [
        (layouts.hugging_face_vit, HUGGING_FACE_VIT | OF_THE_DIGITS),
        (layouts.timm, TIMM),
    ],
)
def test_folders_of_others(table, config, tmp_path, monkeypatch):
    save_file(written(random_model(SPEC), table), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(hub, "_downloaded", lambda name, revision: tmp_path)
    for path in (tmp_path, "hf:owner/vit"):
        begins = settings(path)
        assert network_spec(begins) == dataclasses.replace(SPEC, num_classes=5)
        validation.check(begins)


def test_a_file_that_stands_alone_has_the_shape_of_the_config(tmp_path):
    path = tmp_path / "vit.safetensors"
    flora.export_timm(random_model(SPEC), path)
    begins = settings(path, **{"model.embed_dim": 8, "model.depth": 2, "model.patch_size": 4})
    assert network_spec(begins) == dataclasses.replace(SPEC, num_classes=5)
    validation.check(begins)
    with pytest.raises(ValueError, match=r"set patch_size=4, embed_dim=8, depth=2 in the spec"):
        validation.check(settings(path))
