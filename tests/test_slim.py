"""ViT-Slim: gates and masks as published, and the cut model against the masked one."""

import dataclasses
import functools
import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_jax as flora
from flora_jax import slim
from flora_jax.models import create_abstract, functional, spec_from_json, spec_to_json
from flora_jax.models.spec import BlockSpec

GOLDENS = {"full": "dim", "head": "head", "uniform": "uniform"}
TINY = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "num_heads": 2, "num_classes": 3}
TINY_SWIN = flora.SwinSpec(
    image_size=8,
    patch_size=1,
    embed_dim=8,
    depths=(2, 1),
    num_heads=(2, 4),
    window_size=4,
    num_classes=3,
)

# Compiling is most of the time here: the quickest program will do.
QUICK = {"xla_backend_optimization_level": 0}


def forward(graphdef, parameters, images):
    return functional.merge(graphdef, parameters)(images)


_compiled = jax.jit(forward, static_argnums=0, compiler_options=QUICK)


def logits(model, images):
    """Of a model or a gated one, compiled: networks that differ in values share a program."""
    return _compiled(*functional.split(getattr(model, "network", model)), images)


def random_model(spec, seed=0):
    """No parameter is at a special value such as zero."""
    rng, model = np.random.default_rng(seed), create_abstract(spec)
    shapes = functional.split(model)[1]
    values = {n: np.float32(rng.normal(0.02, 0.4, s.shape)) for n, s in shapes.items()}
    return functional.with_parameters(model, values)


@functools.cache
def gated_model(spec, **options):
    """Gates in 0.2..1.2, tokens' before their tanh."""
    rng = np.random.default_rng(1)
    gated = slim.add_gates(random_model(spec), **options)
    gates = {
        name: rng.uniform(0.2, 1.2, value.shape)
        for name, value in functional.split(gated.network)[1].items()
        if name.endswith("gate")
    }
    return with_gates(gated, gates)


def with_gates(gated, gates):
    graphdef, parameters = functional.split(gated.network)
    parameters |= {name: jnp.float32(value) for name, value in gates.items()}
    return dataclasses.replace(gated, network=functional.merge(graphdef, parameters))


def random_masks(spec, rng, tokens=True):
    """Any shares of each kind; heads may go entirely, every block keeps something of each."""

    def kept(shape):
        mask = rng.random(shape) < rng.random()
        mask[(*rng.integers(0, shape),)] = True
        return mask

    patch = ()
    if tokens:
        leaves_at = rng.integers(0, len(spec.blocks) + 1, spec.num_tokens)
        leaves_at[: spec.num_prefix_tokens + 1] = len(spec.blocks)
        patch = tuple(leaves_at > b for b in range(len(spec.blocks)))
    return slim.Masks(
        attn=tuple(kept((block.num_heads, block.head_dim)) for block in spec.blocks),
        mlp=tuple(kept((block.mlp_dim,)) for block in spec.blocks),
        patch=patch,
        thresholds={},
    )


def images_of(spec, number=2):
    rng = np.random.default_rng(7)
    return rng.normal(size=(number, *spec.image_shape)).astype(np.float32)


@pytest.fixture(scope="module")
def tiny_gated():
    return gated_model(flora.ViTSpec(**TINY, depth=3))


# Against the published implementation


@pytest.fixture(scope="module", params=list(GOLDENS))
def golden(request, data_dir):
    with np.load(data_dir / f"slim_deit_{request.param}.npz") as archive:
        return dict(archive) | {"attention": GOLDENS[request.param]}


@pytest.fixture(scope="module")
def golden_gated(golden, micro_spec):
    arrays = {k.removeprefix("sd/"): v for k, v in golden.items() if k.startswith("sd/")}
    return slim.from_state_dict(arrays, micro_spec, golden["attention"])


