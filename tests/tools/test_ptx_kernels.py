"""Every kernel as Triton compiles it for sm_80 and sm_90, and those that sm_75 takes for that too,
executed in the PTX machine.

CASES is the smallest set that compiles each way of each branch of every kernel, in each dtype; the
last test says what is missing. ``pytest --ptx=90`` runs all other tests of kernels like this.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastgpt.kernels import configs, fused, reference
from tests.kernels.test_attention_semantics import assert_pipelined_pv_is_the_same
from tests.tools import parity
from tests.tools.calls import decoding
from tests.tools.documents import starts_of
from tests.tools.ptx import coverage, launches, machine

pytestmark = pytest.mark.skipif(
    machine.unavailable() is not None, reason=machine.unavailable() or ""
)

CAPABILITIES = [80, 90]
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], None]
    capabilities: tuple[int, ...]


CASES: list[Case] = []


def case(
    name: str,
    run: Callable[..., None],
    *args: Any,
    sm: tuple[int, ...] = (75, 80, 90),
    **options: Any,
) -> None:
    if run in (_attention, _attention_lengths, _attention_tf32):  # PyTorch's on sm_75
        sm = tuple(capability for capability in sm if capability >= 80)
    CASES.append(Case(name, partial(run, *args, **options), sm))


def _compare(call: Callable[..., Tensor], dtype: torch.dtype, *shapes: tuple[int, ...]) -> None:
    """``call(ops, *inputs)`` by the kernels and by the plain ops."""
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    kernel, plain = (partial(call, module) for module in (fused, reference))
    shape = plain(*inputs).shape
    grad = torch.randn(shape).to(dtype) if shape else torch.tensor(1.0)
    names = [f"input {i}" for i in range(len(inputs))]
    parity.assert_parity(kernel, plain, plain, inputs, grad, names)


def _with_seed(options: dict[str, Any]) -> dict[str, Any]:
    seed = {"seed": torch.tensor([0x1234_5678_9ABC_DEF])}
    return options | (seed if "dropout_p" in options else {})


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# ----------------------------------------------------------------------------------- attention


def _attention(
    dtype: torch.dtype, head_size: int, length: int, documents: bool = False, **options: Any
) -> None:
    """Packed, with two heads."""
    options = _with_seed(options)
    if documents:
        options["doc_start"] = starts_of(length, [length // 3])
    shape = 1, length, 3 * 2 * head_size
    _compare(lambda ops, qkv: ops.attention_qkvpacked(qkv, 2, **options), dtype, shape)


def _attention_lengths(dtype: torch.dtype) -> None:
    """Four heads that share the keys of two."""
    options: Any = dict(causal=False, key_lengths=torch.tensor([37, 0], dtype=torch.int32))
    shapes = (2, 4, 40, 32), (2, 2, 70, 32), (2, 2, 70, 32)
    _compare(lambda ops, *qkv: ops.attention(*qkv, **options), dtype, *shapes)


def _attention_tf32() -> None:
    """Operands of 11 bits: errors between those of float32 and of bfloat16, which has 8."""
    inputs = [torch.randn(1, 2, 40, 32) for _ in range(3)]
    grad = torch.randn(1, 2, 40, 32)
    with _tf32():
        got = parity.results(fused.attention, inputs, grad, FLOAT32)
    exact = parity.results(reference.attention, inputs, grad.double(), torch.float64)
    finer = parity.results(reference.attention, inputs, grad, FLOAT32)
    coarser = parity.results(reference.attention, inputs, grad, BFLOAT16)
    for x, z, low, high in zip(got, exact, finer, coarser, strict=True):
        assert (low - z).norm() < (x - z).norm() < (high - z).norm()


def _decode(dtype: torch.dtype, head_size: int) -> None:
    qkv = torch.randn(2, 1, 3 * 2 * head_size).to(dtype)
    cache = torch.randn(2, 2, 2, 200, head_size).to(dtype)
    positions = torch.tensor([0, 150])
    kernel, plain = (partial(decoding(cache, positions), ops) for ops in (fused, reference))
    parity.assert_parity(kernel, plain, plain, [qkv], torch.zeros(1), [])


case("attention-float32", _attention, FLOAT32, 16, 70)
case(
    "attention-float32-documents-dropout",
    _attention,
    FLOAT32,
    16,
    40,
    documents=True,
    dropout_p=0.2,
)
case("attention-float16-full", _attention, FLOAT16, 48, 70, causal=False)
case("attention-bfloat16", _attention, BFLOAT16, 32, 100)
case("attention-bfloat16-documents", _attention, BFLOAT16, 16, 112, documents=True)
case("attention-bfloat16-head-64", _attention, BFLOAT16, 64, 140, sm=(90,))
case("attention-float16-dropout", _attention, FLOAT16, 16, 70, dropout_p=0.2)
for name, tile in (("wgmma", (64, 16)), ("mma", (32, 32))):
    options: Any = dict(block_m=tile[0], block_n=tile[1], causal=False, sm=(90,))
    case(f"attention-pipelined-{name}", assert_pipelined_pv_is_the_same, 64, 64, FLOAT16, **options)
case("attention-float32-lengths", _attention_lengths, FLOAT32)
case("attention-bfloat16-lengths", _attention_lengths, BFLOAT16)
case("attention-tf32", _attention_tf32)
for dtype in parity.DTYPES:
    case(f"decode-{dtype}".replace("torch.", ""), _decode, dtype, 64)


# ---------------------------------------------------------------------- norms, embedding, GELU


def _gelu(dtype: torch.dtype, approximate: str) -> None:
    _compare(lambda ops, x: ops.gelu(x, approximate), dtype, (2, 3000))


def _layer_norm(dtype: torch.dtype, rows: int, columns: int, bias: bool) -> None:
    shapes = (rows, columns), *[(columns,)] * (1 + bias)
    _compare(lambda ops, *tensors: ops.layer_norm(*tensors), dtype, *shapes)


def _residual(dtype: torch.dtype, columns: int, biases: tuple[str, ...], **options: Any) -> None:
    """Both results at once: the sum, and its norm."""
    options = _with_seed(options)

    def both(ops: Any, residual: Tensor, delta: Tensor, weight: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(biases, values, strict=True))
        return torch.stack(ops.residual_layer_norm(residual, delta, weight, **named, **options))

    _compare(both, dtype, *[(5, columns)] * 2, *[(columns,)] * (1 + len(biases)))


def _embedding(dtype: torch.dtype, documents: bool = False, **options: Any) -> None:
    idx, options = torch.randint(50, (3, 40)), _with_seed(options)
    if documents:
        options["doc_start"] = starts_of(40, *[[15, 30]] * 3)
    _compare(lambda ops, *tables: ops.embedding(idx, *tables, **options), dtype, (50, 72), (64, 72))


for dtype, form in zip(parity.DTYPES, ("tanh", "none", "tanh"), strict=True):
    case(f"gelu-{form}-{dtype}".replace("torch.", ""), _gelu, dtype, form)
case("gelu-none-float32", _gelu, FLOAT32, "none")
case("layer_norm-float32", _layer_norm, FLOAT32, 37, 65, True)
case("layer_norm-float16-wide", _layer_norm, FLOAT16, 3, 8200, False)
case("layer_norm-bfloat16-wide", _layer_norm, BFLOAT16, 3, 8200, True)
case("residual-float32-wide", _residual, FLOAT32, 8200, ("bias", "delta_bias"), dropout_p=0.2)
case("residual-float16", _residual, FLOAT16, 72, ())
case("residual-bfloat16", _residual, BFLOAT16, 65, ("delta_bias",), dropout_p=0.2)
case("embedding-float32-documents", _embedding, FLOAT32, documents=True)
case("embedding-float32", _embedding, FLOAT32)
case("embedding-float16-dropout", _embedding, FLOAT16, dropout_p=0.2)
case("embedding-bfloat16", _embedding, BFLOAT16)


# ------------------------------------------------------------------------- products and losses


@contextmanager
def _products(library: bool) -> Iterator[None]:
    """By cuBLAS, with GELU and its slope as kernels of their own; else by ours, where sm_90's table
    says cuBLAS with sm_100's tiles, which take tensor maps too."""
    lookup = configs.lookup

    def said(op: str, kernel: str, capability: int, *rest: Any) -> Any:
        if library and op == "gemm" and kernel in ("fwd", "bwd", "weight"):
            return configs.CUBLAS
        config = lookup(op, kernel, capability, *rest)
        replaced = config == configs.CUBLAS and capability == 90 and not library
        return lookup(op, kernel, 100, *rest) if replaced else config

    with mock.patch.object(configs, "lookup", said):
        yield


