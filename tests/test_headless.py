"""A network without classes: what it learns, what it is measured by, and a whole run of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors import numpy as safetensors

import flora_jax as flora
from flora_jax.cluster.mesh import make_mesh
from flora_jax.configs import common, minutes
from flora_jax.configs.common import IMPROVED_STAGES
from flora_jax.evaluation.evaluate import evaluate_images
from flora_jax.evaluation.quality import AGREEMENT, CLASSIFICATION
from flora_jax.flora.evolution import read_history
from flora_jax.flora.filter import score_block
from flora_jax.io.json_lines import read_records
from flora_jax.methods import start
from flora_jax.models import functional
from flora_jax.runs.settings import Settings
from flora_jax.training.step import initial_state, make_step
from tests.helpers.searching import SMALL, search
from tests.helpers.training import NORMALIZATION, SETTINGS, batch_of

SPEC = flora.ViTSpec(image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=0)
POOLS = {
    "token": SPEC,
    "attention": dataclasses.replace(SPEC, blocks=(), class_token=False, pool="attention"),
    "mean": dataclasses.replace(SPEC, blocks=(), pool="mean"),
}
SPACE = flora.RankSpace.regular(SPEC, ratios=(1 / 2, 1))


def relative(features, target):
    """Squared error as a share of the target's square, in float64."""
    features, target = np.float64(features), np.float64(target)
    return ((features - target) ** 2).sum(-1) / ((target**2).sum(-1) + 1e-6)


def outputs(model, images):
    """Pooled features and tokens, float64."""
    found = jax.jit(lambda x: (model(x), model.features(x)))(images)
    return tuple(np.float64(each) for each in found)


def expected(model, dense, images):
    """Cosine of pooled features and error of tokens, of each image."""
    (pooled, tokens), (target, target_tokens) = (outputs(each, images) for each in (model, dense))
    norms = np.linalg.norm(pooled, axis=-1) * np.linalg.norm(target, axis=-1)
    return (pooled * target).sum(-1) / norms, relative(tokens, target_tokens).mean(-1)


def test_features_are_measured_beside_the_dense_models():
    """20 images in batches of 8; neither what fills up nor a skipped image counts."""
    dense, supernet = flora.create(SPEC), flora.factorize(flora.create(SPEC), SPACE)
    is_image = (np.arange(24) < 21) & (np.arange(24) != 9)
    masks = np.float32(is_image).reshape(3, 8)
    batches = [batch_of(i) | {"mask": mask} for i, mask in enumerate(masks)]
    unmeasured = flora.EvaluationSet(batches, NORMALIZATION)
    images = unmeasured.compared_with(dense)
    pixels = np.concatenate([NORMALIZATION(jnp.asarray(b["image"])) for b in batches])[is_image]
    genes = np.stack([SPACE.cheapest_genes, SPACE.full_rank_genes])
    found = flora.evaluate(supernet, images, genes)
    assert list(found) == ["cosine", "relative_error"]
    for row, own in enumerate(genes):
        subnet = flora.extract(supernet, own)
        cosine, error = expected(subnet, dense, pixels)
        each = evaluate_images(subnet, images)
        np.testing.assert_allclose(each["cosine"], cosine, atol=1e-5)
        np.testing.assert_allclose(each["relative_error"], error, atol=1e-5)
        assert found["cosine"][row] == pytest.approx(cosine.mean(), abs=1e-5)
        assert found["relative_error"][row] == pytest.approx(error.mean(), abs=1e-5)
    assert found["cosine"][0] < 0.999
    assert found["cosine"][1] == pytest.approx(1, abs=1e-5)
    alone = flora.evaluate(supernet, images, SPACE.kept[0])
    for name, values in score_block(supernet, 0, images).items():
        np.testing.assert_allclose(values, alone[name], atol=1e-6)
    looks = dict(flora.HeldOut(images, SPACE, "relative_error")(supernet.network))
    assert next(iter(looks.items())) == ("heldout_score", -looks["heldout_relative_error"])
    assert looks["heldout_cosine_smallest"] == found["cosine"][0]
    with pytest.raises(ValueError, match=r"top1 needs a classifier.*compared_with"):
        flora.evaluate(dense, unmeasured)
    with pytest.raises(ValueError, match="these images compare outputs"):
        flora.top1(dense, images)


