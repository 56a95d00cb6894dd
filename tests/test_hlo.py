"""What is read off a compiled program: its collectives and its kernels."""

import pytest

from flora_jax.preflight import hlo
from tests.helpers.commands import DATA


@pytest.fixture(scope="module")
def program_text():
    """What libtpu made of a psum in a branch, then an all_gather, a psum_scatter and a ppermute.

    On v5e:2x2 with float32 [256, 256] a device; the first two were made bfloat16 by the compiler.
    """
    return (DATA / "collectives_v5e.hlo").read_text()


def test_collectives_of_a_program(program_text):
    assert hlo.collectives(program_text) == [
        hlo.Collective("all-reduce", 2 * 256 * 256, in_branch=True),
        hlo.Collective("all-gather", 2 * 512 * 256, in_branch=False),
        hlo.Collective("reduce-scatter", 4 * 512 * 512, in_branch=False),
        hlo.Collective("collective-permute", 4 * 256 * 512, in_branch=False),
    ]


def test_what_a_branch_calls_is_in_the_branch(program_text):
    text = program_text.replace("to_apply=%region_3.0", "calls=%region_1.0_spmd")
    text = text.replace("branch_computations={%region_0.0_spmd, %region_1.0_spmd}", "")
    assert not any(c.in_branch for c in hlo.collectives(text))
    nested = (
        text
        + """
%outer (p: f32[2]) -> f32[2] {
  %inner = f32[2]{0} fusion(%p), kind=kCustom, calls=%region_1.0_spmd
}
%other (q: s32[]) -> f32[2] {
  %choice = f32[2]{0} conditional(%q, %a, %b), true_computation=%outer, false_computation=%none
}
"""
    )
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


def test_kernels_are_counted():
    call = '  %k = f32[8] custom-call(%a), custom_call_target="{}"\n'
    text = "".join(call.format(name) for name in ("tpu_custom_call", "Sharding", "tpu_custom_call"))
    assert hlo.num_kernels(text) == 2
