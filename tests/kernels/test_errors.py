"""What all implementations of an op refuse, in the same words; what one of them refuses alone."""

import inspect
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, ones, zeros

from fastgpt import GPT, GPTConfig
from fastgpt.kernels import _host, fused, reference, torch_ops
from fastgpt.kernels._attention import MAX_HEAD_SIZE
from fastgpt.kernels.layer_norm import MAX_WIDTH


def signature(op: str) -> list[str]:
    return list(inspect.signature(getattr(reference, op)).parameters)


def ids(*shape: int) -> Tensor:
    return zeros(shape, dtype=torch.int64)


def places(*shape: int) -> Tensor:
    return zeros(shape, dtype=torch.int32)


def heads(n_head: int, length: int = 4, head_size: int = 8) -> Tensor:
    return ones(2, n_head, length, head_size)


def keys(*sizes: int) -> dict[str, Tensor]:
    return dict(k=heads(*sizes), v=heads(*sizes))


Refusal = tuple[type[Exception], str, dict[str, Any]]  # message, and what a call is changed by


def value_error(message: str, **changes: Any) -> Refusal:
    return ValueError, message, changes


def type_error(message: str, **changes: Any) -> Refusal:
    return TypeError, message, changes


META, HALF = ones(8, device="meta"), ones(2, 8).half()
OTHER_NORM = ones(1, 16), ones(16), None, 1e-5
# A call that every implementation takes, and what none does.
VALID: dict[str, dict[str, Any]] = {
    "gelu": dict(x=ones(3)),
    "layer_norm": dict(x=ones(2, 8), weight=ones(8), bias=ones(8)),
    "residual_layer_norm": dict(
        residual=ones(2, 8), delta=ones(2, 8), weight=ones(8), bias=ones(8), delta_bias=ones(8)
    ),
    "linear": dict(x=ones(2, 16), weight=ones(24, 16), bias=ones(24)),
    "mlp": dict(x=ones(2, 16), fc_weight=ones(64, 16), fc_bias=ones(64), proj_weight=ones(16, 64)),
    "attention": dict(q=heads(6), k=heads(2), v=heads(2)),
    "attention_qkvpacked": dict(qkv=ones(2, 4, 48), n_head=2),
    "attention_decode": dict(
        qkv=ones(2, 1, 96), cache=zeros(2, 2, 2, 70, 16), positions=torch.tensor([3, 65])
    ),
    "embedding": dict(idx=ids(2, 5), token_weight=ones(7, 16), position_weight=ones(6, 16)),
    "linear_cross_entropy": dict(x=ones(2, 3, 8), weight=ones(65, 8), targets=ids(2, 3)),
    "adamw": dict(
        **{name: ones(4) for name in ("param", "grad", "exp_avg", "exp_avg_sq")},
        **dict(rounded=None, step=zeros(()), lr=zeros(())),
        **dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    ),
}
REFUSED: dict[str, list[Refusal]] = {
    "gelu": [
        value_error("approximate must be 'none' or 'tanh', got 'fast'", approximate="fast"),
        type_error("x must be a floating-point tensor, got torch.int64", x=ids(3)),
        type_error("x must be a torch.Tensor, got list", x=[1.0]),
    ],
    "layer_norm": [
        value_error(r"weight must have shape \(8,\) .* x \(2, 8\), got \(7,\)", weight=ones(7)),
        value_error(r"bias must have shape \(8,\).*got \(1, 8\)", bias=ones(1, 8)),
        value_error("weight must have the dtype of x .*got torch.float16", weight=ones(8).half()),
        value_error("bias must have the dtype of x.*got torch.float16", bias=ones(8).half()),
        value_error("bias must have the dtype of weight", x=HALF, bias=ones(8).half()),
        value_error(r"weight must be on the device of x \(cpu\)", weight=META, bias=None),
        value_error("eps must be at least 0, got -1.0", eps=-1.0),
        value_error("x must have a last dimension of at least 1", x=ones(3, 0)),
        type_error("x must be a floating-point tensor", x=ids(8)),
    ],
    "residual_layer_norm": [
        value_error(r"delta must have shape \(2, 8\) to go with residual, got", delta=ones(1, 8)),
        value_error("delta must have the dtype of residual .* or a half", delta=HALF.double()),
        value_error("delta must be on the device of residual", delta=ones(2, 8).to("meta")),
        value_error(r"weight must have shape \(8,\).*delta \(2, 8\), got \(7,\)", weight=ones(7)),
        value_error("bias must have the dtype of", bias=ones(8).double()),
        value_error(r"delta_bias must have shape \(8,\)", delta_bias=ones(1, 8)),
        value_error("eps must be at least 0, got -1", eps=-1),
        value_error(r"dropout_p must lie in \[0, 0.999\], got 1.0", dropout_p=1.0),
        value_error("seed must be an int64 tensor", dropout_p=0.1, seed=ones(1)),
        value_error(r"dropout_offset must lie in \[0, 2\^31\), got -1", dropout_offset=-1),
        type_error("residual must be a floating-point tensor", residual=ids(2, 8)),
    ],
    "linear": [
        type_error("x must be a floating-point tensor, got torch.int64", x=ids(2, 16)),
        value_error(r"weight must have shape \(N, K\) to go with x", weight=ones(16, 24)),
        value_error(r"bias must have shape \(24,\) to go with weight", bias=ones(16)),
        value_error("weight must have the dtype of x .*float16", weight=ones(24, 16).half()),
        value_error("weight must be on the device of x", weight=META, bias=None),
        value_error("recompute must be .* got 2 items", recompute=(ones(2, 16), ones(16))),
        value_error("recompute must begin with a tensor of x's shape", recompute=OTHER_NORM),
    ],
    "mlp": [
        value_error(r"fc_weight must have shape \(N, K\) to go with x", fc_weight=ones(16, 64)),
        value_error(r"fc_bias must have shape \(64,\) to go with fc_weight", fc_bias=ones(3)),
        value_error(r"proj_weight must have shape \(N, 64\)", proj_weight=ones(64, 16)),
        value_error("proj_weight must have the dtype of x", proj_weight=ones(16, 64).half()),
        value_error("approximate must be 'none' or 'tanh', got 'erf'", approximate="erf"),
        value_error("recompute must begin with a tensor of x's shape", recompute=OTHER_NORM),
    ],
    "attention": [
        value_error(
            r"k must have shape \(2, 6, T, 8\), or a divisor of 6 as its number", **keys(4)
        ),
        value_error(r"of heads, to go with q \(2, 6, 4, 8\), got \(2, 0, 4, 8\)", **keys(0)),
        value_error("k must have shape .* got", **keys(12)),
        value_error("v must have the shape of k", v=heads(2, 5)),
        value_error(r"q must have shape \(B, H, T, D\), got \(6, 4, 8\)", q=heads(6)[0]),
        value_error(r"k must have the dtype of q \(torch.float32\)", k=heads(2).half()),
        value_error(r"v must be on the device of q \(cpu\), got meta", v=heads(2).to("meta")),
        value_error("k must hold at least one key", **keys(2, 0)),
        value_error("q must have a head size of at least 1", q=heads(6, 4, 0), **keys(2, 4, 0)),
        type_error("q must be a floating-point tensor", q=heads(6).long()),
        value_error(r"dropout_p must lie in \[0, 0.999\], got 1.0", dropout_p=1.0),
        value_error("dropout_p must lie .* got -0.1", dropout_p=-0.1),
        value_error("scale must be positive and finite.*got 0", scale=0.0),
        value_error("seed must be an int64 tensor", seed=places(1)),
        value_error("seed must be an int64 tensor", seed=ids(2)),
        value_error("seed must be on the device", seed=ids(1).to("meta")),
        type_error("doc_start must be a torch.Tensor, got list", doc_start=[[0] * 4]),
        type_error("doc_start must be torch.int32, got torch.int64", doc_start=ids(2, 4)),
        value_error(
            r"doc_start must have shape \(2, 4\) to go with q \(2, 6", doc_start=places(1, 4)
        ),
        value_error(
            r"doc_start must be on the device of q \(cpu\)", doc_start=places(2, 4).to("meta")
        ),
        value_error("doc_start must be None with causal", doc_start=places(2, 4), causal=False),
        value_error(
            r"None unless q and k are equally long, got q", **keys(2, 5), doc_start=places(2, 4)
        ),
        type_error("key_lengths must be a torch.Tensor, got list", key_lengths=[4, 0]),
        type_error("key_lengths must be torch.int32, got torch.int64", key_lengths=ids(2)),
        value_error(
            r"key_lengths must have shape \(2,\) to go with q \(2, 6", key_lengths=places(1)
        ),
        value_error(
            r"key_lengths must be on the device of q \(cpu\)", key_lengths=places(2).to("meta")
        ),
        value_error("None together with doc_start", key_lengths=places(2), doc_start=places(2, 4)),
    ],
    "attention_qkvpacked": [
        value_error(r"qkv must have shape \(B, T, 3C\), got \(4, 48\)", qkv=ones(4, 48)),
        value_error(r"multiple of 3 \* n_head, got 48 with n_head=5", n_head=5),
        value_error("qkv must hold at least one token", qkv=ones(1, 0, 48)),
        type_error("qkv must be a floating-point tensor, got torch.int64", qkv=ids(2, 4, 48)),
        value_error(r"doc_start must have shape \(2, 4\) to go with qkv", doc_start=places(2, 3)),
        value_error("doc_start must be None with causal", doc_start=places(2, 4), causal=False),
    ],
    "attention_decode": [
        value_error(r"qkv must have shape \(B, 1, 3C\), got \(2, 2, 96\)", qkv=ones(2, 2, 96)),
        value_error(
            r"cache must have shape \(2, 2, H, S, D\) with .* = 96", cache=zeros(2, 2, 2, 7, 15)
        ),
        value_error(r"cache must have shape .*got \(2, 2, 2, 0, 16\)", cache=zeros(2, 2, 2, 0, 16)),
        value_error(
            "cache must be contiguous, got strides", cache=zeros(2, 2, 7, 2, 16).transpose(2, 3)
        ),
        value_error(r"cache must have the dtype of qkv", cache=zeros(2, 2, 2, 70, 16).half()),
        type_error("positions must be torch.int64 or torch.int32, got .*float", positions=zeros(2)),
        value_error(r"positions must have shape \(2,\) to go with qkv", positions=ids(3)),
        value_error(r"positions must lie in \[0, 70\), got 70", positions=torch.tensor([3, 70])),
        value_error(r"positions must lie in \[0, 70\), got -1", positions=torch.tensor([-1, 3])),
        value_error("scale must be positive and finite, or None, got 0", scale=0.0),
    ],
    "embedding": [
        type_error("idx must be torch.int64 or torch.int32", idx=ones(2, 5)),
        value_error(r"idx must have shape \(B, T\), got \(5,\)", idx=ids(5)),
        value_error(r"token_weight must have shape \(V, C\)", token_weight=ones(16)),
        value_error(r"position_weight must have shape \(P, 16\)", position_weight=ones(6, 3)),
        value_error("a row for each of the 5 positions of idx", position_weight=ones(4, 16)),
        value_error("position_weight must have the dtype of", position_weight=ones(6, 16).half()),
        value_error("token_weight must be on the device of idx", idx=ids(2, 5).to("meta")),
        type_error("token_weight must be a floating-point", token_weight=ids(7, 16)),
        value_error("dropout_p must lie in", dropout_p=-0.1),
        value_error("dropout_offset must lie in", dropout_offset=2**31),
        value_error("seed must be an int64 tensor", seed=ids(2)),
        type_error("doc_start must be torch.int32, got torch.int64", doc_start=ids(2, 5)),
        value_error(r"doc_start must have shape \(2, 5\) to go with idx", doc_start=places(5)),
        value_error("doc_start must be on the device of idx", doc_start=places(2, 5).to("meta")),
    ],
    "linear_cross_entropy": [
        type_error("x must be a floating-point tensor", x=ids(2, 3, 8)),
        type_error("weight must be a torch.Tensor, got list", weight=[1.0]),
        type_error("targets must be torch.int64 or torch.int32", targets=ones(2, 3)),
        value_error(r"weight must have shape \(N, K\).*got \(65, 7\)", weight=ones(65, 7)),
        value_error("weight must have a row for each class", weight=ones(0, 8)),
        value_error("weight must have the dtype of x", weight=ones(65, 8).half()),
        value_error(r"targets must have shape \(2, 3\).*got \(6,\)", targets=ids(6)),
        value_error("targets must be on the device of x", targets=ids(2, 3).to("meta")),
        value_error("'mean' or 'sum', got 'none'", reduction="none"),
        value_error(r"both sizes of weight must be multiples of 16 .*, got \(65, 8\)", fp8=True),
        value_error(
            r"z_loss must be 0 with fp8=True, got 0\.1",
            **dict(x=ones(2, 3, 16), weight=ones(32, 16), z_loss=0.1, fp8=True),
        ),
        *(
            (ValueError, rf"label_smoothing must lie in \[0, 1\], got {e}", dict(label_smoothing=e))
            for e in (-0.1, 1.1, math.nan)
        ),
        *(
            (ValueError, f"z_loss must be at least 0 and finite, got {z}", dict(z_loss=z))
            for z in (-1e-4, math.inf, math.nan)
        ),
    ],
    "adamw": [
        type_error("grad must be float32, got torch.bfloat16", grad=ones(4).bfloat16()),
        type_error("rounded must be float16 or bfloat16, got torch.float32", rounded=ones(4)),
        type_error("param must be a torch.Tensor, got list", param=[0.0]),
        value_error(r"exp_avg must have the shape \(N,\) of param, \(4,\)", exp_avg=ones(5)),
        value_error(r"grad must .*contiguous, got \(4,\), strides \(2,\)", grad=ones(8)[::2]),
        value_error(r"param must have .* got \(2, 2\)", param=ones(2, 2)),
        value_error(r"lr must have shape \(\), contiguous, got \(1,\)", lr=ones(1)),
        value_error("clip must be on the device of param", clip=META[0]),
        value_error(r"betas\[1\] must lie in \[0, 1\), got 1.0", betas=(0.9, 1.0)),
        value_error("weight_decay must be at least 0 and finite, got -1", weight_decay=-1),
    ],
}
MODULES = [fused, torch_ops, reference]