@pytest.mark.parametrize("pool", POOLS)
def test_the_loss_is_the_error_of_the_features(pool):
    """And of what is pooled, where that is no token; a token that alone is read weighs more."""
    student, teacher = flora.create(POOLS[pool], 1), flora.create(POOLS[pool], 2)
    batch = batch_of(0)
    images = NORMALIZATION(jnp.asarray(batch["image"]))
    (pooled, tokens), (target, target_tokens) = (outputs(m, images) for m in (student, teacher))
    errors = relative(tokens, target_tokens)
    if pool == "token":
        error = (errors[:, 1:].mean() + 0.5 * errors[:, 0].mean()) / 1.5
    else:
        error = errors.mean() + relative(pooled, target).mean()
    structure, parameters = functional.split(student)
    teacher_structure, teacher_parameters = functional.split(teacher)
    weight = 0.3 if pool == "attention" else 0.0  # which stands for 1
    settings = dataclasses.replace(SETTINGS, distill_features=weight)
    step = make_step(structure, settings, NORMALIZATION, make_mesh(), teacher_structure)
    state = initial_state(structure, parameters, settings)
    _, metrics = step(state, batch, None, teacher_parameters)
    np.testing.assert_allclose(metrics[0], (weight or 1) * error, rtol=1e-5)


