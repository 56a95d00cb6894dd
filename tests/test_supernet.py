"""The supernet: inherited weights, run-time genes, and the networks cut out of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_jax as flora
from flora_jax.data.normalize import Normalization
from flora_jax.evaluation import evaluate as evaluation
from flora_jax.flora.filter import score_block
from flora_jax.flora.layer import RankedLinear
from flora_jax.flora.supernet import abstract_supernet, extract_ranks
from flora_jax.flora.svd import svd_factors
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.layers import make_linear
from tests.helpers.networks import TINY_SWIN, TWO_BLOCKS, every_triple

NORMALIZATION = Normalization((0.5,), (0.25,))
NUM_IMAGES, BATCH = 13, 5
DEEP = dataclasses.replace(TWO_BLOCKS, depth=12, blocks=())
DEEP_SWIN = dataclasses.replace(TINY_SWIN, depths=(2, 12), blocks=())


@pytest.fixture(scope="module")
def supernet(tiny_model, tiny_space):
    return flora.factorize(tiny_model, tiny_space)


@pytest.fixture(scope="module")
def evaluation_batches(tiny_model, tiny_spec):
    """13 images in batches of 5. The labels are the model's own top class of most images, and
    the images that fill up the last batch would count as correct if they were not masked."""
    rng = np.random.default_rng(5)
    padded = -(-NUM_IMAGES // BATCH) * BATCH
    images = rng.integers(0, 256, (padded, *tiny_spec.image_shape), np.uint8)
    labels = np.array(tiny_model(NORMALIZATION(jnp.asarray(images))).argmax(-1), np.int32)
    labels[[1, 6, 9]] = (labels[[1, 6, 9]] + 1) % tiny_spec.num_classes
    mask = np.float32(np.arange(padded) < NUM_IMAGES)
    arrays = {"image": images, "label": labels, "mask": mask}
    return [
        {name: array[i : i + BATCH] for name, array in arrays.items()}
        for i in range(0, padded, BATCH)
    ]


@pytest.fixture(scope="module")
def evaluation_set(evaluation_batches):
    return flora.EvaluationSet(evaluation_batches, NORMALIZATION)


@pytest.mark.parametrize("implementation", ["masked", "sliced"])
def test_full_rank_is_the_dense_model(tiny_model, tiny_space, tiny_images, implementation):
    supernet = flora.factorize(tiny_model, tiny_space, implementation=implementation)
    logits = supernet(tiny_images, tiny_space.full_rank_genes)
    np.testing.assert_allclose(logits, tiny_model(tiny_images), atol=1e-5)
    np.testing.assert_allclose(supernet.network(tiny_images), tiny_model(tiny_images), atol=1e-5)


@settings(max_examples=12)
@given(genes=st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_extracted_network_is_the_supernet_at_these_genes(supernet, tiny_space, tiny_images, genes):
    subnet = flora.extract(supernet, genes)
    np.testing.assert_allclose(subnet(tiny_images), supernet(tiny_images, genes), atol=1e-5)
    assert flora.macs(subnet.spec) == tiny_space.macs(genes)
    assert flora.num_params(subnet.spec) == tiny_space.params(genes)
    for layer, rank, stored in zip(
        tiny_space.spec.layers, tiny_space.ranks(genes), subnet.spec.ranks, strict=True
    ):
        dense, pair = layer.num_weights(None), layer.num_weights(int(rank))
        assert stored == (None if pair >= dense else rank)


def test_extract_ranks_that_the_space_does_not_list(supernet, tiny_model, tiny_images):
    """Against the dense model with each kernel replaced by its best approximation of that rank."""
    ranks = (1, 3, 5, 7, 8, 6)
    structure, parameters = functional.split(tiny_model)
    for layer, rank in zip(tiny_model.spec.layers, ranks, strict=True):
        left, s, right = np.linalg.svd(parameters[f"{layer.name}.kernel"], full_matrices=False)
        parameters[f"{layer.name}.kernel"] = (left[:, :rank] * s[:rank]) @ right[:rank]
    wanted = functional.merge(structure, parameters)(tiny_images)
    subnet = extract_ranks(supernet, ranks)
    np.testing.assert_allclose(subnet(tiny_images), wanted, atol=1e-5)
    assert subnet.spec.ranks == (1, 3, 5, None, None, 6)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ((2,) * 5, "expected 6 ranks, got 5"),
        ((2,) * 5 + (9,), "rank 9"),
        ((0,) + (2,) * 5, r"rank 0 of blocks\.0\.attn\.qkv lies outside 1\.\.8"),
    ],
)
def test_extract_bad_ranks(supernet, ranks, message):
    with pytest.raises(ValueError, match=message):
        extract_ranks(supernet, ranks)


BAD_GENES = [
    ([0] * 5, r"shape \(5,\)"),
    ([0] * 7, r"shape \(7,\)"),
    ([0, 0, 0, 0, 3, 0], r"gene 3 of blocks\.1\.mlp\.fc1 lies outside 0\.\.2"),
    ([-1, 0, 0, 0, 0, 0], r"gene -1 of blocks\.0\.attn\.qkv lies outside 0\.\.2"),
    ([0.0] * 6, "integers, got float64"),
]
POPULATION = ([[0] * 6] * 2, r"shape \(2, 6\)")


@pytest.mark.parametrize(("genes", "message"), [*BAD_GENES, POPULATION])
def test_bad_genes(supernet, tiny_images, evaluation_set, genes, message):
    with pytest.raises(ValueError, match=message):
        supernet(tiny_images, genes)
    with pytest.raises(ValueError, match=message):
        flora.extract(supernet, genes)
    if message != POPULATION[1]:
        with pytest.raises(ValueError, match=message):
            flora.top1(supernet, evaluation_set, genes)


def test_bad_images(supernet):
    with pytest.raises(ValueError, match=r"expected \[B, 8, 8, 3\]"):
        supernet(np.zeros((1, 8, 8, 1), np.float32), [0] * 6)
    with pytest.raises(ValueError, match="dtype uint8"):
        supernet(np.zeros((1, 8, 8, 3), np.uint8), [0] * 6)


def test_factorize_errors(tiny_model, micro_space, tiny_space):
    with pytest.raises(ValueError, match="spec is not the spec of the rank space"):
        flora.factorize(tiny_model, micro_space)
    with pytest.raises(
        ValueError, match="unknown implementation 'scanned'; choose one of masked, sliced, tiled"
    ):
        flora.factorize(tiny_model, tiny_space, implementation="scanned")


def test_traced_genes(supernet, tiny_images):
    traced = jax.jit(lambda genes: supernet(tiny_images, genes))
    for genes in (np.zeros(6, np.int32), np.array([2, 0, 1, 1, 2, 0])):
        np.testing.assert_allclose(traced(genes), supernet(tiny_images, genes), atol=4e-6)
    with pytest.raises(ValueError, match=r"shape \(7,\), expected \(6,\)"):
        traced(np.zeros(7, np.int32))


def test_one_program_serves_every_subnet(supernet, tiny_images, evaluation_set):
    genes = every_triple(supernet.space, 0)
    supernet(tiny_images, genes[0])
    flora.top1(supernet, evaluation_set, genes[:1])
    evaluation.evaluate_images(supernet, evaluation_set, genes[:1], slice(1, 2))
    programs = (evaluation.sum_model_metrics, evaluation.of_images)
    compiled = [program._cache_size() for program in programs]
    with jax.no_tracing():
        for one in genes[1:4]:
            supernet(tiny_images, one)
    flora.top1(supernet, evaluation_set, genes)
    evaluation.evaluate_images(supernet, evaluation_set, genes)
    assert [program._cache_size() for program in programs] == compiled


def test_subnets_are_scored_image_by_image(supernet, evaluation_set):
    genes, of_images = every_triple(supernet.space, 1)[::9], evaluation.evaluate_images
    found = of_images(supernet, evaluation_set, genes)
    for name, means in (("is_correct", "top1"), ("log_likelihood", "log_likelihood")):
        expected = flora.evaluate(supernet, evaluation_set, genes)[means]
        assert found[name].shape == (len(genes), NUM_IMAGES)
        np.testing.assert_allclose(found[name].mean(axis=1), expected, rtol=1e-6)
        parts = [
            of_images(supernet, evaluation_set, genes, slice(first, last))[name]
            for first, last in ((0, 1), (1, 3))
        ]
        assert [part.shape[1] for part in parts] == [BATCH, NUM_IMAGES - BATCH]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), found[name])
    one = of_images(supernet, evaluation_set, genes[1])
    np.testing.assert_array_equal(one["predicted"], found["predicted"][1])


def test_every_layer_and_rank_matters(supernet, tiny_images):
    """So that agreement elsewhere in this file means something."""
    full = supernet(tiny_images, [2] * 6)
    for layer in range(6):
        genes = np.full(6, 2)
        genes[layer] = 1
        half = supernet(tiny_images, genes)
        genes[layer] = 0
        assert abs(half - full).max() > 1e-2
        assert abs(half - supernet(tiny_images, genes)).max() > 1e-2


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_svd_factors(shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    singular_values = np.linalg.svd(kernel, compute_uv=False)
    for into, (scaled, orthonormal) in {"down": (0, 1), "up": (1, 0)}.items():
        factors = svd_factors(kernel, into)
        assert factors[0].shape == (min(shape), shape[0])
        assert factors[1].shape == (min(shape), shape[1])
        assert all(f.dtype == np.float32 and f.flags.c_contiguous for f in factors)
        np.testing.assert_allclose(factors[0].T @ factors[1], kernel, atol=1e-5)
        np.testing.assert_allclose(
            factors[orthonormal] @ factors[orthonormal].T, np.eye(min(shape)), atol=1e-5
        )
        norms = np.linalg.norm(factors[scaled], axis=1)
        np.testing.assert_allclose(norms, singular_values, rtol=1e-5)


def test_singular_values_go_into_up_for_fc2_alone(supernet, tiny_model):
    dense, parameters = (functional.split(m)[1] for m in (tiny_model, supernet.network))
    for layer in tiny_model.spec.layers:
        scaled = "up" if layer.name.endswith("fc2") else "down"
        norms = np.linalg.norm(parameters[f"{layer.name}.{scaled}"], axis=1)
        singular_values = np.linalg.svd(dense[f"{layer.name}.kernel"], compute_uv=False)
        np.testing.assert_allclose(norms, singular_values, rtol=1e-5)
    untouched = dense.keys() & parameters.keys()
    assert untouched == {name for name in dense if not name.endswith(".kernel")} | {
        "patch_embed.proj.kernel",
        "blocks.0.attn.proj.kernel",
        "blocks.1.attn.proj.kernel",
        "head.kernel",
    }
    for name in untouched:
        np.testing.assert_array_equal(dense[name], parameters[name])


def test_abstract_supernet(supernet, tiny_space):
    structure, shapes = functional.split(abstract_supernet(tiny_space).network)
    real_structure, real = functional.split(supernet.network)
    assert structure == real_structure
    assert {name: s.shape for name, s in shapes.items()} == {n: p.shape for n, p in real.items()}


def test_top1_counts_exactly(tiny_model, supernet, evaluation_batches, evaluation_set):
    def share_correct(logits_of):
        correct = 0
        for batch in evaluation_batches:
            classes = np.asarray(logits_of(NORMALIZATION(jnp.asarray(batch["image"])))).argmax(-1)
            correct += int(((classes == batch["label"]) & (batch["mask"] == 1)).sum())
        return correct / NUM_IMAGES

    dense = flora.top1(tiny_model, evaluation_set)
    assert isinstance(dense, float)
    assert dense == share_correct(tiny_model) == 10 / 13
    genes = np.array([[2] * 6, [0] * 6, [1, 2, 0, 0, 1, 2]])
    scores = flora.top1(supernet, evaluation_set, genes)
    assert scores.dtype == np.float64
    assert scores.tolist() == [share_correct(lambda x, g=g: supernet(x, g)) for g in genes]
    assert flora.top1(supernet, evaluation_set, genes[1]) == scores[1]
    assert flora.top1(supernet.network, evaluation_set) == scores[0]


@pytest.mark.parametrize("block", [0, 1])
def test_score_block_measures_the_whole_network(supernet, evaluation_set, block):
    scores = score_block(supernet, block, evaluation_set)
    expected = flora.evaluate(supernet, evaluation_set, every_triple(supernet.space, block))
    assert len(np.unique(scores["top1"])) > 1
    np.testing.assert_array_equal(scores["top1"], expected["top1"])
    np.testing.assert_allclose(scores["log_likelihood"], expected["log_likelihood"], rtol=1e-5)


def test_score_block_keeps_the_order_of_the_kept_triples(supernet, evaluation_set, tiny_space):
    every = every_triple(supernet.space, 1)
    rows = [3, 4, 11, 26]
    kept = tiny_space.keep([tiny_space.kept[0], every[rows, 3:]])
    some = score_block(flora.Supernet(supernet.network, kept), 1, evaluation_set)
    every_score = score_block(supernet, 1, evaluation_set)
    for metric in ("top1", "log_likelihood"):
        np.testing.assert_array_equal(some[metric], every_score[metric][rows])


def test_a_network_and_a_space_of_other_ranks_are_no_supernet(supernet):
    other = flora.RankSpace.regular(supernet.space.spec, (0.5, 1.0))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv of the network takes the ranks"):
        flora.Supernet(supernet.network, other)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_factorize_of_what_is_not_finite(tiny_model, tiny_space, tiny_images, value):
    structure, parameters = functional.split(tiny_model)
    stats = flora.calibrate(tiny_model, tiny_images)
    name = "blocks.1.mlp.fc2"
    moments = stats.moments | {name: np.full_like(stats.moments[name], value)}
    with pytest.raises(
        ValueError, match=r"blocks\.1\.mlp\.fc2 .* second moment of its input is not"
    ):
        flora.factorize(
            tiny_model, tiny_space, calibration=dataclasses.replace(stats, moments=moments)
        )
    parameters[f"{name}.kernel"] = parameters[f"{name}.kernel"].at[2, 3].set(value)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc2 .* its kernel is not finite"):
        flora.factorize(functional.merge(structure, parameters), tiny_space)


def test_factorize_where_a_decomposition_fails(tiny_model, tiny_space, tiny_images):
    """The moment of no tokens, below zero; and singular values that float16 cannot hold."""
    stats, name = flora.calibrate(tiny_model, tiny_images), "blocks.0.attn.qkv"
    moments = stats.moments | {name: -stats.moments[name]}
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv cannot .*: .*positive definite"):
        flora.factorize(
            tiny_model, tiny_space, calibration=dataclasses.replace(stats, moments=moments)
        )
    structure, parameters = functional.split(tiny_model)
    parameters[f"{name}.kernel"] = jnp.full_like(parameters[f"{name}.kernel"], 6e4, jnp.float16)
    with pytest.raises(ValueError, match=r"attn\.qkv cannot .*: its factors exceed float16"):
        flora.factorize(functional.merge(structure, parameters), tiny_space)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_factorised_in_float32(tiny_model, tiny_space, dtype):
    structure, parameters = functional.split(tiny_model)
    halves = {name: p.astype(dtype) for name, p in parameters.items()}
    supernet = flora.factorize(functional.merge(structure, halves), tiny_space)
    found, layer = functional.split(supernet.network)[1], tiny_space.spec.layers[0]
    kernel = np.asarray(halves[f"{layer.name}.kernel"], np.float32)
    for part, factor in zip(("down", "up"), svd_factors(kernel, "down"), strict=True):
        assert found[f"{layer.name}.{part}"].dtype == dtype
        np.testing.assert_array_equal(found[f"{layer.name}.{part}"], factor.astype(dtype))


@pytest.mark.parametrize("spec", [DEEP, DEEP_SWIN], ids=["vit", "swin"])
def test_slots_are_in_the_order_of_genes(spec):
    """Also from block 10 on, whose name comes before that of block 2."""
    space = flora.RankSpace.regular(spec, ratios=(1 / 4, 1 / 2, 1))
    structure, parameters = functional.split(abstract_supernet(space, "masked").network)
    names = [".".join(map(str, path)) for path, _ in structure.slots]
    assert names == [f"{layer.name}.gene" for layer in spec.layers]
    assert [last for _, last in structure.slots] == space.full_rank_genes.tolist()
    assert not any("gene" in name for name in parameters)


def test_genes_reach_the_layers_they_belong_to():
    space = flora.RankSpace.regular(DEEP, ratios=(1 / 4, 1 / 2, 1))
    structure, parameters = functional.split(flora.factorize(flora.create(DEEP), space).network)
    genes = space.sample(np.random.default_rng(0), 1)[0]
    network = functional.merge(structure, parameters, genes)
    for i, block in enumerate(network.blocks):
        layers = (block.attn.qkv, block.mlp.fc1, block.mlp.fc2)
        assert [int(layer.gene[...]) for layer in layers] == genes[3 * i : 3 * i + 3].tolist()


def test_a_layer_of_the_callers_own():
    """The factory is told by (layer, rank) what it makes, once for each searchable layer."""
    made = []

    def linear(layer, rank, *, rngs):
        made.append((layer, rank))
        return make_linear(layer, rank, rngs=rngs)

    spec = DEEP.with_ranks((1, None, 2) * 12)
    model = flora.create(spec, linear=linear)
    assert sorted(made, key=str) == sorted(zip(spec.layers, spec.ranks, strict=True), key=str)
    shapes, others = (functional.split(m)[1] for m in (model, create_abstract(spec)))
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, others)


def test_a_ranked_layer_is_made_of_shapes_alone():
    layer = dataclasses.replace(DEEP.layers[0], use_bias=False)
    ranked = nnx.eval_shape(lambda: RankedLinear(layer, (1, 8), "masked", rngs=nnx.Rngs(0)))
    structure, parameters = functional.split(ranked)
    assert {name: p.shape for name, p in parameters.items()} == {"down": (8, 8), "up": (8, 24)}
    assert structure.slots == ((("gene",), 1),)
