"""Calls that lead to every launch configuration: what ``build_kernels.py`` compiles for each
architecture.

A case is one line of ``CASES``: a name, a function of this file and its arguments. The function
calls an op forward and backward on small CPU tensors, and only the launches are recorded. Equal
launches of a case are compiled once. Sizes are as divisible by 16 as those of real models.

    python -m bench._compile.kernel_cases gelu 90      # one case on one architecture, at once
"""

import sys
from functools import partial

import torch
from torch import Tensor

from bench._compile.static import case_main
from fastgpt.kernels import fused

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _leaf(*shape: int, dtype: str) -> Tensor:
    return torch.zeros(shape, dtype=_DTYPES[dtype], requires_grad=True)


def _attention(documents: bool, head_sizes: tuple[int, ...], dtype: str) -> None:
    doc_start = torch.zeros(1, 1024, dtype=torch.int32) if documents else None
    for head_size in head_sizes:
        for dropout_p in (0.0, 0.1):
            qkv = _leaf(1, 1024, 3 * 2 * head_size, dtype=dtype)
            y = fused.attention_qkvpacked(qkv, 2, dropout_p=dropout_p, doc_start=doc_start)
            y.sum().backward()


def _attention_other_variants() -> None:
    """Separate q, k and v of an odd head size, in fp16, without the causal mask; TF32."""
    q, k, v = (_leaf(1, 2, 100, 25, dtype="fp16") for _ in range(3))
    fused.attention(q, k, v, causal=False).sum().backward()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        fused.attention_qkvpacked(_leaf(1, 1024, 3 * 128, dtype="fp32"), 2).sum().backward()
    finally:
        torch.set_float32_matmul_precision(before)


def _attention_decode(head_sizes: tuple[int, ...], dtype: str) -> None:
    positions = torch.zeros(2, dtype=torch.int64)
    for head_size in head_sizes:
        qkv = torch.zeros(2, 1, 3 * 2 * head_size, dtype=_DTYPES[dtype])
        cache = torch.zeros(2, 2, 2, 1024, head_size, dtype=_DTYPES[dtype])
        fused.attention_decode(qkv, cache, positions)


def _layer_norm(widths: tuple[int, ...], dtype: str) -> None:
    for width in widths:
        x, weight, bias = (_leaf(*shape, width, dtype=dtype) for shape in ((64,), (), ()))
        fused.layer_norm(x, weight, bias).sum().backward()
        fused.layer_norm(x, weight).sum().backward()


def _residual_layer_norm(widths: tuple[int, ...], dtype: str, residual_dtype: str) -> None:
    """With all that it can do, with and without dropout; and with nothing."""
    for width in widths:
        weight, bias, delta_bias = (_leaf(width, dtype="fp32") for _ in range(3))
        residual, delta = _leaf(64, width, dtype=residual_dtype), _leaf(64, width, dtype=dtype)
        for dropout_p in (0.0, 0.1):
            y, total = fused.residual_layer_norm(
                residual, delta, weight, bias, delta_bias=delta_bias, dropout_p=dropout_p
            )
            torch.autograd.backward((y, total), (y, total))
        fused.residual_layer_norm(residual, delta, weight)[0].sum().backward()


def _embedding(widths: tuple[int, ...], dtype: str) -> None:
    idx = torch.zeros(2, 64, dtype=torch.int64)
    for width in widths:
        for doc_start in (None, idx.int()):
            for dropout_p in (0.0, 0.1):
                token, position = _leaf(96, width, dtype=dtype), _leaf(64, width, dtype=dtype)
                y = fused.embedding(idx, token, position, dropout_p=dropout_p, doc_start=doc_start)
                y.sum().backward()


def _gelu() -> None:
    for dtype in _DTYPES:
        for form in ("none", "tanh"):
            fused.gelu(_leaf(4096, dtype=dtype), form).sum().backward()