def test_in_memory_without_labels(tmp_path):
    rng = np.random.default_rng(0)
    images = flora.ImageSet(rng.integers(0, 256, (32, 8, 8, 3), np.uint8))
    dense = flora.create(SPEC)
    supernet = flora.factorize(dense, SPACE)
    recipe = flora.Recipe(epochs=4, batch_size=16, learning_rate=0.1, warmup_epochs=0)
    with pytest.raises(ValueError, match=r"training without a teacher needs.*uncompressed network"):
        flora.train(supernet, images, recipe, directory=tmp_path / "none")
    labelled = flora.create(dataclasses.replace(SPEC, blocks=(), num_classes=3))
    with pytest.raises(ValueError, match="images without labels teach nothing"):
        flora.train(labelled, images, recipe, directory=tmp_path / "none")
    window = SPACE.macs_range()
    with pytest.raises(ValueError, match="measured by its teacher's outputs"):
        flora.evolve(supernet, images, window, directory=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    beside = images.on_devices.compared_with(dense)
    before = flora.evaluate(supernet, beside, SPACE.cheapest_genes)
    trained = flora.train(
        supernet, images, recipe, directory=tmp_path / "train", teacher=dense, heldout=images
    )
    after = flora.evaluate(trained, beside, SPACE.cheapest_genes)
    assert after["relative_error"] < before["relative_error"]
    settings = flora.EvolutionSettings(2, 4, 2, 1, 1)
    best = flora.evolve(
        trained,
        images,
        window,
        settings,
        directory=tmp_path / "search",
        teacher=dense,
        metric="relative_error",
    )
    every = read_history(tmp_path / "search/history.jsonl")
    assert best.score == max(candidate.score for candidate in every) <= 0
    again = flora.evaluate(trained, beside, best.genes)
    found = {"relative_error": -best.score, "cosine": best.metrics["cosine"]}
    assert found == pytest.approx({name: values[0] for name, values in again.items()}, rel=1e-6)


def test_a_history_keeps_the_metric_that_is_shown(tmp_path):
    for name in ("top1", "cosine"):
        search(tmp_path / name, shown=name)
        content = (tmp_path / name).read_bytes()
        assert {tuple(c.metrics) for c in read_history(tmp_path / name)} == {(name,)}
        search(tmp_path / name, None, shown=name)
        assert (tmp_path / name).read_bytes() == content
    assert len(read_history(tmp_path / "top1")) == SMALL.generations * SMALL.population
    assert (
        read_history(tmp_path / "top1")[0].top1
        == read_history(tmp_path / "cosine")[0].metrics["cosine"]
    )


def test_the_metric_is_one_of_the_network():
    headless = dataclasses.replace(Settings().model, blocks=(), num_classes=0)
    assert (Settings().metric, Settings(model=headless).metric) == ("top1", "cosine")
    config = common.published(Settings().model)
    config.model.num_classes = 0
    assert Settings.from_config(config).metric == "cosine"
    assert AGREEMENT.metric("relative_error").more_is_better is False
    with pytest.raises(ValueError, match=r"top1' does not fit .* without classes.*cosine'"):
        AGREEMENT.metric("top1")
    with pytest.raises(ValueError, match=r"'cosine' does not fit a network with classes.*'top1'"):
        CLASSIFICATION.metric("cosine")


@pytest.fixture
def config(tmp_path):
    """A run on pictures without labels, from weights that are there."""
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "pictures" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
        small.resize((10 + i % 3, 9), Image.Resampling.BICUBIC).save(path)
    flora.save(flora.create(SPEC), tmp_path / "weights")
    config = minutes.get_config("runlocal")
    config.stages, config.pretrained = IMPROVED_STAGES, str(tmp_path / "weights")
    config.model.update({"image_size": 8, "embed_dim": 8, "num_heads": 2, "num_classes": 0})
    config.model.depth = 1
    config.data.name = f"images:{tmp_path / 'pictures'}"
    config.data.augmentation = {"name": "inception", "scale": (0.5, 1.0)}
    config.space.ratios, config.budget.macs = (1 / 4, 1 / 2, 1.0), (0.5, 0.75)
    config.metric, config.uniform_baseline = "relative_error", "none"
    for recipe in (config.filter.train, config.supernet, config.finetune):
        recipe.update({"epochs": 1.0, "batch_size": 8, "learning_rate": 0.3})
    config.finetune.epochs = 8.0
    return config


@pytest.mark.slow
def test_a_whole_run(config, tmp_path, capsys):
    run = tmp_path / "run"
    start.run(config, run)
    result = json.loads((run / "result.json").read_text())
    assert result["dense"]["cosine"] == pytest.approx(1, abs=1e-5)
    entry = result["subnet"]
    assert list(entry) == ["cosine", "relative_error", "macs", "params", "budget", "against"]
    assert list(entry["against"]) == ["allocated", "dense"]
    each = safetensors.load((run / "test_images.safetensors").read_bytes())
    assert set(each) == {
        f"{model}/{name}"
        for model in ("dense", "subnet", "allocated")
        for name in ("cosine", "relative_error")
    }
    assert entry["cosine"] == pytest.approx(each["subnet/cosine"].mean(), abs=1e-6)
    every = read_history(run / "search/history.jsonl")
    best = json.loads((run / "search/best.json").read_text())
    winner = max((c for c in every if c.has_seen_all), key=lambda c: c.score)
    searched = best.get("searched", best)
    assert (searched["score"], searched["cosine"]) == (winner.score, winner.metrics["cosine"])
    assert best["score"] < 0
    printed = capsys.readouterr()
    assert "relative error" in printed.out
    assert "best_cosine" in printed.err
    looks = read_records(run / "finetune/subnet/metrics.jsonl")
    looks = [look for look in looks if "heldout_cosine" in look]
    assert looks[-1]["heldout_relative_error"] < looks[0]["heldout_relative_error"]
    assert "heldout_cosine_smallest" in (run / "supernet/metrics.jsonl").read_text()
    with Image.open(run / "report.png") as image:
        image.verify()
    page = (run / "report.html").read_text()
    assert "held-out cosine" in page
    assert "Accuracy by class" not in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained": ""}, "num_classes is 0.*pretrain need exclusive classes"),
        ({"finetune.distill": False}, "finetune: distill must be True"),
        ({"stages": ("pretrain", "slim", "evaluate")}, "but slim need exclusive classes to learn"),
        ({"metric": "log_likelihood"}, "'log_likelihood' does not fit .*mean 'relative_error'"),
    ],
)
def test_what_a_network_without_classes_cannot_learn_from(config, tmp_path, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        start.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "dense").exists()
