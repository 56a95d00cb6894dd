"""What outputs mean: read from descriptions, kept by files, followed by losses and commands."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import load_file, save_file
from scipy.special import expit

import flora_jax as flora
from flora_jax.commands.classifier import Classifier
from flora_jax.commands.evaluate import evaluate, evaluated, load_source
from flora_jax.commands.predict import predict
from flora_jax.configs import minutes, yours
from flora_jax.data.preprocessing import Preprocessing
from flora_jax.errors import InputError, MissingFileError
from flora_jax.evaluation.evaluate import evaluate_images
from flora_jax.evaluation.outputs import OUTPUTS
from flora_jax.methods import start
from flora_jax.models import functional
from flora_jax.models.spec_json import spec_from_json, spec_to_json
from flora_jax.runs.auto_config import settings_of
from flora_jax.training.losses import distillation_loss
from flora_jax.weights import layouts
from flora_jax.weights.class_embeddings import read_class_embeddings
from flora_jax.weights.metadata.preprocessing import read_preprocessing, save_preprocessing
from flora_jax.weights.metadata.spec import spec_of_config
from tests.helpers import modern
from tests.helpers.training import NORMALIZATION, batch_of
from tests.helpers.weights import random_model

CLASSES = flora.ViTSpec(
    image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3
)
KINDS = ("labels", "numbers", "embedding")
SPECS = {kind: dataclasses.replace(CLASSES, blocks=(), outputs=kind) for kind in KINDS}
NAMES = ("water", "boat", "snow")
PREPROCESSING = Preprocessing(8, (0.5,), (0.2,))
HF = {"architectures": ["ViTForImageClassification"], "model_type": "vit"}
HF |= {"id2label": {"0": "a", "1": "b", "2": "c"}}
CLIP = "vit_base_patch16_clip_224"


@pytest.fixture(scope="module")
def models():
    return {kind: random_model(spec) for kind, spec in SPECS.items()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes of eight pictures each, in their own colour."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        for i in range(8):
            pixels = rng.integers(0, 120, (8, 10, 3), np.uint8)
            pixels[..., label] += 130
            (root / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def saved(model, folder, names=NAMES):
    flora.save(model, folder)
    save_preprocessing(folder, PREPROCESSING, model.spec.kind)
    if names:
        (folder / "classes.json").write_text(json.dumps(names))
    return epath.Path(folder)


def outputs_of_pictures(model, paths):
    crop = PREPROCESSING.crop(3)
    images = np.stack([crop(np.asarray(Image.open(path))) for path in paths])
    return np.asarray(jax.jit(model.__call__)(PREPROCESSING.normalization(jnp.asarray(images))))


@pytest.mark.parametrize(
    ("changes", "kind", "number"),
    [
        ({}, "classes", 3),
        ({"problem_type": "single_label_classification"}, "classes", 3),
        ({"problem_type": "multi_label_classification"}, "labels", 3),
        ({"problem_type": "regression"}, "numbers", 3),
        ({"id2label": {"0": "LABEL_0"}}, "numbers", 1),
        ({"id2label": None, "num_labels": 1, "problem_type": "regression"}, "numbers", 1),
        ({"id2label": {"0": "cat"}, "problem_type": "multi_label_classification"}, "labels", 1),
        ({"architectures": ["ViTModel"], "problem_type": "regression"}, "features", 0),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "embedding", 512),
        (
            {
                "model_type": "clip_vision_model",
                "architectures": ["CLIPVisionModelWithProjection"],
                "projection_dim": 16,
            },
            "embedding",
            16,
        ),
        ({"model_type": "clip", "architectures": ["CLIPVisionModel"]}, "features", 0),
    ],
)
def test_transformers_says_what_outputs_mean(changes, kind, number):
    spec = spec_of_config(HF | changes)
    assert (spec.kind, spec.num_classes) == (kind, number)
    assert spec.head_bias == (kind != "embedding")


@pytest.mark.parametrize(
    ("architecture", "numbers", "extra", "kind"),
    [
        (f"{CLIP}.openai", (16, 16), {}, "embedding"),
        (CLIP, (512, 512), {}, "embedding"),
        (f"{CLIP}.laion2b_ft_in1k", (1000, 1000), {}, "classes"),
        (f"{CLIP}.openai_ft_in12k", (512, 512), {}, "classes"),
        (f"{CLIP}.openai", (10, 512), {}, "classes"),  # trained on by somebody
        (CLIP, (512, 512), {"label_names": [str(i) for i in range(512)]}, "classes"),
        (CLIP, (512, 512), {"problem_type": "single_label_classification"}, "classes"),
        ("vit_base_patch16_224", (512, 512), {}, "classes"),
        ("vit_base_patch16_224", (5, 5), {"problem_type": "multi_label_classification"}, "labels"),
        ("vit_base_patch16_224", (1, 1), {}, "numbers"),
        ("vit_base_patch16_siglip_224.webli", (0, 0), {}, "features"),
    ],
)
def test_timm_says_what_outputs_mean(architecture, numbers, extra, kind):
    ours, published = numbers
    config = {"architecture": architecture, "num_classes": ours}
    config |= {"pretrained_cfg": {"num_classes": published}}
    assert spec_of_config(config | extra).kind == kind


def test_descriptions_that_cannot_be():
    with pytest.raises(
        InputError, match=r"unknown problem_type 'regresion'.*did you mean 'regression'"
    ):
        spec_of_config(HF | {"problem_type": "regresion"})
    with pytest.raises(InputError, match=r"quantised \(bitsandbytes\)"):
        spec_of_config(HF | {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(InputError, match=r"outputs 'label' is unknown.*'labels'"):
        dataclasses.replace(CLASSES, outputs="label")
    with pytest.raises(InputError, match="outputs are 3 labels, not exclusive classes"):
        SPECS["labels"].check_classifies("this")


def test_an_old_description_is_of_classes():
    described = spec_to_json(CLASSES)
    assert "outputs" not in described
    assert spec_from_json(described) == CLASSES
    assert spec_from_json(spec_to_json(SPECS["labels"])) == SPECS["labels"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_meaning_survives_files(models, tmp_path, kind):
    model = models[kind]
    flora.save(model, tmp_path / "own")
    flora.export_torch(model, tmp_path / "torch")
    flora.export_timm(model, tmp_path / "timm.safetensors")
    for folder in ("own", "torch"):
        assert flora.load(tmp_path / folder).spec == model.spec
        assert flora.read_spec(tmp_path / folder).kind == kind
    assert flora.from_pretrained(tmp_path / "timm.safetensors", model.spec).spec == model.spec
    saved(model, tmp_path / "described")
    content = json.loads((tmp_path / "described" / "preprocessing.json").read_text())
    assert content["outputs"] == kind
    assert read_preprocessing(tmp_path / "described") == PREPROCESSING
    classes = dataclasses.replace(model.spec, outputs="classes")
    with pytest.raises(InputError, match=f"outputs is '{kind}', and 'classes' in the spec"):
        flora.from_pretrained(tmp_path / "own", classes)


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_names_what_comes_out(models, tmp_path, kind):
    onnx = pytest.importorskip("onnx")
    flora.export_onnx(models[kind], tmp_path / "model.onnx")
    file = onnx.load(tmp_path / "model.onnx")
    assert [(each.key, each.value) for each in file.metadata_props] == [("outputs", kind)]
    assert file.graph.output[0].name == ("logits" if kind == "labels" else kind)


def test_a_projection_is_kept_and_written_back():
    """Of transformers under visual_projection, of OpenCLIP under proj."""
    changes = {"blocks": (), "num_classes": 7, "outputs": "embedding", "head_bias": False}
    spec = dataclasses.replace(modern.SPECS["hf_clip"], **changes)
    arrays, rng = dict(modern.arrays("hf_clip")), np.random.default_rng(0)
    projection = rng.normal(size=(7, spec.embed_dim)).astype(np.float32)
    name = "visual_projection.weight"
    features = flora.from_state_dict(arrays | {name: projection}, modern.SPECS["hf_clip"])
    model = flora.from_state_dict(arrays | {name: projection}, spec)
    images = modern.images("hf_clip")
    expected = np.asarray(features(images)) @ projection.T
    np.testing.assert_allclose(model(images), expected, atol=1e-5)
    parameters = functional.split(model)[1]
    assert sum(p.size for p in parameters.values()) == spec.num_params()
    for layout, key, value in (
        (layouts.hugging_face_vit, name, projection),
        (layouts.open_clip_vit, "proj", projection.T),
        (layouts.timm, "head.weight", projection),
    ):
        written = {}
        for row in layout(spec):
            written |= row.write(np.asarray(parameters[row.target]))
        np.testing.assert_array_equal(written[key], value)
        again = functional.split(flora.from_state_dict(written, spec))[1]
        np.testing.assert_array_equal(again["head.kernel"], projection.T)
    with pytest.raises(InputError, match="missing visual_projection"):
        flora.from_state_dict(arrays, spec)
    other = dataclasses.replace(spec, blocks=(), num_classes=5)
    with pytest.raises(InputError, match="7 classes in the weights and 5"):
        flora.from_state_dict(arrays | {name: projection}, other)


def test_weights_with_other_classes_than_described(tmp_path):
    config = modern.config("hf_dinov2_classifier")["config"]
    config |= {"id2label": {str(i): str(i) for i in range(4)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(modern.arrays("hf_dinov2_classifier"), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="head has 10 classes in the weights and 4 in what desc"):
        flora.from_pretrained(tmp_path)
    spec = flora.read_spec(tmp_path).with_classes(2)
    with pytest.warns(UserWarning, match="10 classes in the weights and 2 in the spec"):
        model = flora.from_pretrained(tmp_path, spec)
    assert model.spec == spec


def test_losses_of_each_kind():
    rng = np.random.default_rng(0)
    ours, taught = rng.normal(size=(2, 4, 3)).astype(np.float32)
    tokens = jnp.zeros((4, 1, 8))
    p, q = np.log(expit(np.float64(ours))), np.log(expit(-np.float64(ours)))
    share = expit(np.float64(taught))
    relative = ((ours - taught) ** 2).sum(-1) / (taught**2).sum(-1)
    expected = {
        "labels": -(share * p + (1 - share) * q).sum(-1).mean(),
        "numbers": ((ours - taught) ** 2).sum(-1).mean(),
        "embedding": relative.mean(),
    }
    for kind, value in expected.items():
        loss = distillation_loss((ours, tokens), (taught, tokens), SPECS[kind], 0.0)
        assert float(loss) == pytest.approx(value, rel=1e-4)
        added = distillation_loss((ours, tokens), (taught, tokens + 1), SPECS[kind], 2.0)
        assert float(added) == pytest.approx(value + 2, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_measured_beside_the_dense_model(models, kind):
    dense, model = models[kind], random_model(SPECS[kind], seed=1)
    batches = [batch_of(i) | {"mask": np.ones(8, np.float32)} for i in range(2)]
    images = flora.EvaluationSet(batches, NORMALIZATION).compared_with(dense)
    each = evaluate_images(model, images)
    pixels = NORMALIZATION(jnp.asarray(np.concatenate([b["image"] for b in batches])))
    ours, taught = (np.float64(jax.jit(m.__call__)(pixels)) for m in (model, dense))
    expected = {
        "labels": ("same_labels", ((ours > 0) == (taught > 0)).mean(-1)),
        "numbers": ("absolute_error", abs(ours - taught).mean(-1)),
        "embedding": (
            "cosine",
            (ours * taught).sum(-1)
            / np.linalg.norm(ours, axis=-1)
            / np.linalg.norm(taught, axis=-1),
        ),
    }
    name, values = expected[kind]
    assert OUTPUTS[kind].quality.shown.name == name
    np.testing.assert_allclose(each[name], values, atol=1e-5)
    with pytest.raises(InputError, match="top1 needs a classifier"):
        flora.evaluate(dense, flora.EvaluationSet(batches, NORMALIZATION))


def test_only_the_same_kind_teaches(models):
    images = flora.ImageSet(np.zeros((16, 8, 8, 3), np.uint8))
    recipe = flora.Recipe(epochs=1, batch_size=8, warmup_epochs=0)
    stored = dataclasses.replace(recipe, stored_predictions=True)
    with pytest.raises(InputError, match="3 estimated numbers cannot teach one with 3 independent"):
        flora.train(models["labels"], images, recipe, teacher=models["numbers"])
    with pytest.raises(InputError, match=r"stored_predictions needs a classifier.*3 labels"):
        flora.train(models["labels"], images, stored, teacher=models["labels"])


def test_predicts_labels_and_numbers(models, pictures, tmp_path, capsys):
    paths = [pictures / "snow/0.png", pictures / "boat/3.png"]
    for kind, unit, read in (("labels", "probability", expit), ("numbers", "value", np.asarray)):
        folder = saved(models[kind], tmp_path / kind)
        predict(folder, list(map(str, paths)), as_json=True)
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        for line, row in zip(lines, read(outputs_of_pictures(models[kind], paths)), strict=True):
            found = {entry["name"]: entry[unit] for entry in line[kind]}
            assert found == pytest.approx(dict(zip(NAMES, row.tolist(), strict=True)), abs=1e-5)
            if kind == "labels":
                assert list(found.values()) == sorted(found.values(), reverse=True)
            else:
                assert tuple(found) == NAMES
        predict(folder, [str(paths[0])])
        assert ("%" in capsys.readouterr().out) == (kind == "labels")
        with pytest.raises(InputError, match=f"needs a classifier.*3 {kind}, not exclusive"):
            evaluate(folder, f"folder:{pictures}")
        with pytest.raises(InputError, match="and embeds no images"):
            Classifier.open(folder, tmp_path / "texts.npy")


def test_one_output_is_a_number_and_never_certain(pictures, tmp_path, capsys):
    model = random_model(CLASSES.with_classes(1))
    predict(saved(model, tmp_path, names=()), [str(pictures / "snow/0.png")])
    (value,) = outputs_of_pictures(model, [pictures / "snow/0.png"])
    assert capsys.readouterr().out.endswith(f"0.png: 0 {value[0]:.4g}\n")


def test_an_embedding_is_no_classes_and_classifies_by_texts(models, pictures, tmp_path, capsys):
    model = models["embedding"]
    folder = saved(model, tmp_path / "model", names=())
    with pytest.raises(InputError, match=r"an embedding of 3 dimensions.*--class_embeddings=FILE"):
        predict(folder, [str(pictures / "snow/0.png")])
    paths = [pictures / name / f"{i}.png" for name in NAMES for i in range(8)]
    vectors = outputs_of_pictures(model, paths)
    texts = {name: vectors[8 * i] for i, name in enumerate(NAMES)}
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    save_file(texts, tmp_path / "texts.safetensors")
    (tmp_path / "numpy").mkdir()
    np.save(tmp_path / "numpy/texts.npy", np.stack([texts[name] for name in NAMES[::-1]]))
    (tmp_path / "numpy/classes.json").write_text(json.dumps(NAMES[::-1]))
    right = (unit @ unit[::8].T).argmax(-1) == np.repeat(np.arange(3), 8)
    for file in ("texts.safetensors", "numpy/texts.npy"):
        classifier = Classifier.open(folder, tmp_path / file)
        data = f"folder:{pictures}"
        source = load_source(data)
        found = evaluated(classifier, source, data)
        own = [
            right[8 * NAMES.index(source.key(i).split("/")[-2]) + int(source.key(i)[-5])]
            for i in range(len(source))
        ]
        assert found.top1 == pytest.approx(np.mean(own))
        assert found.log_likelihood is None
    evaluate(folder, data, class_embeddings=tmp_path / file)
    assert "log-likelihood" not in capsys.readouterr().out


def test_files_of_class_embeddings(tmp_path):
    several = {"a": np.float32([[2, 0], [0, 1]]), "b": np.float16([0, -3])}
    save_file(several, tmp_path / "several.safetensors")
    names, found = read_class_embeddings(tmp_path / "several.safetensors", 2)
    by_name = dict(zip(names, found.tolist(), strict=True))
    assert by_name == {"a": pytest.approx([0.5**0.5] * 2), "b": pytest.approx([0, -1])}
    np.save(tmp_path / "unnamed.npy", np.eye(4, dtype=np.float32))
    assert read_class_embeddings(tmp_path / "unnamed.npy", 4)[0] == ()
    np.save(tmp_path / "one.npy", np.ones((1, 4), np.float32))
    np.save(tmp_path / "zero.npy", np.eye(4, dtype=np.float32)[[0, 1, 2, 2]] * [[1], [1], [0], [1]])
    (tmp_path / "text.npy").write_text("no array")
    for file, width, error, message in (
        ("nowhere.npy", 4, MissingFileError, "no file .*nowhere.npy"),
        ("text.npy", 4, InputError, r"is no .npy or .safetensors"),
        ("unnamed.npy", 5, InputError, r"0 has shape \(4,\); the network embeds in 5 dimensions"),
        ("one.npy", 4, InputError, "has 1 classes .* two or more"),
        ("zero.npy", 4, InputError, "2 is zero, NaN or infinite"),
    ):
        with pytest.raises(error, match=message):
            read_class_embeddings(tmp_path / file, width)
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    with pytest.raises(InputError, match="has 4 classes and 3 names"):
        read_class_embeddings(tmp_path / "unnamed.npy", 4)


@pytest.mark.parametrize("kind", KINDS)
def test_yours_keeps_what_the_weights_give(models, pictures, tmp_path, kind):
    """Also where the pictures have as many classes."""
    config = yours.get_config()
    config.pretrained = str(saved(models[kind], tmp_path / "weights"))
    config.data.name = f"folder:{pictures}"
    settings = settings_of(config)
    assert settings.model == SPECS[kind]
    assert settings.metric == OUTPUTS[kind].quality.shown.name
    assert not settings.train_pretrained
    assert settings.from_config(settings.to_config()) == settings


@pytest.mark.parametrize("kind", ["numbers", "embedding"])
@pytest.mark.slow
def test_a_whole_run(models, pictures, tmp_path, kind):
    config = minutes.get_config("runlocal")
    config.pretrained = str(saved(models[kind], tmp_path / "weights"))
    config.model = {k: v for k, v in spec_to_json(SPECS[kind]).items() if k != "blocks"}
    config.data.name, config.metric = f"folder:{pictures}", ""
    config.data.augmentation = {"name": "inception", "scale": (0.5, 1.0)}
    config.data.heldout_fraction, config.budget.macs = 0.3, (0.6, 0.8)
    config.finetune.update({"epochs": 1.0, "batch_size": 4, "warmup_epochs": 0.0})
    config.export = ("stablehlo", "timm")
    run = tmp_path / "run"
    start.run(config, run)
    shown, result = OUTPUTS[kind].quality.shown, json.loads((run / "result.json").read_text())
    assert result["dense"][shown.name] == pytest.approx(0 if kind == "numbers" else 1, abs=1e-5)
    assert "top1" not in result["subnet"]
    export = run / "export/subnet"
    card, content = (export / "README.md").read_text(), export / "preprocessing.json"
    assert OUTPUTS[kind].card.format(3) in card
    assert "tells 3 classes apart" not in card
    assert json.loads(content.read_text())["outputs"] == kind
    assert json.loads((export / "classes.json").read_text()) == list(NAMES)
    assert flora.load(run / "subnet").spec.kind == flora.load(export / "timm").spec.kind == kind
    assert load_file(export / "timm/model.safetensors")["head.weight"].shape == (3, 8)
