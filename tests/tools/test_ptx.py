"""The PTX machine computes known results, finds planted faults, and rejects what it does not know
by name.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.tools import test_interpreter, test_ptx_kernels, toy_kernels
from tests.tools.ptx import forms, launches, machine, mutations
from tests.tools.ptx.launches import PtxError
from tests.tools.ptx.machine import Finding, Kernel
from tests.tools.ptx.parser import Unsupported

pytestmark = pytest.mark.skipif(
    machine.unavailable() is not None, reason=machine.unavailable() or ""
)

CAPABILITIES = [80, 90]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


# --------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul(capability: int, dtype: torch.dtype) -> None:
    """Small integers, for which any order of sums is exact. wgmma on sm_90, mma.sync on sm_80."""
    a, b = torch.randint(-8, 9, (2, 100, 100)).to(dtype)
    c = torch.full((100, 100), float("nan"))
    with launches.compiled_for(capability):
        toy_kernels.matmul_kernel[(2, 2)](
            a, b, c, 100, 100, 100, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_stages=3
        )
    assert torch.equal(c, a.float() @ b.float())


@pytest.mark.parametrize("block", [(8, 16), (32, 64), (64, 128)], ids=str)
def test_bulk_copies_cut_off_at_the_edge(block: tuple[int, int]) -> None:
    """float16 rows of 32, 128 and 256 bytes cover each swizzle and a box in two parts."""
    x, y = torch.randn(70, 200).half(), torch.zeros(70, 200).half()
    descriptors = [TensorDescriptor.from_tensor(t, list(block)) for t in (x, y)]
    grid = -(-70 // block[0]), -(-200 // block[1])
    with launches.compiled_for(90):
        toy_kernels.copy_by_descriptor_kernel[grid](
            *descriptors, BLOCK_M=block[0], BLOCK_N=block[1]
        )
    assert torch.equal(x, y)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arithmetic(capability: int, dtype: torch.dtype) -> None:
    with launches.compiled_for(capability):
        found, expected = test_interpreter.arithmetic(dtype)
    torch.testing.assert_close(found[3], expected[3])  # div.full: within 2 ulp
    for k in {*range(11)} - {3}:
        assert torch.equal(found[k], expected[k]), k


ALL_HALVES = torch.arange(-(2**15), 2**15, dtype=torch.int16)


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize(
    "to", [*DTYPES, torch.int32, torch.float8_e5m2, torch.float8_e4m3fn], ids=str
)
def test_conversions(source: torch.dtype, to: torch.dtype) -> None:
    """All 16-bit values; for float32 also values between two bfloat16 values."""
    if source == torch.float32:
        upper = ALL_HALVES.int() << 16
        x = torch.cat([upper, upper + 0x7FFF, upper + 0x8000, upper + 0x8001]).view(torch.float32)
    else:
        x = ALL_HALVES.view(source)
    out = torch.empty(len(x), dtype=to)
    with launches.compiled_for(90):
        toy_kernels.cast_kernel[(1,)](x, out, len(x), BLOCK=len(x), num_warps=8)
    if to == torch.int32:
        # Out of range PyTorch behaves like x86, a GPU saturates.
        inside = x.float().abs() < 2**31
        assert torch.equal(out[inside], x[inside].int())
        return
    expected = x.float()
    if to in (torch.float8_e5m2, torch.float8_e4m3fn):  # satfinite
        expected = expected.clamp(-torch.finfo(to).max, torch.finfo(to).max)
    expected = expected.to(to).float()
    assert torch.equal(out.float().isnan(), expected.isnan())
    assert torch.equal(out.float().nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_functions_reductions_shapes_and_programs(capability: int) -> None:
    x = torch.randn(64).abs() + 0.1
    exp, exp2, erf, rsqrt = torch.empty(4, 64)
    with launches.compiled_for(capability):
        toy_kernels.unary_kernel[(1,)](x, exp, exp2, erf, rsqrt, BLOCK=64)
        test_interpreter.test_reductions(torch.float32)
        test_interpreter.test_trans_join_and_reshape(torch.float32)
        test_interpreter.test_every_program_of_the_grid_runs((2, 3, 4))
    for got, expected in ((exp, x.exp()), (exp2, x.exp2()), (erf, x.erf()), (rsqrt, x.rsqrt())):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(rsqrt, x.rsqrt())  # inexact, like the instruction


def test_any_interleaving_of_the_warps_gives_the_same() -> None:
    x, y = torch.randn(2, 64, 64).half()
    c = torch.empty(64, 64)
    options = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_stages=2)
    args = x, y, c, 64, 64, 64
    prepared = launches.prepare_launch(toy_kernels.matmul_kernel, args, options, (1, 1), 80)
    prepared.run()
    expected = c.clone()
    data, storages = bytes(prepared.parameters.data), prepared.parameters.storages()
    for schedule in (1, 2, 3):
        c.zero_()
        assert prepared.kernel.run((1, 1), data, storages, schedule=schedule) == []
        assert torch.equal(c, expected)


# ---------------------------------------------------------------------- faults of toy kernels


def _findings(run: Callable[[], Any]) -> list[Finding]:
    with launches.compiled_for(80), pytest.raises(PtxError) as caught:
        run()
    return list(caught.value.findings)


def _kinds(run: Callable[[], Any]) -> set[str]:
    return {finding.kind for finding in _findings(run)}


def test_accesses_outside_of_tensors() -> None:
    """A finding gives the line of the kernel's source."""
    x, y = torch.randn(100), torch.empty(101)
    copy = toy_kernels.copy_kernel[(1,)]
    found = _findings(lambda: copy(x, y, 100, MASK_LOAD=False, OTHER=False, BLOCK=128))
    finding = next(f for f in found if f.kind == "global-bounds")
    file, _, line = finding.source.partition(":")
    source = Path(toy_kernels.__file__).read_text().splitlines()
    assert file == "toy_kernels.py" and source[int(line) - 1].strip() == "x = tl.load(x_ptr + offs)"
    assert "ld.global" in finding.instruction
    with launches.compiled_for(80):
        copy(x, y, 100, MASK_LOAD=True, OTHER=True, BLOCK=128)
    assert torch.equal(y[:100], x)