@pytest.mark.parametrize("module", MODULES, ids=["fused", "torch_ops", "reference"])
@pytest.mark.parametrize("op", reference.OPS)
def test_what_an_op_refuses(module: ModuleType, op: str) -> None:
    call = getattr(module, op)
    call(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in VALID[op].items()})
    for error, message, changes in REFUSED[op]:
        with pytest.raises(error, match=message):
            call(**{**VALID[op], **changes})


_OPTIONAL = "bias", "fc_bias", "delta_bias", "seed", "rounded", "clip", "skip"


@pytest.mark.parametrize("module", MODULES, ids=["fused", "torch_ops", "reference"])
@pytest.mark.parametrize("op", reference.OPS)
def test_what_must_be_a_tensor(module: ModuleType, op: str) -> None:
    named = signature(op)
    tensors = {name for name, x in VALID[op].items() if isinstance(x, Tensor)}
    for name in tensors | set(_OPTIONAL).intersection(named):
        for wrong in (0.5, *([] if name in _OPTIONAL else [None])):
            message = f"{name} must be a torch.Tensor, got {type(wrong).__name__}"
            with pytest.raises(TypeError, match=f"^{message}$"):
                getattr(module, op)(**{**VALID[op], name: wrong})


def is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@pytest.mark.parametrize("op", reference.OPS)
def test_the_kernels_refuse_other_devices_and_dtypes(op: str) -> None:
    """Outside of the interpreter."""
    with (
        _host.interpreted(False),
        pytest.raises(ValueError, match="must be on a CUDA device, got cpu"),
    ):
        getattr(fused, op)(**VALID[op])
    if op == "adamw":
        return
    wide = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in VALID[op].items()
    }
    with (
        _host.interpreted(False),
        pytest.raises(TypeError, match="must be float32.*got torch.float64"),
    ):
        getattr(fused, op)(**wide)
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16.*float8"):
        fused.gelu(ones(3).to(torch.float8_e4m3fn))


