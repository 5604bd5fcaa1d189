"""Programs written in PTX: the PTX machine passes the correct ones, finds the fault in the others,
and rejects by name what it does not know.
"""

import itertools

import pytest
import torch
from torch import Tensor

from tests.tools.ptx import forms, machine
from tests.tools.ptx.machine import Finding, Kernel
from tests.tools.ptx.parser import Unsupported

pytestmark = pytest.mark.skipif(
    machine.unavailable() is not None, reason=machine.unavailable() or ""
)

_HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry written(.param .u64 .ptr .global .align 16 out)
{
  .reg .pred %p<4>;
  .reg .b16 %rs<4>;
  .reg .b32 %r<16>;
  .reg .b64 %rd<8>;
  .reg .b32 %f<4>;
  ld.param.b64 %rd1, [out];
  mov.u32 %r1, %tid.x;
  shl.b32 %r2, %r1, 2;
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
"""


def written(body: str, num_warps: int = 2) -> tuple[list[Finding], Tensor]:
    """Run PTX; return findings and an int32 tensor with one element per thread. %r1 is the thread,
    %r2 four times that, %rd3 its element's address, ``memory`` 1 KB of shared memory."""
    out = torch.full((32 * num_warps,), -1, dtype=torch.int32)
    kernel = Kernel(_HEAD + body + "\n ret;\n}\n", num_warps, 1024)
    parameters = out.data_ptr().to_bytes(8, "little")
    return kernel.run((1,), parameters, [(out.data_ptr(), 4 * out.numel())]), out


_STORE = "mov.u32 %r3, memory; add.s32 %r4, %r3, %r2; st.shared::cta.b32 [%r4], %r1;"
_FROM_OTHER_WARP = "xor.b32 %r5, %r4, 128; ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd3], %r6;"
_FROM_OTHER_LANE = "xor.b32 %r5, %r4, 4; ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd3], %r6;"
_COPY = """
  mov.u32 %r3, memory;
  add.s32 %r4, %r3, %r2;
  cp.async.ca.shared.global [%r4], [%rd3], 4;
  cp.async.commit_group;
"""
_LOAD_COPIED = "ld.shared.b32 %r6, [%r4]; st.global.b32 [%rd3], %r6;"
_INIT = """
  mov.u32 %r3, memory;
  setp.eq.b32 %p1, %r1, 0;
  @%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
  bar.sync 0;
"""
_WAIT = """{
  .reg .pred done;
  again: mbarrier.try_wait.parity.shared.b64 done, [%r3], 0;
  @!done bra.uni again;
}"""

_FENCE = "wgmma.fence.sync.aligned;"
_PRODUCT = """
  mov.b64 %rd5, 0;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3},
    %rd5, %rd5, 0, 1, 1, 0, 0;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
"""
_PRODUCT_OF_REGISTERS = _PRODUCT.replace(
    "    %rd5, %rd5, 0, 1, 1, 0, 0", "{%r6, %r6, %r6, %r7}, %rd5, 0, 1, 1, 0"
)
_PARTS = "mov.b16 %rs1, 0; mov.b32 %r6, 0;"
_PACK = "mov.b32 %r7, {%rs1, %rs1};"

RIGHT = {
    "barrier": _STORE + "bar.sync 0;" + _FROM_OTHER_WARP,
    "warp barrier": _STORE + "bar.warp.sync -1;" + _FROM_OTHER_LANE,
    "copy": _COPY + "cp.async.wait_group 0;" + _LOAD_COPIED,
    "mbarrier": _INIT + "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];" + _WAIT,
    "products": _FENCE + _PRODUCT + _FENCE + _PRODUCT,
    "copy behind a fence": "mov.b32 %f1, 0f00000000;" + _FENCE + "mov.b32 %f0, %f1;" + _PRODUCT,
    "operand packed before a fence": _PARTS + _PACK + _FENCE + _PRODUCT_OF_REGISTERS,
    "bytes of one operand": "prmt.b32 %r6, %r1, %r9, 0x3120U; st.global.b32 [%rd3], %r6;",
    "divergence": "setp.lt.u32 %p1, %r1, 5; @%p1 bra low; mov.b32 %r6, 1; bra.uni both; low: "
    "mov.b32 %r6, 2; both: bar.sync 0; st.global.b32 [%rd3], %r6;",
}

WRONG = {
    "no barrier": (_STORE + _FROM_OTHER_WARP, {"race", "uninitialised"}),
    "no warp barrier": (_STORE + _FROM_OTHER_LANE, {"warp-race"}),
    "nothing written": (
        "mov.u32 %r3, memory;" + _FROM_OTHER_LANE.replace("%r4", "%r3"),
        {"uninitialised"},
    ),
    "undefined register": ("st.global.b32 [%rd3], %r9;", {"uninitialised"}),
    "bytes of an undefined operand": (
        "prmt.b32 %r6, %r1, %r9, 0x3420U; st.global.b32 [%rd3], %r6;",
        {"uninitialised"},
    ),
    "copy not waited for": (_COPY + _LOAD_COPIED, {"async-read", "uninitialised"}),
    "copy waited for too early": (
        _COPY + "cp.async.wait_group 1;" + _LOAD_COPIED,
        {"async-read", "uninitialised"},
    ),
    "copy overwritten": (
        _COPY + "st.shared.b32 [%r4], %r1; cp.async.wait_group 0;",
        {"async-write"},
    ),
    "outside of shared memory": (
        "mov.u32 %r3, memory; ld.shared.b32 %r6, [%r3+1024];",
        {"shared-bounds"},
    ),
    "misaligned": ("mov.u32 %r3, memory; st.shared.b32 [%r3+2], %r1;", {"misaligned"}),
    "barrier in a branch": (
        "setp.lt.u32 %p1, %r1, 5; @%p1 bra past; bar.sync 0; past: bar.sync 0;",
        {"divergence"},
    ),
    "barrier that one warp misses": (
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra past; bar.sync 0; past: mov.b32 %r6, 0;",
        {"deadlock"},
    ),
    "mbarrier that nobody arrives at": (_INIT + _WAIT, {"deadlock"}),
    "mbarrier that is none": ("mov.u32 %r3, memory;" + _WAIT, {"mbarrier"}),
    "lane that does not take part": (
        "setp.lt.u32 %p1, %r1, 5; @%p1 shfl.sync.bfly.b32 %r6, %r1, 16, 31, -1;",
        {"divergence"},
    ),
    "loop without end": ("again: add.s32 %r6, %r1, 1; bra.uni again;", {"endless"}),
    "product without a fence": (_PRODUCT, {"wgmma-fence"}),
    "sums that were waited for, without a fence": (
        _FENCE + _PRODUCT + _PRODUCT,
        {"wgmma-fence"},
    ),
    "constant behind a fence": (
        _FENCE + "mov.b32 %f0, 0f00000000;" + _PRODUCT,
        {"wgmma-fence"},
    ),
    "operand packed behind a fence": (
        _PARTS + _FENCE + _PACK + _PRODUCT_OF_REGISTERS,
        {"wgmma-fence"},
    ),
    "trap": ("trap;", {"trap"}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_found_where_nothing_is_wrong(name: str) -> None:
    findings, out = written(RIGHT[name])
    assert findings == []
    if name == "divergence":  # the lanes reconverge
        assert out[:5].tolist() == [2] * 5 and out[5:].tolist() == [1] * 59


@pytest.mark.parametrize("name", WRONG)
def test_faults_are_found(name: str) -> None:
    body, kinds = WRONG[name]
    findings, _ = written(body)
    assert {finding.kind for finding in findings} == kinds


_HALVES = "mov.b16 %rs1, 0xC000; mov.b16 %rs2, 0x3E00; "  # -2 and 1.5 in float16
_RESULT = " cvt.u32.u16 %r8, %rs3;"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mov.b32 %f1, 0f40400000; div.approx.f32 %r8, %f1, 0f40800000;", 0x3F400000),  # 3 / 4
        ("mov.b32 %f1, 0f40400000; div.approx.f32 %r8, %f1, 0f7F000000;", 0),  # 3 / 2^127
        (_HALVES + "min.xorsign.abs.f16 %rs3, %rs1, %rs2;" + _RESULT, 0xBE00),  # -1.5
        (_HALVES + "max.xorsign.abs.f16 %rs3, %rs1, %rs1;" + _RESULT, 0x4000),  # 2
        ("mov.b16 %rs1, 0x3C0C; cvt.rn.bf16.f16 %rs3, %rs1;" + _RESULT, 0x3F82),  # 1 + 12 / 1024
        ("mov.b16 %rs1, 0x7F80; cvt.rn.f16.bf16 %rs3, %rs1;" + _RESULT, 0x7C00),  # infinity
        (
            "mov.b32 %r6, out; cvt.u64.u32 %rd4, %r6; cvta.param.u64 %rd5, %rd4;"
            "mov.b64 %rd4, out; cvta.param.u64 %rd6, %rd4; sub.s64 %rd4, %rd6, %rd5;"
            "cvt.u32.u64 %r8, %rd4;",
            0,
        ),
    ],
)
def test_what_triton_36_does_not_use(body: str, expected: int) -> None:
    findings, out = written(body + "st.global.b32 [%rd3], %r8;")
    assert findings == [] and {*out.tolist()} == {expected}


# ------------------------------------------------------------------- rejected by name


@pytest.mark.parametrize(
    ("instruction", "named"),
    [
        ("add.sat.s32 %r6, %r1, %r2;", "modifier .sat of add.sat.s32"),
        ("cvt.rn.satfinite.relu.e4m3x2.f32 %r6, %r1, %r2;", "modifier .relu of cvt"),
        ("ld.volatile.global.b32 %r6, [%rd3];", "modifier .volatile of ld.volatile"),
        ("atom.global.add.u32 %r6, [%rd3], 1;", "instruction atom.global.add.u32"),
        ("add.rn.s32 %r6, %r1, %r2;", "add.rn.s32, in this combination"),
        ("tcgen05.wait::ld.sync.aligned;", "instruction tcgen05.wait::ld.sync.aligned"),
        ("mov.b64 %rd4, %r1;", "%r1, a register of b32, as an operand of b64"),
        ("rsqrt.approx.ftz.f64 %rd4, %rd3;", "rsqrt.approx.ftz.f64, in this combination"),
        ("setp.lt.ftz.f32 %p1, %f1, %f2;", "modifier .ftz of setp.lt.ftz.f32"),
        ("barrier.cluster.arrive.aligned;", "modifier .cluster of barrier.cluster"),
        ("fence.proxy.async.global;", "modifier .global of fence.proxy.async.global"),
    ],
)
def test_what_is_not_known_is_refused(instruction: str, named: str) -> None:
    with pytest.raises(Unsupported) as caught:
        written(instruction)
    assert named in str(caught.value) and "line" in str(caught.value)


def test_every_accepted_form_of_arithmetic_is_executed() -> None:
    """The machine implements every form that is accepted."""
    library = machine._library()
    special = {
        "cvta", "mov", "selp", "setp", "ld", "st", "cp", "shfl", "vote", "mma", "wgmma", "bra",
        "ret", "exit", "trap", "bar", "barrier", "fence", "mbarrier", "ldmatrix", "stmatrix",
        "elect", "lop3", "redux", "createpolicy",
    }  # fmt: skip
    checked = 0
    for base, accepted in forms.FORMS.items():
        for form in accepted if base not in special else []:
            slots = [
                [*alternatives, *([None] if how == "[" else [])]
                for how, alternatives in forms.slots(form)
                if how != "("
            ]
            for words in itertools.product(*slots):
                *given, type = filter(None, words)
                given.sort(key="ftz".__eq__)
                name = ".".join([base, *given, type])
                assert library.ptx_knows(name.encode()), name
                checked += 1
    assert checked > 300