def _adamw() -> None:
    param, grad, exp_avg, exp_avg_sq = (torch.zeros(4096) for _ in range(4))
    step, lr, clip, skip = (torch.zeros(()) for _ in range(4))
    update = partial(fused.adamw, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for rounded in (None, param.bfloat16()):
        update(param, rounded, grad, exp_avg, exp_avg_sq, step, lr)
        update(param, rounded, grad, exp_avg, exp_avg_sq, step, lr, clip=clip, skip=skip)


def _mlp(biases: tuple[bool, ...], forms: tuple[str, ...], dtype: str) -> None:
    """Both products with an epilogue and the weight gradients, in parts, keeping all and
    recomputing."""
    x, ln_weight = _leaf(4096, 64, dtype=dtype), _leaf(64, dtype="fp32")
    fc_weight, proj_weight = _leaf(256, 64, dtype=dtype), _leaf(64, 256, dtype=dtype)
    for bias in biases:
        fc_bias = _leaf(256, dtype=dtype) if bias else None
        for form in forms:
            for recompute in (None, (x, ln_weight, None, 1e-5)):
                y = fused.mlp(
                    x, fc_weight, fc_bias, proj_weight, approximate=form, recompute=recompute
                )
                y.sum().backward()


def _linear_cross_entropy(n_classes: tuple[int, ...], dtype: str) -> None:
    """With gradients, plain and with label smoothing; without."""
    targets = torch.zeros(8, dtype=torch.int64)
    for n in n_classes:
        x, weight = _leaf(8, 16, dtype=dtype), _leaf(n, 16, dtype=dtype)
        fused.linear_cross_entropy(x, weight, targets)
        fused.linear_cross_entropy(x, weight, targets, label_smoothing=0.1)
        fused.linear_cross_entropy(x.detach(), weight.detach(), targets)


def _fp8(dtype: str) -> None:
    """Casts of activations and of float32 weights, with and without columns; the loss's rows and
    the transpose of its gradients."""
    x, weight = _leaf(256, 64, dtype=dtype), _leaf(50304, 64, dtype="fp32")
    targets = torch.zeros(256, dtype=torch.int64)
    for label_smoothing in (0.0, 0.1):
        fused.linear_cross_entropy(x, weight, targets, label_smoothing=label_smoothing, fp8=True)
    fused.linear_cross_entropy(x.detach(), weight.detach(), targets, fp8=True)


_WIDTHS = (65, 384, 768, 1600, 4096, 8192, 16384)
_TWO = ("bf16", "fp32")
CASES = {
    "adamw": partial(_adamw),
    "gelu": partial(_gelu),
    **{f"layer_norm-{dtype}": partial(_layer_norm, _WIDTHS, dtype) for dtype in _TWO},
    "residual_layer_norm-bf16-bf16": partial(_residual_layer_norm, _WIDTHS, "bf16", "bf16"),
    "residual_layer_norm-fp32-fp32": partial(_residual_layer_norm, _WIDTHS, "fp32", "fp32"),
    "residual_layer_norm-fp16-fp32": partial(_residual_layer_norm, (768, 8192), "fp16", "fp32"),
    **{f"embedding-{dtype}": partial(_embedding, (65, 768, 1600), dtype) for dtype in _TWO},
    "mlp-bf16": partial(_mlp, (False, True), ("none", "tanh"), "bf16"),
    "mlp-fp16": partial(_mlp, (True,), ("none",), "fp16"),
    **{
        f"linear_cross_entropy-{dtype}": partial(_linear_cross_entropy, (65, 50257, 50304), dtype)
        for dtype in _TWO
    },
    **{
        f"attention{suffix}-{sizes[-1]}-{dtype}": partial(_attention, documents, sizes, dtype)
        for suffix, documents in (("", False), ("_documents", True))
        for sizes in ((16, 25, 32), (64,), (80, 128), (256,))
        for dtype in _TWO
    },
    "attention-others": partial(_attention_other_variants),
    **{
        f"attention_decode-{dtype}": partial(_attention_decode, (25, 32, 64, 128, 256), dtype)
        for dtype in _TWO
    },
    "fp8-bf16": partial(_fp8, "bf16"),
    "fp8-fp16": partial(_fp8, "fp16"),
}

# What older architectures do not have.
LEAST_CAPABILITY = {"fp8-bf16": 89, "fp8-fp16": 89}

if __name__ == "__main__":
    sys.exit(case_main(CASES))
