"""The supernet's layer in its three forms against plain formulas in float64; its kernel for TPU."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flora_jax.flora.extras.tpu_kernel import BLOCKS, TILE, tiled_product
from flora_jax.flora.layer import RankedLinear, masked_product, sliced_product
from flora_jax.models import functional
from flora_jax.models.spec import LinearShape
from tests.helpers.commands import ROOT

# tokens, in, out, ranks
FEW = (3, 12, 20, (2, 5, 9, 12))  # for the kernel less than one block and one tile
MANY = (200, 12, 20, (2, 5, 9, 12))  # the factors of the two largest ranks are merged first
FILLED = (2 * BLOCKS[0], 32, 24, (TILE, 2 * TILE))
FILLED_IN_PART = (BLOCKS[0] + 45, 40, 72, (16, 96, 130, 200))
PRODUCTS = {"masked": masked_product, "sliced": sliced_product}
CASES = [
    *((product, sizes) for product in PRODUCTS.values() for sizes in (FEW, MANY)),
    *(
        pytest.param(tiled_product, sizes, marks=pytest.mark.slow)
        for sizes in (FEW, FILLED, FILLED_IN_PART)
    ),
]


def arrays(tokens, in_features, out_features, ranks):
    """x [M, in], down [R, in], up [R, out], grad [M, out]: float32, rounded to bfloat16 values."""
    rng = np.random.default_rng(tokens)
    rows = tokens, ranks[-1], ranks[-1], tokens
    widths = in_features, in_features, out_features, out_features
    shapes = zip(rows, widths, strict=True)
    return [np.float32(jnp.bfloat16(rng.normal(size=shape))) for shape in shapes]


def expected(x, down, up, grad, rank):
    """Value and gradients of x, down and up by the textbook, float64."""
    x, down, up, grad = (a.astype(np.float64) for a in (x, down, up, grad))
    used_down, used_up = down[:rank], up[:rank]
    grad_down, grad_up = np.zeros_like(down), np.zeros_like(up)
    grad_down[:rank] = (grad @ used_up.T).T @ x
    grad_up[:rank] = (x @ used_down.T).T @ grad
    return x @ used_down.T @ used_up, grad @ used_up.T @ used_down, grad_down, grad_up


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(product, ranks, x, down, up, grad, gene):
    value, pull_back = jax.vjp(lambda *inputs: product(*inputs, gene, ranks), x, down, up)
    return value, *pull_back(grad)


def assert_close(actual, wanted, tolerance):
    """Relative to the largest entry."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(
        np.float64(actual), wanted, rtol=0, atol=tolerance * abs(wanted).max()
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(("product", "sizes"), CASES)
def test_value_and_gradients_at_every_rank(product, sizes, dtype, tolerance):
    ranks, inputs = sizes[-1], arrays(*sizes)
    typed = [jnp.asarray(array, dtype) for array in inputs]
    for gene, rank in enumerate(ranks):
        actual = value_and_gradients(product, ranks, *typed, gene)
        for ours, theirs in zip(actual, expected(*inputs, rank), strict=True):
            assert ours.dtype == dtype
            assert_close(ours, theirs, tolerance)
        for factor_gradient in actual[2:]:
            assert not np.asarray(factor_gradient)[rank:].any()


@pytest.mark.parametrize(
    "product", [*PRODUCTS.values(), pytest.param(tiled_product, marks=pytest.mark.slow)]
)
def test_gradients_have_the_dtype_of_the_input(product):
    x, down, up, grad = arrays(*FEW)
    x, grad = jnp.bfloat16(x), jnp.bfloat16(grad)
    with jax.numpy_dtype_promotion("standard"):
        value, pull_back = jax.vjp(lambda *each: product(*each, 0, FEW[-1]), x, down, up)
        gradients = pull_back(grad.astype(value.dtype))
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]


@pytest.mark.parametrize(("sizes", "merged"), [(FEW, [0, 0, 0, 0]), (MANY, [0, 0, 1, 1])])
def test_sliced_spends_the_cheaper_way_at_each_rank(sizes, merged, count_macs):
    """Forward and backward, counted in the traced program."""
    tokens, width, out, ranks = sizes
    inputs, kernel = arrays(*sizes), width * out
    forward = jax.make_jaxpr(lambda x, *rest: sliced_product(x, *rest, ranks))(*inputs[:3], 0)
    step = functools.partial(value_and_gradients, sliced_product, ranks)
    both = jax.make_jaxpr(step)(*inputs, 0)
    (forward_branches,) = branches_of(forward)
    _, backward_branches = branches_of(both)
    for k, rank in enumerate(ranks):
        pair = tokens * rank * (width + out)
        factors_first = kernel * (rank + tokens)
        assert count_macs(forward_branches[k]) == (factors_first if merged[k] else pair)
        assert (factors_first < pair) == merged[k]
        pair = tokens * rank * (3 * width + 2 * out)
        factors_first = kernel * (3 * rank + 2 * tokens)
        assert count_macs(backward_branches[k]) == min(pair, factors_first)


