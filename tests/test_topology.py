"""Checks before a TPU is rented: memory, the largest batch, and the command line."""

import dataclasses
import importlib.metadata
import importlib.util
import re
import subprocess
import sys

import jax
import pytest

from flora_jax.cluster.mesh import equal_share
from flora_jax.configs import deit_b, deit_t, digits_slim, vit_slim_deit_b
from flora_jax.models import functional
from flora_jax.preflight import hlo, topology
from flora_jax.preflight.programs import DoesNotFitError, Program, heaviest_training
from flora_jax.preflight.topology import check_topology, devices_of, largest_batch
from flora_jax.runs.settings import Settings
from tests.helpers.commands import DATA, ROOT, TINY_CONFIG

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)


def settings_of(config_file, *arguments: str) -> Settings:
    return Settings.from_config(config_file.get_config(*arguments))


def with_supernet(settings: Settings, **changes) -> Settings:
    return dataclasses.replace(settings, supernet=dataclasses.replace(settings.supernet, **changes))


@pytest.mark.parametrize("slope, fixed, multiple", [(3.0, 100.0, 1), (5.5, 0.0, 4), (2.0, 700, 3)])
def test_largest_batch_on_a_line_is_exact(slope, fixed, multiple):
    tried = []

    def needed(images: int) -> float:
        tried.append(images)
        return fixed + slope * images

    first = 16 * multiple
    found = largest_batch(needed, first, fixed + slope * first, 1000, multiple)
    step = {1: 8, 4: 8, 3: 24}[multiple]
    assert found == int((1000 - fixed) / slope) // step * step
    assert len(tried) <= 2


def test_largest_batch_is_one_that_was_tried_or_none():
    """Where memory grows faster than linearly the second guess may fail; the first one counts."""
    found = largest_batch(lambda images: images**2 / 100, 64, 64**2 / 100, 1000.0, 1)
    assert found**2 / 100 <= 1000
    assert found >= 64
    assert largest_batch(lambda images: 10.0 * images, 64, 640.0, 300.0, 1) == 24
    assert largest_batch(lambda images: 1e6 + images, 64, 1e6 + 64, 300.0, 1) == 0
    assert largest_batch(pytest.fail, 8, 1e6, 16e9, 1) == 4096  # not compiled again


