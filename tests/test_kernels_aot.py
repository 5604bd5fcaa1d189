"""Every kernel, as the library would launch it, compiled ahead of time with no GPU: no spill, no
more shared memory than there is, and the tensor cores of the architecture in every product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from aot import MAX_SHARED_MEMORY, Compiled, compile_kernel
from triton.runtime.jit import JITFunction

from fastgpt.kernels import _common, fused

CAPABILITIES = [80, 90, 100]
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "TC5MMA"}
# A configuration that serves sm_80 must also start on the GPUs of its family that have less.
SHARED_MEMORY = {80: MAX_SHARED_MEMORY[86], 90: MAX_SHARED_MEMORY[90], 100: MAX_SHARED_MEMORY[100]}


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Launch]]:
    """launches(capability, run): what ``run()`` would launch there. Nothing is launched."""

    def record(capability: int, run: Callable[[], object]) -> list[Launch]:
        recorded: list[Launch] = []

        def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            assert not warmup
            recorded.append(Launch(self, args, options))

        with monkeypatch.context() as patch:
            patch.setattr(JITFunction, "run", note)
            patch.setattr(_common, "capability", lambda device: capability)
            run()
        return recorded

    return record


def _compile(launch: Launch, capability: int) -> tuple[str, Compiled]:
    options = dict(launch.options)
    num_warps, num_stages = options.pop("num_warps"), options.pop("num_stages", 3)
    compiled = compile_kernel(
        launch.kernel,
        launch.args,
        constexprs=options,
        num_warps=num_warps,
        num_stages=num_stages,
        capability=capability,
    )
    return launch.kernel.__name__, compiled


def _check_fits(name: str, compiled: Compiled, capability: int) -> None:
    spilled = compiled.spill_store_bytes + compiled.spill_load_bytes
    assert spilled == 0, f"{name} on sm_{capability} spills {spilled} bytes"
    limit = SHARED_MEMORY[capability]
    assert compiled.shared_memory <= limit, f"{name}: {compiled.shared_memory} > {limit} bytes"


def _uses_tensor_cores(launch: Launch, compiled: Compiled, capability: int) -> bool:
    """By the architecture's own instruction, which needs 64 rows; HMMA serves smaller tiles."""
    sides = launch.options["BLOCK_M"], launch.options["BLOCK_N"]
    rows = sides[1] if "dkdv" in launch.kernel.__name__ else sides[0]
    kind = TENSOR_CORES[capability] if rows >= 64 else "HMMA"
    return compiled.instructions[kind] > 0


def _check_attention(
    launches, head_size: int, dtype: torch.dtype, dropout_p: float, capability: int
) -> None:
    def run() -> None:
        qkv = torch.randn(1, 1024, 3 * 2 * head_size, dtype=dtype, requires_grad=True)
        fused.attention_qkvpacked(qkv, 2, dropout_p=dropout_p).sum().backward()

    recorded = launches(capability, run)
    assert len(recorded) == 3
    for launch in recorded:
        name, compiled = _compile(launch, capability)
        _check_fits(name, compiled, capability)
        if dtype == torch.bfloat16:
            assert _uses_tensor_cores(launch, compiled, capability), f"{name}: no tensor cores"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("head_size,dropout_p", [(64, 0.0), (64, 0.1), (128, 0.0)])
def test_attention(launches, head_size: int, dropout_p: float, capability: int) -> None:
    _check_attention(launches, head_size, torch.bfloat16, dropout_p, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_size", [16, 25, 32, 64, 80, 128, 256])
def test_attention_every_tile(
    launches, head_size: int, dtype: torch.dtype, dropout_p: float, capability: int
) -> None:
    """Every line of the launch tables."""
    _check_attention(launches, head_size, dtype, dropout_p, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_attention_full_and_separate(launches, capability: int) -> None:
    """The other variants of the kernels: no causal mask, an odd head size, fp16, TF32."""

    def run() -> None:
        q, k, v = torch.randn(3, 1, 2, 100, 25, dtype=torch.float16).unbind()
        leaves = [x.requires_grad_() for x in (q, k, v)]
        fused.attention(*leaves, causal=False).sum().backward()

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        qkv = torch.randn(1, 1024, 3 * 128, requires_grad=True)
        tf32 = launches(capability, lambda: fused.attention_qkvpacked(qkv, 2).sum().backward())
    finally:
        torch.set_float32_matmul_precision(before)
    for launch in launches(capability, run) + tf32:
        _check_fits(*_compile(launch, capability), capability)


_WIDE = [
    pytest.param(width, dtype, marks=pytest.mark.slow)
    for width in (65, 384, 1600, 8192, 16384)
    for dtype in (torch.bfloat16, torch.float32)
]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "width,dtype", [(768, torch.bfloat16), (768, torch.float32), *_WIDE], ids=str
)
def test_layer_norm(launches, width: int, dtype: torch.dtype, capability: int) -> None:
    def run() -> None:
        x, weight, bias = (
            torch.randn(*shape, width, dtype=dtype, requires_grad=True) for shape in ((64,), (), ())
        )
        fused.layer_norm(x, weight, bias).sum().backward()
        fused.layer_norm(x, weight).sum().backward()

    recorded = launches(capability, run)
    assert len(recorded) == (6 if width > 8192 else 4)
    for launch in recorded:
        _check_fits(*_compile(launch, capability), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu(launches, form: str, capability: int) -> None:
    def run() -> None:
        fused.gelu(
            torch.randn(4096, dtype=torch.bfloat16, requires_grad=True), form
        ).sum().backward()

    recorded = launches(capability, run)
    assert len(recorded) == 2
    for launch in recorded:
        _check_fits(*_compile(launch, capability), capability)
