"""LayerNorm in Triton against the plain op: parity, gradients, determinism, errors."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import triton

from fastgpt.kernels import fused, reference, torch_ops
from fastgpt.kernels.layer_norm import MAX_WIDTH, _layer_norm_bwd_op, _layer_norm_op
from tests.tools import interpreter, parity
from tests.tools.sanitizer import sanitize


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str, bias: bool
) -> tuple[list[torch.Tensor], list[str]]:
    n = shape[-1]
    inputs = [parity.randn(shape, dtype, device, layout) * 3 + 1]
    inputs += [parity.randn((n,), dtype, device, "strided") for _ in range(2 if bias else 1)]
    return inputs, ["x", "weight", "bias"][: len(inputs)]


@pytest.mark.parametrize("shape", parity.NORM_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_parity(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    i = parity.NORM_SHAPES.index(shape)
    layout = parity.LAYOUTS[i % len(parity.LAYOUTS)]
    inputs, names = _inputs(shape, dtype, device, layout, bias=i % 3 != 0)
    grad = parity.randn(shape, dtype, device, "transposed")
    ops = fused.layer_norm, torch_ops.layer_norm, reference.layer_norm
    parity.assert_parity(*ops, inputs, grad, names)


def _added_in_pairs(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """LayerNorm whose sums are those of pairs, of pairs of pairs, and so on: each sum is rounded,
    where ``RoundedOnce`` would round the mean of a row only."""

    def mean(y: torch.Tensor) -> torch.Tensor:
        n = y.shape[-1]
        y = F.pad(y, (0, triton.next_power_of_2(n) - n))
        while y.shape[-1] > 1:
            y = y[..., ::2] + y[..., 1::2]
        return y / n

    centred = x - mean(x)
    y = centred * torch.rsqrt(mean(centred * centred) + 1e-5) * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("bias", [False, True])
def test_large_mean_loses_no_more_than_pytorch(device: str, bias: bool) -> None:
    inputs, names = _inputs((9, 768), torch.float32, device, "contiguous", bias)
    inputs[0] = inputs[0] + 1000.0
    pytorch = torch_ops.layer_norm if device == "cuda" else _added_in_pairs
    ops = fused.layer_norm, pytorch, reference.layer_norm
    grad = torch.randn(9, 768, device=device)
    parity.assert_parity(*ops, inputs, grad, names)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu_arithmetic", "gpu_arithmetic"])
@pytest.mark.parametrize("width", [41, 48, 55, 1600])
def test_constant_row(device: str, width: int, gpu: bool) -> None:
    """Its mean is what it holds: a deviation of one bit would be scaled by 316, 1 / sqrt(eps)."""
    x = torch.tensor([[7.0], [-3.0], [11.0]], device=device).expand(3, width)
    weight, bias = torch.randn(2, width, device=device)
    with interpreter.gpu_arithmetic() if gpu else nullcontext():
        y = fused.layer_norm(x, weight, bias)
    assert torch.equal(y, bias.expand(3, width))


def test_rows_are_independent(device: str) -> None:
    x = torch.randn(33, 48, device=device)
    weight = torch.randn(48, device=device)
    y = fused.layer_norm(x, weight)
    x[20] = float("nan")
    z = fused.layer_norm(x, weight)
    assert z[20].isnan().all()
    assert torch.equal(torch.cat([y[:20], y[21:]]), torch.cat([z[:20], z[21:]]))


@pytest.mark.parametrize("width", [96, 8200])
def test_two_backwards_give_the_same_bits(device: str, width: int) -> None:
    x = torch.randn(70, width, device=device, requires_grad=True)
    weight = torch.randn(width, device=device, requires_grad=True)
    grad = torch.randn(70, width, device=device)
    runs = []
    for seed in (1, 2):
        with sanitize(seed=seed):  # interpreted: also in another order of the programs
            y = fused.layer_norm(x, weight)
            runs.append(torch.autograd.grad(y, (x, weight), grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias: bool) -> None:
    inputs = [torch.randn(3, 6), torch.randn(6), torch.randn(6)][: 3 if bias else 2]
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(fused.layer_norm, inputs)


def test_partial_gradients(device: str) -> None:
    """Frozen parameters get no gradient, and x's is unchanged by that."""
    x = torch.randn(4, 32, device=device, requires_grad=True)
    weight = torch.randn(32, device=device)
    fused.layer_norm(x, weight).sum().backward()
    expected = torch.autograd.grad(torch_ops.layer_norm(x, weight).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_float32_weight_with_low_precision_input(device: str) -> None:
    x = torch.randn(4, 64, device=device).bfloat16()
    weight = torch.randn(64, device=device, requires_grad=True)
    y = fused.layer_norm(x, weight)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad is not None
    expected = reference.layer_norm(x.double(), weight.double())
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)


def test_autocast_rounds_once(device: str) -> None:
    x, weight = torch.randn(4, 64, device=device), torch.randn(64, device=device)
    plain = fused.layer_norm(x, weight)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = fused.layer_norm(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, plain.bfloat16())


def test_opcheck(device: str) -> None:
    x = torch.randn(3, 5, 24, device=device, requires_grad=True)
    weight, bias = (torch.randn(24, device=device, requires_grad=True) for _ in range(2))
    torch.library.opcheck(_layer_norm_op, (x, weight, bias, 1e-5, torch.float32))
    torch.library.opcheck(_layer_norm_op, (x, weight, None, 1e-5, torch.float32))
    y, mean, rstd = _layer_norm_op(x.detach(), weight.detach(), None, 1e-5, torch.float32)
    args = (y, x.detach(), weight.detach(), mean, rstd, True)
    torch.library.opcheck(_layer_norm_bwd_op, args)


@pytest.mark.parametrize("width", [33, 8200])
def test_sanitized(width: int) -> None:
    x = torch.randn(21, width, requires_grad=True)
    weight, bias = torch.randn(2, width, requires_grad=True)
    with sanitize():
        fused.layer_norm(x, weight, bias).sum().backward()


def test_errors() -> None:
    x, weight = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\).*got \(7,\)"):
        fused.layer_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\).*got \(1, 8\)"):
        fused.layer_norm(x, weight, torch.ones(1, 8))
    with pytest.raises(ValueError, match="weight must have the dtype of x.*got torch.float16"):
        fused.layer_norm(x, weight.half())
    with pytest.raises(ValueError, match="bias must have the dtype of x.*got torch.float16"):
        fused.layer_norm(x, weight, weight.half())
    with pytest.raises(ValueError, match="bias must have the dtype of weight"):
        fused.layer_norm(x.half(), weight, weight.half())
    with pytest.raises(ValueError, match=r"weight must be on the device of x \(cpu\), got meta"):
        fused.layer_norm(x, weight.to("meta"))
    with pytest.raises(ValueError, match="eps must be at least 0, got -1.0"):
        fused.layer_norm(x, weight, eps=-1.0)
    with pytest.raises(ValueError, match=f"at most {MAX_WIDTH}, got {MAX_WIDTH + 1}"):
        fused.layer_norm(torch.randn(1, MAX_WIDTH + 1), torch.ones(MAX_WIDTH + 1))
    with pytest.raises(ValueError, match="x must have a last dimension of at least 1"):
        fused.layer_norm(torch.randn(3, 0), torch.ones(0))
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        fused.layer_norm(torch.arange(8), weight)
