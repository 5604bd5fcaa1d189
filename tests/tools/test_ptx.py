"""The PTX machine on compiled toy kernels: it computes known results, finds planted faults, and
notices changes of single instructions.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.tools import test_interpreter, test_ptx_kernels, toy_kernels
from tests.tools.ptx import launches, machine, mutations
from tests.tools.ptx.launches import PtxError
from tests.tools.ptx.machine import Finding
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


def test_device_made_tensor_maps_are_refused() -> None:
    x, y = torch.randn(64, 64), torch.empty(64, 64)
    with (
        launches.compiled_for(90),
        pytest.raises(Unsupported, match="copy_tile_kernel on sm_90: scratch"),
    ):
        toy_kernels.copy_tile_kernel[(2, 2)](x, y, 64, 64, BLOCK_M=32, BLOCK_N=32)


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