def branches_of(jaxpr):
    """The branches of every switch, in program order."""
    found = []
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "cond":
            found.append(equation.params["branches"])
        else:
            for inner in jaxprs_in_params(equation.params):
                found += branches_of(inner)
    return found


@pytest.mark.parametrize("name", PRODUCTS)
def test_layer_without_a_gene_is_at_full_rank(name):
    tokens, width, out, ranks = FEW
    shape = LinearShape("fc1", width, out, tokens)
    layer = RankedLinear(shape, ranks, name, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(out, dtype=jnp.float32)
    x = arrays(*FEW)[0]
    full = x @ np.asarray(layer.down).T @ np.asarray(layer.up) + np.arange(out)
    np.testing.assert_allclose(layer(x), full, rtol=1e-5, atol=1e-6)
    structure, parameters = functional.split(layer)
    assert "gene" not in parameters
    last, first = (
        functional.merge(structure, parameters, jnp.array([gene]))(x)
        for gene in (len(ranks) - 1, 0)
    )
    np.testing.assert_array_equal(layer(x), last)
    assert abs(first - last).max() > 1e-4


@pytest.mark.slow
def test_tiles_beyond_the_rank_are_not_computed():
    ranks = (TILE - 28, TILE, 2 * TILE)
    x, down, up, grad = arrays(5, 8, 12, ranks)
    down[TILE:] = up[TILE:] = np.nan
    for gene in (0, 1):
        for result in value_and_gradients(tiled_product, ranks, x, down, up, grad, gene):
            assert np.isfinite(result).all()
    assert np.isnan(value_and_gradients(tiled_product, ranks, x, down, up, grad, 2)[0]).all()


@pytest.mark.slow
def test_too_large_a_layer_is_named():
    shapes = [(64, 16384), (16384, 16384), (16384, 65536)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    loss = jax.grad(lambda *inputs: tiled_product(*inputs, 0, (16384,)).sum())
    with pytest.raises(ValueError, match=r"needs \d+ MiB of vector memory, at most 48"):
        jax.eval_shape(loss, *inputs)


def sharded_step(mesh, ranks):
    """Value and gradients with the tokens split over devices, those of the factors summed."""

    def step(x, down, up, grad, gene):
        value, pull_back = jax.vjp(lambda *inputs: tiled_product(*inputs, gene, ranks), x, down, up)
        grad_x, *grad_factors = pull_back(grad)
        return value, grad_x, *jax.lax.psum(grad_factors, "data")

    split, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(split, whole, whole, split, whole),
        out_specs=(split, split, whole, whole),
        check_vma=False,  # which a kernel's output says nothing about
    )


def run_program(program: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", f"from tests import test_layer; test_layer.{program}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def compare_on_devices():
    """Run where there are 4 devices."""
    ranks = (3, 8)
    inputs = arrays(4 * 5, 8, 12, ranks)
    step = jax.jit(sharded_step(Mesh(jax.devices(), ("data",)), ranks))
    for gene in range(len(ranks)):
        wanted = value_and_gradients(masked_product, ranks, *inputs, gene)
        for ours, plain in zip(step(*inputs, gene), wanted, strict=True):
            assert_close(ours, plain, 1e-5)
    print(jax.device_count())


@pytest.mark.slow
def test_tokens_are_split_over_devices():
    done = run_program("compare_on_devices()", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert done.stdout == "4\n", done.stderr


def compile_for_tpu():
    """DeiT-B's fc1, 64 images a chip, forward and backward: sizes of the program, in bytes."""
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    mesh = Mesh(devices, ("data",))
    width, hidden, ranks = 768, 3072, tuple(768 * i // 8 for i in (1, 2, 3, 4, 5, 6, 8))

    def array(shape, *axes, dtype=jnp.bfloat16):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    tokens = len(devices) * 64 * 197
    inputs = (
        array((tokens, width), "data"),
        array((width, width)),
        array((width, hidden)),
        array((tokens, hidden), "data"),
        array((), dtype=jnp.int32),
    )
    compiled = jax.jit(sharded_step(mesh, ranks)).lower(*inputs).compile()
    memory = compiled.memory_analysis()
    sizes = {
        "program": memory.generated_code_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        "branches": compiled.as_text().count(" conditional("),
    }
    print(json.dumps(sizes))


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler libtpu is not installed"
)
@pytest.mark.slow
def test_program_for_tpu_is_small():
    done = run_program("compile_for_tpu()", TPU_SKIP_MDS_QUERY="1")
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert (sizes["kernels"], sizes["branches"]) == (2, 0)
    assert sizes["program"] < 2e6
    assert sizes["temporaries"] < 2e6