def test_unknown_topologies_and_a_missing_compiler(monkeypatch):
    for name in ("v5e", "v9:2x2", "v5e:4by4", "v5litepod-16", "v5e:2x2x2x2", ""):
        with pytest.raises(ValueError, match=f"unknown topology {re.escape(repr(name))}.*v5e:4x4"):
            devices_of(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'jax\[tpu\]'"):
        check_topology(settings_of(deit_t), "v5e:4x4")


def test_batches_are_shared_by_devices():
    assert equal_share("batch_size", 32, 16) == 2
    with pytest.raises(ValueError, match=r"batch_size 32 .* 12 devices; the nearest that can: 36"):
        equal_share("batch_size", 32, 12)


def test_heaviest_training_of_each_kind_of_run():
    flora = heaviest_training(settings_of(deit_b), "tiled")
    assert (flora.name, flora.genes.shape, flora.has_teacher) == ("supernet", (36,), True)
    assert flora.network.blocks[0].mlp.fc1.implementation == "tiled"
    dense = flora.spec.macs()
    assert 3.9 / 8 < flora.forward_macs / dense < 4.1 / 8  # mean rank of the law is below half
    assert flora.macs == 3 * flora.forward_macs + dense

    gates = heaviest_training(settings_of(vit_slim_deit_b), "tiled")
    assert (gates.name, gates.genes, gates.has_teacher) == ("slim.gates", None, False)
    assert gates.penalty is not None
    assert "blocks.0.token_gate" in functional.split(gates.network)[1]
    recipe = dataclasses.replace(gates.recipe, rematerialize=True)
    assert dataclasses.replace(gates, recipe=recipe).macs == 4 * dense

    pretrain, report = (
        dataclasses.replace(settings_of(digits_slim), stages=(stage,))
        for stage in ("pretrain", "report")
    )
    assert heaviest_training(pretrain, "tiled").name == "pretrain"
    with pytest.raises(ValueError, match=r"none of the stages \['report'\] trains"):
        heaviest_training(report, "tiled")


@pytest.fixture
def pretended(monkeypatch):
    """A compiler that finds 100 MiB and 1 GiB an image, for one device."""

    def compile_training(config, training, mesh, images):
        total = 2**20 * (100 + 1024 * images)
        if total > topology.CHIPS["v5e"].hbm:
            raise DoesNotFitError(total, "RESOURCE_EXHAUSTED")
        gather = hlo.Collective("all-gather", 2**20, in_branch=True)
        reduce = hlo.Collective("all-reduce", 3 * 2**20, in_branch=False)
        found = [reduce, reduce, gather]
        return Program(images, 100 * 2**20, total - 100 * 2**20, 0, total, 61.7, 7, found)

    def compile_evaluation(config, training, mesh, num_heldout):
        resident = num_heldout * 2**10
        return Program(5, 2**30, 0, 0, 2**30 + resident, 3.2, 2, [], resident)

    def compile_calibration(config, spec, mesh):
        return Program(7, 2**20, 2**30, 0, 2**30 + 2**20, 1.2, 0, [])

    chip = topology.CHIPS["v5e"]
    monkeypatch.setattr(topology, "devices_of", lambda _: (chip, jax.devices()[:1]))
    for pretend in (compile_training, compile_evaluation, compile_calibration):
        monkeypatch.setattr(topology, pretend.__name__, pretend)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0.1")
    return with_supernet(settings_of(deit_t, "improved,runlocal"), batch_size=4)


def test_table_of_a_run_that_fits(pretended):
    table = check_topology(pretended, "v5e:1x1")
    assert table.splitlines()[1].split() == ["supernet", "evaluation", "calibrate"]
    assert {row: cells(table, row) for row in ROWS} == ROWS
    assert table.endswith("fits: 8 images a device (8 a step), which need 8.10 GiB")
    data = dataclasses.replace(pretended.data, name="folder:elsewhere")
    table = check_topology(dataclasses.replace(pretended, data=data), "v5e:1x1")
    assert table.endswith("not counted: the held-out images of folder:elsewhere, which is not here")


ROWS = {
    "temporaries": ["4.00 GiB", "0 B", "1.00 GiB"],
    "held-out images": ["269.00 KiB"],
    "all together": ["4.10 GiB", "1.00 GiB", "1.00 GiB"],
    "of the memory": ["26 %", "6 %", "6 %"],
    "all-reduce": ["2 of 6.00 MiB"],
    "all-gather in a branch": ["1 of 1.00 MiB"],
    "compiled in": ["62 s", "3 s", "1 s"],
}


def test_run_that_does_not_fit_says_by_how_much_and_what_to_do(pretended, monkeypatch):
    large = with_supernet(pretended, batch_size=64)
    with pytest.raises(ValueError, match=r"64 images a device needs at least 64\.10 GiB") as error:
        check_topology(large, "v5e:1x1")
    assert "48.35 GiB more than the 15.75 GiB of its memory; 8 images fit" in str(error.value)
    for way in ("supernet.accumulate=8", "supernet.rematerialize=True", "fsdp=2"):
        assert f"--config.{way}" in str(error.value)
    monkeypatch.setattr(topology, "count_heldout", lambda _: 2**24)
    with pytest.raises(ValueError, match=r"evaluation needs 17\.00 GiB of a device's 15\.75 GiB"):
        check_topology(pretended, "v5e:1x1")


def check(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "flora_jax.main", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_command_line_names_what_is_accepted():
    done = check(f"--config={TINY_CONFIG}", "--check_topology=v5e")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: unknown topology 'v5e'" in done.stderr
    assert "Traceback" not in done.stderr


def cells(table: str, row: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(row))
    return re.split(r"  +", line)[1:]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("topology, number", [("v5e:1x1", 1), ("v5e:2x2", 4), ("v6e:1x1", 1)])
def test_devices_of_a_topology(topology, number):
    assert len(devices_of(topology)[1]) == number


@needs_compiler
def test_check_of_a_tiny_run():
    done = check(f"--config={TINY_CONFIG}", "--check_topology=v5e:2x2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("supernet on v5e:2x2: 4 devices of 15.75 GiB; jax ")
    assert cells(done.stdout, "images a step") == ["32", "256", "256"]
    assert cells(done.stdout, "images a device") == ["8", "64", "64"]
    # Three in a loop over two blocks, forward and backward; three in each block to evaluate.
    assert cells(done.stdout, "Pallas kernels") == ["6", "6", "0"]
    assert cells(done.stdout, "held-out images") == ["96.00 KiB"]  # 128 of 16 x 16 pixels
    parameters = float(cells(done.stdout, "parameters")[0].split()[0])
    count, size = cells(done.stdout, "all-reduce")[0].split(" of ")
    assert count == "1"
    assert float(size.split()[0]) == pytest.approx(4 * parameters * 1000 / 1024, rel=1e-3)
    assert "in a branch" not in done.stdout
    assert "fits: at least 4096 images a device" in done.stdout


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("shape, batch_size", [("4x4", 1024), ("16x16", 16384)])
def test_deit_b_at_64_images_a_device_fits_v5e(shape, batch_size):
    done = check(
        "--config=configs/deit_b.py",
        f"--check_topology=v5e:{shape}",
        "--config.supernet.compute_dtype=bfloat16",
        f"--config.supernet.batch_size={batch_size}",
    )
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout, "images a device")[0] == "64"
    size, unit = cells(done.stdout, "all together")[0].split()
    assert unit == "GiB"
    assert float(size) < topology.CHIPS["v5e"].hbm / topology.GIB
    assert "in a branch" not in done.stdout


# --- what is read off a compiled program ----------------------------------------------------------


@pytest.fixture(scope="module")
def program_text():
    """What libtpu made of a psum in a branch, then an all_gather, a psum_scatter and a ppermute.

    On v5e:2x2 with float32 [256, 256] a device; the first two were made bfloat16 by the compiler.
    """
    return (DATA / "collectives_v5e.hlo").read_text()


NESTED = """
%outer (p: f32[2]) -> f32[2] {
  %inner = f32[2]{0} fusion(%p), kind=kCustom, calls=%region_1.0_spmd
}
%other (q: s32[]) -> f32[2] {
  %choice = f32[2]{0} conditional(%q, %a, %b), true_computation=%outer, false_computation=%none
}
"""


def test_collectives_of_a_program(program_text):
    assert hlo.collectives(program_text) == [
        hlo.Collective("all-reduce", 2 * 256 * 256, in_branch=True),
        hlo.Collective("all-gather", 2 * 512 * 256, in_branch=False),
        hlo.Collective("reduce-scatter", 4 * 512 * 512, in_branch=False),
        hlo.Collective("collective-permute", 4 * 256 * 512, in_branch=False),
    ]
    text = program_text.replace("to_apply=%region_3.0", "calls=%region_1.0_spmd")
    text = text.replace("branch_computations={%region_0.0_spmd, %region_1.0_spmd}", "")
    assert not any(c.in_branch for c in hlo.collectives(text))
    nested = f"{text}{NESTED}"  # what a branch calls is in the branch
    assert [c.kind for c in hlo.collectives(nested) if c.in_branch] == ["all-reduce"]


def test_a_chain_of_fusions_is_one_collective():
    part = "  %g.{i} = bf16[256,256]{{1,0:T(8,128)S(1)}} all-gather(%p), replica_groups={groups}, "
    part += 'frontend_attributes={{chain_id="{chain}"}}'
    chains = [(0, 0), (1, 0), (2, 1)]
    lines = [part.format(i=i, chain=chain, groups="{{0,1}}") for i, chain in chains]
    text = "\n".join(("%fused (p: bf16[128,256]) -> bf16[256,256] {", *lines, "}"))
    found = hlo.collectives(text)
    assert [c.num_bytes for c in found] == 2 * [2 * 256 * 256]


@pytest.mark.parametrize(
    "instruction, num_bytes",
    [
        ("(f32[3,5]{1,0}, s8[7]{0}, pred[2]{0}, f32[]) all-reduce(%a, %b, %c, %d)", 60 + 7 + 2 + 4),
        ("f32[4]{0} reduce-scatter(%a), replica_groups=[2,8]<=[16], dimensions={0}", 8 * 16),
        ("(f32[4]{0}, f32[8]{0}) all-gather-start(%a), replica_groups={{0,1},{2,3}}", 32),
    ],
)
def test_bytes_of_a_collective(instruction, num_bytes):
    text = f"ENTRY %main (a: f32[4]) -> f32[4] {{\n  ROOT %x = {instruction}\n}}"
    assert [c.num_bytes for c in hlo.collectives(text)] == [num_bytes]