def test_gated_logits_and_penalty(golden, golden_gated):
    images = golden["images_nchw"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(logits(golden_gated, images), golden["soft_logits"], atol=1e-4)
    parameters = functional.split(golden_gated.network)[1]
    penalty = slim.SparsityPenalty(attn=2e-4, mlp=5e-5, patch=1e-4)
    sums = golden["sparsity_attn_mlp_patch"]
    np.testing.assert_allclose(penalty.terms(parameters), sums, rtol=1e-6)
    np.testing.assert_allclose(penalty(parameters), sums @ [2e-4, 5e-5, 1e-4], rtol=1e-6)


@pytest.mark.parametrize("budget", range(3))
def test_masks_and_logits(golden, golden_gated, budget):
    images, spec = golden["images_nchw"].transpose(0, 2, 3, 1), golden_gated.spec
    wanted = {
        name.removeprefix(f"b{budget}/"): value
        for name, value in golden.items()
        if name.startswith(f"b{budget}/")
    }
    masks = slim.threshold(golden_gated, *golden["budgets"][budget].tolist())
    thresholds = [masks.thresholds["attn"], masks.thresholds["mlp"]]
    np.testing.assert_array_equal(thresholds, wanted["threshold_attn_mlp"])
    attn = np.broadcast_to(wanted["attn_mask"][:, 0, 0, :, 0, :], (3, 3, 16))
    np.testing.assert_array_equal(masks.attn, attn == 1)
    np.testing.assert_array_equal(masks.mlp, wanted["mlp_mask"][:, 0, 0] == 1)
    np.testing.assert_array_equal(masks.patch, wanted["patch_mask"][:, 0, :, 0] == 1)
    flops = slim.published_flops(spec, masks)
    np.testing.assert_array_equal(flops, wanted["reference_flops_total_searched"])

    masked = logits(slim.apply_masks(golden_gated, masks), images)
    np.testing.assert_allclose(masked, wanted["logits"], atol=1e-4)
    for tile in (1, 8):
        small = slim.extract(golden_gated, masks, fold=False, tile=tile)
        np.testing.assert_allclose(logits(small, images), wanted["logits"], atol=1e-4)
        assert all(
            block.head_dim % tile == 0 and block.mlp_dim % tile == 0 for block in small.spec.blocks
        )
        assert flora.macs(small.spec) < flora.macs(spec)


# Gates


@pytest.mark.parametrize(
    ("attention", "shape"), [("dim", (2, 4)), ("head", (2, 1)), ("uniform", (1, 4))]
)
def test_shapes_of_the_gates(tiny_gated, attention, shape):
    spec = tiny_gated.spec
    gated = slim.add_gates(random_model(spec), attention)
    gates = gated.gates()
    assert [gate.shape for gate in gates["attn"]] == [shape] * 3
    assert [gate.shape for gate in gates["mlp"]] == [(32,)] * 3
    assert [gate.shape for gate in gates["patch"]] == [(17,)] * 3
    abstract = functional.split(slim.abstract_gated(spec, attention).network)[1]
    real = functional.split(gated.network)[1]
    assert {n: p.shape for n, p in abstract.items()} == {n: p.shape for n, p in real.items()}


def test_open_gates_change_little():
    spec = flora.ViTSpec(**TINY, depth=3)
    model, images = random_model(spec), images_of(spec)
    dense = logits(model, images)
    np.testing.assert_allclose(logits(slim.add_gates(model), images), dense, rtol=0.05, atol=0.05)
    without = slim.add_gates(model, tokens=False)
    np.testing.assert_allclose(logits(without, images), dense, atol=1e-5)
    assert without.gates()["patch"] == []


@pytest.mark.parametrize("attention", ["dim", "head", "uniform"])
def test_the_gradient_reaches_every_gate(attention):
    gated = gated_model(flora.ViTSpec(**TINY, depth=2), attention=attention)
    graphdef, parameters = functional.split(gated.network)
    images = images_of(gated.spec)
    gradient = jax.grad(lambda p: (forward(graphdef, p, images) ** 2).sum())
    grads = jax.jit(gradient, compiler_options=QUICK)(parameters)
    gates = {name: grad for name, grad in grads.items() if name.endswith("gate")}
    assert len(gates) == 6
    for name, grad in gates.items():
        assert (grad != 0).all(), name


def test_penalty_of_a_swin_has_no_token_term():
    gated = slim.add_gates(random_model(TINY_SWIN))
    terms = slim.SparsityPenalty().terms(functional.split(gated.network)[1])
    np.testing.assert_allclose(terms, [8 + 8 + 16, 32 + 32 + 64, 0])


# Budgets


def test_kept_shares_and_order(tiny_gated):
    masks, gates = slim.threshold(tiny_gated, 0.5, 0.25, 0.6), tiny_gated.gates()
    for kind, budget in (("attn", 0.5), ("mlp", 0.25)):
        kept = np.stack(getattr(masks, kind))
        values = np.stack(gates[kind])
        assert kept.sum() == round(budget * kept.size)
        assert values[kept].min() >= masks.thresholds[kind] > values[~kept].max()
    patch = np.stack(masks.patch)
    assert patch[:, 0].all()
    assert (patch[:-1] >= patch[1:]).all()
    wanted = np.stack(gates["patch"]) >= masks.thresholds["patch"]
    wanted[:, 0] = True
    np.testing.assert_array_equal(patch, [wanted[b:].any(0) for b in range(3)])


def test_whole_budget_keeps_everything(tiny_gated):
    masks = slim.threshold(tiny_gated)
    assert all(mask.all() for mask in (*masks.attn, *masks.mlp, *masks.patch))
    assert slim.cut_spec(tiny_gated.spec, masks) == tiny_gated.spec


@pytest.fixture(scope="module")
def costs(tiny_gated):
    """MACs of the cut model at a common budget of 0.001, 0.002, ... 1."""
    spec = tiny_gated.spec
    budgets = [(step / 1000,) * 3 for step in range(1, 1001)]
    return [slim.cut_spec(spec, slim.threshold(tiny_gated, *b)).macs() for b in budgets]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_threshold_to_macs_spends_the_budget(tiny_gated, costs, data):
    target = data.draw(st.integers(min(costs), max(costs) + 9) | st.sampled_from(costs))
    masks = slim.threshold_to_macs(tiny_gated, target)
    cost = slim.cut_spec(tiny_gated.spec, masks).macs()
    assert cost <= target
    assert cost == max(other for other in costs if other <= target)
    step = 1000 - costs[::-1].index(cost)
    budget = (step / 1000,) * 3
    assert masks.thresholds == slim.threshold(tiny_gated, *budget).thresholds
    assert step == 1000 or costs[step] > target


@pytest.mark.parametrize("tile", [1, 2])
def test_threshold_to_macs_on_a_swin(tile):
    target = int(0.6 * TINY_SWIN.macs())
    masks = slim.threshold_to_macs(gated_model(TINY_SWIN), target, tile)
    assert 0.9 * target < slim.cut_spec(TINY_SWIN, masks, tile).macs() <= target


def test_unreachable_macs(tiny_gated):
    with pytest.raises(ValueError, match=r"no budget reaches 10 MACs; the least is (\d+)") as error:
        slim.threshold_to_macs(tiny_gated, 10)
    least = int(str(error.value).rsplit(" ", 1)[1])
    masks = slim.threshold_to_macs(tiny_gated, least)
    assert slim.cut_spec(tiny_gated.spec, masks).macs() == least


@pytest.mark.parametrize("kind", ["attn", "mlp", "patch"])
@pytest.mark.parametrize("budget", [0, -1, 1.5, math.nan])
def test_bad_budget(tiny_gated, kind, budget):
    with pytest.raises(ValueError, match=rf"budget {kind}={budget} lies outside \(0, 1\]"):
        slim.threshold(tiny_gated, **{kind: budget})


def test_token_budget_without_token_gates():
    gated = slim.add_gates(random_model(TINY_SWIN))
    with pytest.raises(ValueError, match=r"budget patch=0\.5, but .* tokens have no gates"):
        slim.threshold(gated, patch=0.5)


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The log of the package, which does not propagate where the command line was run."""
    monkeypatch.setattr(logging.getLogger("flora_jax"), "propagate", True)
    return caplog


def test_a_block_is_never_emptied(tiny_gated, warnings):
    low = {
        "blocks.1.attn.qkv.gate": np.linspace(0.1, 0.05, 8).reshape(2, 4),
        "blocks.2.mlp.fc2.gate": np.linspace(0.1, 0.05, 32),
    }
    gated = with_gates(tiny_gated, low)
    masks = slim.threshold(gated, 0.5, 0.5)
    assert [mask.sum() for mask in masks.attn][1] == 1
    assert [mask.sum() for mask in masks.mlp][2] == 1
    assert masks.attn[1][0, 0], "the largest gate"
    assert [record.getMessage() for record in warnings.records] == [
        "the budget empties the attention of block 1: its largest gate is kept all the same",
        "the budget empties the MLP of block 2: its largest gate is kept all the same",
    ]
    images = images_of(gated.spec)
    small, masked = slim.extract(gated, masks, fold=False), slim.apply_masks(gated, masks)
    np.testing.assert_allclose(logits(small, images), logits(masked, images), atol=1e-4)


def test_only_the_budget_found_warns(tiny_gated, warnings):
    slim.threshold_to_macs(tiny_gated, tiny_gated.spec.macs() - 1)
    assert not warnings.records


# The cut


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    distilled=st.booleans(),
    qkv_bias=st.booleans(),
    tile=st.sampled_from([1, 3]),
)
def test_cut_is_masked(seed, distilled, qkv_bias, tile, count_macs):
    rng = np.random.default_rng(seed)
    spec = flora.ViTSpec(**TINY, depth=3, distilled=distilled, qkv_bias=qkv_bias)
    check_cut(gated_model(spec), random_masks(spec, rng), tile, count_macs)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), qkv_bias=st.booleans(), tile=st.sampled_from([1, 3]))
def test_cut_is_masked_on_a_swin(seed, qkv_bias, tile, count_macs):
    rng = np.random.default_rng(seed)
    spec = dataclasses.replace(TINY_SWIN, qkv_bias=qkv_bias)
    check_cut(gated_model(spec), random_masks(spec, rng, tokens=False), tile, count_macs)


def test_the_first_heads_leave_a_swin_with_their_position_biases(count_macs):
    gated = gated_model(TINY_SWIN)
    masks = slim.threshold(gated)
    attn = [mask.copy() for mask in masks.attn]
    attn[0][0] = attn[1][0] = attn[2][[0, 2]] = False
    check_cut(gated, dataclasses.replace(masks, attn=tuple(attn)), 1, count_macs)


def check_cut(gated, masks, tile, count_macs):
    images, masked = images_of(gated.spec), slim.apply_masks(gated, masks)
    small = slim.extract(gated, masks, fold=False, tile=tile)
    assert small.spec == slim.cut_spec(gated.spec, masks, tile)
    np.testing.assert_allclose(logits(small, images), logits(masked, images), atol=1e-4)
    check_costs(small, count_macs)


def check_costs(model, count_macs):
    spec, (graphdef, parameters) = model.spec, functional.split(model)
    assert sum(p.size for p in parameters.values()) == flora.num_params(spec)
    image = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    products = count_macs(jax.make_jaxpr(forward, static_argnums=0)(graphdef, parameters, image))
    norms = sum(2 * into.tokens * into.width for into in spec.block_inputs)
    if spec.family == "vit":
        norms += (1 + spec.distilled) * spec.embed_dim
    else:
        first, last = spec.stages
        norms += 2 * first.tokens * first.width + last.width * first.tokens // 4
    assert products + norms == flora.macs(spec)


def test_head_widths_and_rounding(tiny_gated):
    spec, masks = tiny_gated.spec, slim.threshold(tiny_gated)
    attn = [mask.copy() for mask in masks.attn]
    attn[0][1, :3], attn[1][0] = False, False
    attn[2][:, 2:] = False
    mlp = [mask.copy() for mask in masks.mlp]
    mlp[0][5:], mlp[1][1:], mlp[2][31] = False, False, False
    masks = dataclasses.replace(masks, attn=tuple(attn), mlp=tuple(mlp))
    shapes = [
        [(b.num_heads, b.head_dim, b.mlp_dim) for b in slim.cut_spec(spec, masks, tile).blocks]
        for tile in (1, 3)
    ]
    assert shapes == [[(2, 4, 5), (1, 4, 1), (2, 2, 31)], [(2, 4, 6), (1, 4, 3), (2, 3, 32)]]
    with pytest.raises(ValueError, match="tile must be at least 1, got 0"):
        slim.cut_spec(spec, masks, 0)


def attention_of_a_masked_block(parameters, name, x, mask, kept):
    """float64 [N, D]: masked tokens come in as zeros and take part as keys and values."""
    heads, width = mask.shape
    x = np.where(kept[:, None], x, 0)
    qkv = x @ parameters[f"{name}.qkv.kernel"] + parameters[f"{name}.qkv.bias"]
    query, key, value = (qkv.reshape(-1, 3, heads, width) * mask).swapaxes(0, 1)
    return mixed_heads(query, key, value, width, 0) @ parameters[f"{name}.proj.kernel"]


def attention_of_a_cut_block(parameters, name, x, num_heads, num_left):
    """float64 [N, D] for the tokens that stay; one constant stands for those that left."""
    bias = parameters[f"{name}.qkv.bias"]
    qkv = np.concatenate([x @ parameters[f"{name}.qkv.kernel"] + bias, bias[None]])
    query, key, value = qkv.reshape(len(qkv), 3, num_heads, -1).swapaxes(0, 1)
    extra = np.where(np.arange(len(qkv)) == len(x), np.log(num_left), 0)
    mixed = mixed_heads(query[:-1], key, value, query.shape[-1], extra)
    return mixed @ parameters[f"{name}.proj.kernel"]


def mixed_heads(query, key, value, width, extra):
    weights = np.exp(np.einsum("qhd,khd->hqk", query, key) / np.sqrt(width) + extra)
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, value).reshape(len(query), -1)


def test_the_constant_key_is_exact_where_heads_were_cut(tiny_gated):
    """In float64: what is left of the difference is rounding, not an approximation."""
    rng = np.random.default_rng(3)
    spec, name = tiny_gated.spec, "blocks.1.attn"
    masks = random_masks(spec, rng)
    attn = list(masks.attn)
    attn[1] = np.array([[True, False, True, False], [False, False, True, False]])
    masks = dataclasses.replace(masks, attn=tuple(attn))
    kept = masks.patch[1]
    assert 1 < kept.sum() < len(kept) - 1

    def wide(network):
        graphdef, parameters = functional.split(network)
        return graphdef, {n: np.asarray(p, np.float64) for n, p in parameters.items()}

    with jax.enable_x64(True):
        graphdef, parameters = wide(tiny_gated.network)
        gated = dataclasses.replace(tiny_gated, network=functional.merge(graphdef, parameters))
        small = slim.extract(gated, masks, fold=False)
        cut_parameters = wide(small)[1]
    x = rng.normal(size=(spec.num_tokens, spec.embed_dim))
    masked = attention_of_a_masked_block(parameters, name, x, masks.attn[1], kept)[kept]
    cut = attention_of_a_cut_block(cut_parameters, name, x[kept], 2, (~kept).sum())
    np.testing.assert_allclose(cut, masked, rtol=1e-12, atol=1e-12)

    single = slim.extract(tiny_gated, masks, fold=False).blocks[1].attn
    proj_bias = np.asarray(single.proj.bias[...])
    np.testing.assert_allclose(single(jnp.float32(x[kept])), cut + proj_bias, atol=1e-5)


@pytest.mark.parametrize("spec", [flora.ViTSpec(**TINY, depth=3), TINY_SWIN], ids=["vit", "swin"])
def test_folded_gates_are_the_soft_network(spec):
    gated, images = gated_model(spec, tokens=False), images_of(spec)
    small = slim.extract(gated, slim.threshold(gated), fold=True)
    assert small.spec == spec
    np.testing.assert_allclose(logits(small, images), logits(gated, images), atol=1e-5)


def test_token_gates_that_are_all_equal_fold_exactly(tiny_gated):
    gates = {f"blocks.{b}.token_gate": np.full(17, gate) for b, gate in enumerate((0.4, 1.1, 2))}
    gated = with_gates(tiny_gated, gates)
    small, images = slim.extract(gated, slim.threshold(gated)), images_of(gated.spec)
    np.testing.assert_allclose(logits(small, images), logits(gated, images), atol=1e-5)


@pytest.mark.parametrize("fold", [True, False])
def test_the_cut_leaves_the_gated_model_as_it_was(tiny_gated, fold):
    before = {n: np.array(p) for n, p in functional.split(tiny_gated.network)[1].items()}
    slim.extract(tiny_gated, slim.threshold(tiny_gated, 0.5, 0.5, 0.5), fold=fold)
    after = functional.split(tiny_gated.network)[1]
    assert before.keys() == after.keys()
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[name])


# What becomes of the cut model


@pytest.fixture(scope="module")
def slim_model(tiny_gated):
    """Tokens leave before the first block and later; blocks have different widths."""
    small = slim.extract(tiny_gated, random_masks(tiny_gated.spec, np.random.default_rng(5)))
    blocks = small.spec.blocks
    assert len({(b.num_heads, b.head_dim, b.mlp_dim) for b in blocks}) == len(blocks)
    assert 17 > len(blocks[0].tokens) > len(blocks[-1].tokens)
    return small


def test_save_and_load(slim_model, tmp_path):
    flora.save(slim_model, tmp_path / "slim")
    again = flora.load(tmp_path / "slim")
    assert again.spec == slim_model.spec
    parameters, loaded = (functional.split(model)[1] for model in (slim_model, again))
    assert parameters.keys() == loaded.keys()
    for name, value in parameters.items():
        np.testing.assert_array_equal(loaded[name], value)
        assert loaded[name].dtype == value.dtype


def test_the_spec_survives_json(slim_model):
    again = spec_from_json(json.loads(json.dumps(spec_to_json(slim_model.spec))))
    assert again == slim_model.spec
    assert hash(again) == hash(slim_model.spec)


@pytest.mark.parametrize("implementation", ["masked", "sliced"])
def test_low_ranks_on_the_slim_model(slim_model, implementation, count_macs):
    spec, images = slim_model.spec, images_of(slim_model.spec)
    space = flora.RankSpace.regular(spec, ratios=(1 / 3, 1))
    assert len({layer.full_rank for layer in spec.layers}) > 1
    supernet = flora.factorize(slim_model, space, implementation=implementation)
    full = supernet(images, space.full_rank_genes)
    np.testing.assert_allclose(full, logits(slim_model, images), atol=1e-4)
    genes = np.arange(space.num_layers) % 2
    subnet = flora.extract(supernet, genes)
    np.testing.assert_allclose(logits(subnet, images), supernet(images, genes), atol=1e-4)
    assert [block.tokens for block in subnet.spec.blocks] == [b.tokens for b in spec.blocks]
    assert space.macs(genes) == flora.macs(subnet.spec) < flora.macs(spec)
    assert space.params(genes) == flora.num_params(subnet.spec) < flora.num_params(spec)
    check_costs(subnet, count_macs)


def test_a_slim_model_can_be_gated_again_where_its_tokens_are_whole(tiny_gated):
    masks = dataclasses.replace(
        random_masks(tiny_gated.spec, np.random.default_rng(1)),
        patch=slim.threshold(tiny_gated).patch,
    )
    small, images = slim.extract(tiny_gated, masks), images_of(tiny_gated.spec)
    again = slim.add_gates(small, tokens=False)
    np.testing.assert_allclose(logits(again, images), logits(small, images), atol=1e-5)


# Bad input


def test_unknown_variant(tiny_gated):
    with pytest.raises(
        ValueError, match="unknown attention gates 'full'; choose one of dim, head, uniform"
    ):
        slim.add_gates(random_model(tiny_gated.spec), attention="full")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (TINY_SWIN, "the windows of a Swin need the whole feature map"),
        (flora.ViTSpec(**TINY, depth=1, pool="mean"), "the mean over all patches needs every one"),
    ],
    ids=["swin", "mean"],
)
def test_token_gates_where_tokens_cannot_leave(spec, reason):
    with pytest.raises(ValueError, match=f"no token gates here: {reason}"):
        slim.abstract_gated(spec, tokens=True)
    assert not slim.abstract_gated(spec).has_token_gates


def test_gates_of_a_compressed_model(slim_model):
    factored = flora.ViTSpec(**TINY, depth=1).with_ranks((2, None, None))
    with pytest.raises(ValueError, match="gates need a dense model: slim first, then factorize"):
        slim.add_gates(create_abstract(factored))
    with pytest.raises(ValueError, match="was slimmed before: its tokens have left for good"):
        slim.add_gates(slim_model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 4}, r"attn masks have shapes \[\(2, 4\), .*, the spec's are \[\(4, 2\)"),
        ({"mlp_ratio": 2}, r"mlp masks have shapes \[\(32,\), .*, the spec's are \[\(16,\)"),
        ({"distilled": True}, r"patch masks have shapes \[\(17,\), .*, the spec's are \[\(18,\)"),
        ({"depth": 2}, "attn masks have shapes"),
    ],
)
def test_masks_of_another_spec(tiny_gated, fields, message):
    other = slim.abstract_gated(flora.ViTSpec(**TINY | {"depth": 3} | fields))
    masks = slim.threshold(tiny_gated)
    for use in (slim.extract, slim.apply_masks):
        with pytest.raises(ValueError, match=message):
            use(other, masks)
    with pytest.raises(ValueError, match=message):
        slim.cut_spec(other.spec, masks)


def test_masks_of_other_gates(tiny_gated):
    spec = tiny_gated.spec
    masks = random_masks(spec, np.random.default_rng(0))
    by_head = gated_model(spec, attention="head")
    with pytest.raises(ValueError, match=r"mask of block \d is not one of attention='head'"):
        slim.apply_masks(by_head, masks)
    without = gated_model(spec, tokens=False)
    for use in (slim.extract, slim.apply_masks):
        with pytest.raises(ValueError, match=r"masks decide on tokens, but .* have no gates"):
            use(without, masks)
        with pytest.raises(ValueError, match=r"masks do not decide on tokens, but .* have gates"):
            use(tiny_gated, dataclasses.replace(masks, patch=()))


def test_published_gates_of_another_variant(golden, micro_spec):
    arrays = {k.removeprefix("sd/"): v for k, v in golden.items() if k.startswith("sd/")}
    for attention in set(GOLDENS.values()) - {golden["attention"]}:
        with pytest.raises(ValueError, match=rf"attn.zeta has shape .* attention='{attention}'"):
            slim.from_state_dict(arrays, micro_spec, attention)
    del arrays["blocks.1.mlp.zeta"]
    with pytest.raises(ValueError, match=r"the gates blocks\.1\.mlp\.zeta are missing"):
        slim.from_state_dict(arrays, micro_spec, golden["attention"])


@pytest.mark.parametrize(
    ("fields", "tokens", "message"),
    [
        ({}, [(0, 2, 1), None], "tokens of block 0 must ascend"),
        ({}, [(0, 1, 1), None], "tokens of block 0 must ascend"),
        ({}, [(0, 17), None], "tokens of block 0 must ascend and be among"),
        ({}, [(0, 1, 2), (0, 3)], "tokens of block 1 must .* among those of the block before"),
        ({}, [(0, 1, 2), None], "block 1 cannot work on all tokens: some left before it"),
        ({}, [None, (1, 2)], "block 1 must keep the tokens that are classified"),
        ({}, [None, ()], "block 1 must keep the tokens that are classified"),
        ({"distilled": True}, [None, (0, 2)], "block 1 must keep the tokens that are classified"),
        ({"pool": "mean"}, [None, (0, 1)], "no token can leave: the mean over all patches"),
    ],
)
def test_bad_tokens(fields, tokens, message):
    blocks = tuple(BlockSpec(2, 4, 8, tokens=kept) for kept in tokens)
    with pytest.raises(ValueError, match=message):
        flora.ViTSpec(**TINY, **fields, depth=2, blocks=blocks)


def test_tokens_cannot_leave_a_swin():
    blocks = (BlockSpec(2, 4, 8, tokens=(0, 1)), *TINY_SWIN.blocks[1:])
    with pytest.raises(ValueError, match="no token can leave: the windows of a Swin"):
        dataclasses.replace(TINY_SWIN, blocks=blocks)