def test_attention_refuses_a_gpu_without_tritons_products() -> None:
    """That of ``fused`` itself, called by name or in a block; in either kind of dtype."""
    model = GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=1, n_embd=64), ops=fused)
    with _host.interpreted(capability=75):
        for run in (
            lambda: fused.attention(**VALID["attention"]),
            lambda: fused.attention_qkvpacked(ones(2, 4, 192).half(), 1),
            lambda: model(ids(1, 4)),
        ):
            with pytest.raises(ValueError, match="compute capability 8.0, got 7.5 on cpu: fastgpt"):
                run()


@pytest.mark.parametrize(
    ("op", "size", "arguments"),
    [
        ("layer_norm", MAX_WIDTH, lambda n: dict(x=ones(1, n), weight=ones(n))),
        ("residual_layer_norm", MAX_WIDTH,
         lambda n: dict(residual=ones(1, n), delta=ones(1, n), weight=ones(n))),
        ("attention", MAX_HEAD_SIZE, lambda n: dict.fromkeys("qkv", ones(1, 1, 2, n))),
        ("attention_qkvpacked", MAX_HEAD_SIZE, lambda n: dict(qkv=ones(1, 2, 3 * n), n_head=1)),
        ("attention_decode", MAX_HEAD_SIZE,
         lambda n: dict(qkv=ones(1, 1, 3 * n), cache=zeros(2, 1, 1, 70, n), positions=ids(1))),
    ],
)  # fmt: skip
def test_the_largest_size_of_the_kernels(op: str, size: int, arguments: Any) -> None:
    named = "cache" if op == "attention_decode" else signature(op)[0]
    with pytest.raises(
        ValueError, match=f"{named} must have a .* of at most {size}, got {size + 1}"
    ):
        getattr(fused, op)(**arguments(size + 1))


@pytest.mark.parametrize(
    "op", ["attention", "attention_qkvpacked", "embedding", "residual_layer_norm"]
)
def test_torch_ops_refuse_a_seed(op: str) -> None:
    with pytest.raises(ValueError, match="seed must be None on cpu: PyTorch's generator draws"):
        getattr(torch_ops, op)(**VALID[op], dropout_p=0.1, seed=ids(1))
