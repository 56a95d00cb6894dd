"""What a transfer may begin with: any folder that says its network, or a file and the config's."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

import flora_jax as flora
from flora_jax.configs import digits, transfer
from flora_jax.methods import shared, start
from flora_jax.models import functional
from flora_jax.models.spec_json import spec_to_json
from flora_jax.runs import checks
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings, network_spec
from flora_jax.weights import hub, layouts
from tests.helpers.compressed import low_rank, slimmed
from tests.helpers.pictures import save
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
        checks.check(begins)


def test_a_file_that_stands_alone_has_the_shape_of_the_config(tmp_path):
    path = tmp_path / "vit.safetensors"
    flora.export_timm(random_model(SPEC), path)
    begins = settings(path, **{"model.embed_dim": 8, "model.depth": 2, "model.patch_size": 4})
    assert network_spec(begins) == dataclasses.replace(SPEC, num_classes=5)
    checks.check(begins)
    with pytest.raises(ValueError, match="do not fit the spec"):
        checks.check(settings(path))


@pytest.mark.parametrize("compress", [lambda model: low_rank(slimmed(model.spec)), lambda m: m])
def test_a_folder_for_pytorch_is_a_start(compress, tmp_path):
    """The network as it is, with its own heads, ranks and tokens, but for the classifier."""
    wider = {"embed_dim": 24, "num_heads": 3, "patch_size": 2, "num_classes": 3}
    model = compress(random_model(dataclasses.replace(SPEC, **wider)))
    flora.export_torch(model, tmp_path)
    begins = settings(tmp_path)
    checks.check(begins)
    spec = network_spec(begins)
    assert spec == flora.read_spec(tmp_path).with_classes(5) == model.spec.with_classes(5)
    step = SimpleNamespace(images=SimpleNamespace(class_names=tuple("56789"), are_labelled=False))
    with pytest.warns(UserWarning, match="head has 3 classes in the weights and 5 in the spec"):
        read = functional.split(shared.read_weights(step, spec, str(tmp_path), probe_images=0))[1]
    own = functional.split(flora.from_pretrained(tmp_path))[1]
    assert read.keys() == own.keys()
    for name in read.keys() - {"head.kernel", "head.bias"}:
        np.testing.assert_array_equal(read[name], own[name])


def saved(model, names, folder):
    flora.save(model, folder)
    (folder / "classes.json").write_text(json.dumps(names))
    return folder


def heads(model):
    """Weights of the classifiers by class: [classes, D + 1] of each."""
    found = functional.split(model)[1]
    return [
        np.vstack([found[f"{name}.kernel"], found[f"{name}.bias"]]).T
        for name in ("head", "head_dist")
        if f"{name}.kernel" in found
    ]


@pytest.mark.parametrize("distilled", [False, True])
def test_classes_of_the_same_names_are_put_in_the_order_of_the_images(distilled, tmp_path, caplog):
    spec = dataclasses.replace(SPEC, num_classes=3, distilled=distilled)
    model = random_model(spec)
    folder = saved(model, ("owl", "Cat", "ant"), tmp_path / "model")
    flora.export_timm(model, folder / "weights.safetensors")
    shutil.copytree(folder, tmp_path / "alone", ignore=shutil.ignore_patterns("*.json"))
    for names, path, order, is_said in (
        (("ant", "cat", "owl"), folder, [2, 1, 0], False),
        (("ant", "cat", "owl"), folder / "weights.safetensors", [2, 1, 0], False),
        (("ant", "cat", "owl"), tmp_path / "alone/weights.safetensors", [0, 1, 2], False),
        (("ant", "cat", "elk"), folder, [0, 1, 2], True),
    ):
        caplog.clear()
        step = SimpleNamespace(images=SimpleNamespace(class_names=names, are_labelled=True))
        read = shared.read_weights(step, spec, str(path), probe_images=0)
        for ours, theirs in zip(heads(read), heads(model), strict=True):
            np.testing.assert_array_equal(ours, theirs[order])
        assert ("such as owl for ant: taken to be in the same order" in caplog.text) == is_said


def test_a_run_puts_them_in_order_and_names_its_models_so(tmp_path):
    spec = dataclasses.replace(SPEC, num_classes=10)
    names = list("0123456798")
    model = random_model(spec)
    config = digits.get_config()
    config.pretrained, config.stages = str(saved(model, names, tmp_path / "model")), ("pretrain",)
    config.model = {k: v for k, v in spec_to_json(spec).items() if k != "blocks"}
    start.run(config, tmp_path / "run")
    dense = tmp_path / "run/dense"
    assert json.loads((dense / "classes.json").read_text()) == sorted(names)
    order = list(map(names.index, sorted(names)))
    np.testing.assert_array_equal(heads(flora.load(dense))[0], heads(model)[0][order])


def test_the_names_of_the_weights_stay_where_images_have_no_labels(tmp_path):
    folder = saved(
        random_model(dataclasses.replace(SPEC, num_classes=3)), list("xyz"), tmp_path / "model"
    )
    for i in range(8):
        save(tmp_path / f"pictures/{i}.png")
    for num_classes, expected in ((3, ("x", "y", "z")), (4, ())):
        config = digits.get_config()
        config.data.name, config.pretrained = f"images:{tmp_path / 'pictures'}", str(folder)
        config.model.num_classes = num_classes
        assert Images(Settings.from_config(config)).class_names == expected