def _mlp(
    dtype: torch.dtype,
    rows: int,
    bias: bool,
    approximate: str,
    recompute: bool = False,
    library: bool = False,
) -> None:
    shapes = [(rows, 72), (136, 72), (136,), (72, 136)]
    x, weight, fc_bias, proj = (torch.randn(shape).mul(0.3).to(dtype) for shape in shapes)
    inputs = [x, weight, fc_bias, proj] if bias else [x, weight, proj]
    source, norm_weight = torch.randn(rows, 72).to(dtype), torch.randn(72).to(dtype)
    if recompute:
        inputs[0] = x = fused.layer_norm(source, norm_weight).detach()

    def op(module: Any, **options: Any) -> Callable[..., Tensor]:
        def mlp(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
            fc_bias, proj = (None, *rest)[-2:]
            return module.mlp(x, weight, fc_bias, proj, approximate=approximate, **options)

        return mlp

    kernel = op(fused, recompute=(source, norm_weight, None, 1e-5) if recompute else None)
    names = ["x", "weight", "bias", "proj"] if bias else ["x", "weight", "proj"]
    grad = torch.randn(rows, 72).to(dtype)
    with _products(library):
        parity.assert_parity(kernel, op(reference), op(reference), inputs, grad, names)


def _linear(dtype: torch.dtype, bias: bool, tokens: int) -> None:
    shapes = [(tokens, 72), (136, 72), (136,)][: 2 + bias]
    _compare(lambda ops, *tensors: ops.linear(*tensors), dtype, *shapes)


def _loss(dtype: torch.dtype, n_vocab: int, **options: Any) -> None:
    targets = torch.randint(n_vocab, (37,))
    targets[5] = -1

    def loss(ops: Any, x: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_cross_entropy(x, weight, targets, **options)

    _compare(loss, dtype, (37, 32), (n_vocab, 32))


def _loss_without_gradient() -> None:
    x, weight, targets = torch.randn(37, 32), torch.randn(65, 32), torch.randint(65, (37,))
    got, exact = (module.linear_cross_entropy(x, weight, targets) for module in (fused, reference))
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=0.0)


def _adamw(rounded: torch.dtype | None, controlled: bool, betas: tuple[float, float]) -> None:
    """Three updates, the second skipped if there is a switch."""
    start, grad = torch.randn(2, 1030)
    states = []
    for module in (fused, reference):
        param, moments = start.clone(), torch.zeros(2, 1030)
        copy = None if rounded is None else param.to(rounded)
        step = torch.zeros(())
        for k in range(3):
            control = dict(clip=torch.tensor(0.5), skip=torch.tensor(float(k == 1)))
            module.adamw(
                param, copy, grad, *moments, step, torch.tensor(1e-2), betas=betas, eps=1e-8,
                weight_decay=0.1, **(control if controlled else {}),
            )  # fmt: skip
        states.append([param, moments, step] + ([] if copy is None else [copy]))
        if copy is not None:
            assert torch.equal(copy, param.to(copy.dtype))
    torch.testing.assert_close(states[0][:3], states[1][:3], rtol=1e-6, atol=1e-7)


def _accumulate(dtype: torch.dtype) -> None:
    total, grad = torch.randn(1030), torch.randn(1030).to(dtype)
    expected = total + grad.float()
    fused.accumulate([total], [grad])
    assert torch.equal(total, expected)


case("mlp-float16", _mlp, FLOAT16, 140, True, "none")
case("mlp-bfloat16-recompute", _mlp, BFLOAT16, 70, False, "tanh", recompute=True)
case("mlp-float32", _mlp, FLOAT32, 40, True, "none")
case("mlp-float16-library", _mlp, FLOAT16, 140, True, "tanh", library=True)
case("mlp-bfloat16-library", _mlp, BFLOAT16, 70, True, "none", recompute=True, library=True)
case("linear-float16-splits", _linear, FLOAT16, True, 1500)
case("linear-bfloat16-splits", _linear, BFLOAT16, False, 1500)
case("linear-bfloat16", _linear, BFLOAT16, False, 70)
case("loss-float32-smoothed", _loss, FLOAT32, 65, label_smoothing=0.1)
case("loss-float16", _loss, FLOAT16, 65, z_loss=1e-3)
case("loss-bfloat16", _loss, BFLOAT16, 8300)
case("loss-without-gradient", _loss_without_gradient)
case("fp8-float16-loss", _loss, FLOAT16, 80, fp8=True, sm=(90,))
case("fp8-bfloat16-loss", _loss, BFLOAT16, 80, fp8=True, sm=(90,))
case("adamw-bfloat16", _adamw, BFLOAT16, True, (0.9, 0.95))
case("adamw-float16", _adamw, FLOAT16, False, (0.9, 0.95))
case("adamw-no-moments", _adamw, None, False, (0.0, 0.0))
case("accumulate-bfloat16", _accumulate, BFLOAT16)
case("accumulate-float16", _accumulate, FLOAT16)


# ------------------------------------------------------------------------------------- the tests


def _param(capability: int, of: Case) -> Any:
    return pytest.param(capability, of, id=f"sm_{capability}-{of.name}")


@pytest.mark.parametrize(
    ("capability", "of"),
    [_param(sm, of) for sm in (75, *CAPABILITIES) for of in CASES if sm in of.capabilities],
)
def test_compiled(capability: int, of: Case) -> None:
    with launches.compiled_for(capability):
        of.run()


# What no launch on an architecture takes: tensor maps before sm_90, pointers instead of them from
# sm_90 on, what is for wgmma only, and fp8, which sm_80 lacks.
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

# The element types of the pointers that a kernel must have seen, where they are not float32,
# float16 and bfloat16.
_DTYPES: dict[str, set[str]] = {
    "_adamw_scalars_kernel": {"fp32"},
    "_linear_gelu_kernel": {"fp16", "bf16"},  # cuBLAS multiplies float32
    "_weight_grad_kernel": {"fp16", "bf16"},
    "_amax_kernel": {"fp16", "bf16"},
    "_quantise_kernel": {"fp16", "bf16", "fp8e4nv"},
    "_transpose_kernel": {"u8"},
}
_FP8_KERNELS = {"_amax_kernel", "_quantise_kernel", "_transpose_kernel"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_cases_are_all_there_is(capability: int) -> None:
    """Every kernel in every dtype, every branch both ways, but for what the tables above say."""
    names, outcomes = coverage.branches(Path(reference.__file__).parent)
    with coverage.lowering(capability) as covered:
        for each in CASES:
            if capability in each.capabilities:
                with suppress(AssertionError):  # nothing is computed, so nothing is right
                    each.run()
    missing = {str(outcome) for outcome in outcomes - covered.outcomes}
    assert missing == _NEVER[capability]
    kernels = {name for name in names if name.endswith("_kernel")}
    kernels -= _FP8_KERNELS if capability == 80 else set()
    assert kernels == covered.dtypes.keys()
    for name in kernels:
        seen = set().union(*covered.dtypes[name])
        assert seen >= _DTYPES.get(name, {"fp32", "fp16", "bf16"}), name