def test_races_between_programs_and_between_warps() -> None:
    y = torch.zeros(512, dtype=torch.int32)
    store = toy_kernels.store_kernel
    assert _kinds(lambda: store[(2,)](y, 64, 1, 1, BLOCK=128)) == {"global-race"}
    assert "global-race" in _kinds(lambda: toy_kernels.pass_on_kernel[(8,)](y, 1))
    assert "global-race" in _kinds(
        lambda: toy_kernels.store_then_load_kernel[(1,)](y, torch.empty_like(y), BLOCK=512)
    )
    with launches.compiled_for(80):
        store[(2,)](y, 128, 1, 1, BLOCK=128)


def test_an_address_that_the_compiler_was_told_is_aligned_and_is_not() -> None:
    x, y = torch.randn(1040), torch.empty(1024)
    args, options = (x, y, 1024), dict(BLOCK=1024)
    prepared = launches.prepare_launch(toy_kernels.cast_kernel, args, options, (1,), 80)
    storages = prepared.parameters.storages()
    for offset, kinds in ((0, set()), (16, set()), (4, {"misaligned", "uninitialised"})):
        data = (x.data_ptr() + offset).to_bytes(8, "little") + prepared.parameters.data[8:]
        findings = prepared.kernel.run((1,), data, storages)
        assert {finding.kind for finding in findings} == kinds


# ------------------------------------------------------------------------- written in PTX

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


def test_device_made_tensor_maps_are_refused() -> None:
    x, y = torch.randn(64, 64), torch.empty(64, 64)
    with (
        launches.compiled_for(90),
        pytest.raises(Unsupported, match="copy_tile_kernel on sm_90: scratch"),
    ):
        toy_kernels.copy_tile_kernel[(2, 2)](x, y, 64, 64, BLOCK_M=32, BLOCK_N=32)


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


# -------------------------------------------------------------------------------- mutations

# Launches whose mutants run fast: cp.async loads and mma.sync; bulk copies and wgmma; reductions
# in shared memory.
_SMALL = [
    (80, "attention-bfloat16"),
    (90, "mlp-float16"),
    (90, "linear-float16-splits"),
    (80, "layer_norm-float32"),
]
_LARGE = [(sm, each.name) for sm, each in test_ptx_kernels.COMPILED]


def _recordings(capability: int, name: str) -> list[mutations.Recording]:
    (run,) = {each.run for _, each in test_ptx_kernels.COMPILED if each.name == name}
    torch.manual_seed(0)
    return mutations.record(capability, run)


def _check(
    cases: list[tuple[int, str]], most: int, share: float, always: Sequence[str] = ()
) -> None:
    """``always``: mutations that may be harmless in general, but not in these cases."""
    explained = {mutation.name for mutation in mutations.MUTATIONS if mutation.harmless}
    explained -= set(always)
    mutants = noticed = 0
    for capability, name in cases:
        for (_, mutation), score in mutations.scores(_recordings(capability, name), most).items():
            mutants, noticed = mutants + score.mutants, noticed + score.noticed
            if mutation not in explained:
                assert not score.unnoticed, (mutation, score.unnoticed)
    print(f"{noticed} of {mutants} mutants were noticed")
    assert noticed >= share * mutants


def test_changes_of_single_instructions_are_noticed() -> None:
    always = "wgmma.fence deleted", "fence.proxy.async deleted", "copy of another size"
    _check(_SMALL, most=3, share=0.7, always=always)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "name"), _LARGE, ids=str)
def test_changes_of_single_instructions_are_noticed_everywhere(capability: int, name: str) -> None:
    _check([(capability, name)], most=8, share=0.5)
