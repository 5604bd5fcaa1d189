"""Every kernel as Triton compiles it for sm_80 and sm_90, and for sm_75 those that it supports,
executed in the PTX machine.

``Cases.compiled`` of all ops is a minimal set that compiles both ways of each branch of every
kernel in each dtype; the last test reports what is missing. ``pytest --ptx=90`` runs all other
kernel tests like this.
"""

from contextlib import suppress
from pathlib import Path

import pytest

from fastgpt.kernels import reference
from tests.kernels.every_op import CASES
from tests.tools.calls import Compiled
from tests.tools.ptx import coverage, launches, machine

pytestmark = pytest.mark.skipif(
    machine.unavailable() is not None, reason=machine.unavailable() or ""
)

CAPABILITIES = [80, 90]
COMPILED = [
    (sm, one)
    for op, cases in CASES.items()
    for one in cases.compiled
    for sm in one.sm
    if sm != 75 or op not in reference.OPS_OF_TENSOR_CORES  # PyTorch's kernels there
]


@pytest.mark.parametrize(
    ("capability", "of"), [pytest.param(*one, id=f"sm_{one[0]}-{one[1].name}") for one in COMPILED]
)
def test_compiled(capability: int, of: Compiled) -> None:
    with launches.compiled_for(capability):
        of.run()


# Branches that no launch on an architecture takes: tensor maps before sm_90, pointers instead of
# them since sm_90, code only for wgmma, and fp8, which sm_80 lacks.
_TMA = {"if TMA", "pre.dtype if TMA else pre.dtype.element_ty", "16 if TMA else 1"}
_NEVER = {
    80: {
        *(f"gemm_kernels.py, then: {test}" for test in _TMA),
        "attention_fwd.py, then: if PIPELINED_PV",
        "attention_bwd.py, then: if WGMMA",
        *(
            f"fp8_products.py, {way}: if tl.program_id(0) == 0 and tl.program_id(1) == 0"
            for way in ("then", "else")
        ),
    },
    90: {f"gemm_kernels.py, else: {test}" for test in _TMA},
}

# The pointers' element types that must be covered for a kernel, if not float32, float16 and
# bfloat16.
_DTYPES: dict[str, set[str]] = {
    "_adamw_scalars_kernel": {"fp32"},
    "_linear_gelu_kernel": {"fp16", "bf16"},  # float32 uses cuBLAS
    "_weight_grad_kernel": {"fp16", "bf16"},
    "_amax_kernel": {"fp16", "bf16"},
    "_quantise_kernel": {"fp16", "bf16", "fp8e4nv"},
    "_transpose_kernel": {"u8"},
}
_FP8_KERNELS = {"_amax_kernel", "_quantise_kernel", "_transpose_kernel"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_cases_are_all_there_is(capability: int) -> None:
    """Every kernel in every dtype and both ways of every branch, except for the tables above."""
    names, outcomes = coverage.branches(Path(reference.__file__).parent)
    with coverage.lowering(capability) as covered:
        for sm, each in COMPILED:
            if sm == capability:
                with suppress(AssertionError):  # nothing is computed, so results are wrong
                    each.run()
    missing = {str(outcome) for outcome in outcomes - covered.outcomes}
    assert missing == _NEVER[capability]
    kernels = {name for name in names if name.endswith("_kernel")}
    kernels -= _FP8_KERNELS if capability == 80 else set()
    assert kernels == covered.dtypes.keys()
    for name in kernels:
        seen = set().union(*covered.dtypes[name])
        assert seen >= _DTYPES.get(name, {"fp32", "fp16", "bf16"}), name
