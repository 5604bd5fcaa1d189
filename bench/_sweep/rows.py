"""The lines of the launch tables of the kernels that memory bounds."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench._sweep.line import (
    Call,
    Line,
    Sizes,
    around,
    candidates,
    dict_line,
    formatted,
    gradients,
    in_module,
    leaf,
)
from fastgpt.kernels import adamw, embedding, fused, gelu, layer_norm, linear_cross_entropy

# --------------------------------------------------------------------------------------- LayerNorm


def layer_norm_lines(capability: int | None, dtype: torch.dtype) -> Iterator[Line]:
    """A formula of the width: one line serves all widths."""
    formula = layer_norm._launch
    currents = {"fwd": (4096, 8, 256), "bwd": (2048, 4, 512)}  # as the calls of the formula say
    for kernel, current in currents.items():
        elements, max_rows, warp_cols = current
        yield Line(
            name=f"layer_norm {kernel}",
            current=current,
            candidates=candidates(
                current,
                around(elements, 512, 16384),
                around(max_rows, 1, 16),
                around(warp_cols, 128, 1024),
            ),
            put=in_module(
                layer_norm,
                "_launch",
                lambda tile: lambda n_cols, elements, max_rows, warp_cols: formula(n_cols, *tile),
            ),
            call=_layer_norm_forward if kernel == "fwd" else _layer_norm_backward,
            sizes=tuple(
                dict(M=m, C=c)
                for m, c in (
                    (32768, 768),
                    (16384, 1600),
                    (16384, 1280),
                    (16384, 1024),
                    (16384, 384),
                    (32768, 128),
                )
            ),
            probe=dict(M=64, C=768),
            kernels=(f"_layer_norm_{kernel}_kernel",),
            text=formatted("launch = _launch(n_cols, elements={}, max_rows={}, warp_cols={})"),
        )


def _layer_norm_forward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    """The residual sum and its LayerNorm, as in 24 of GPT-2's 25 places."""
    residual, delta, weight, bias = (x.detach() for x in _layer_norm_inputs(device, dtype, sizes))
    nbytes = 4 * residual.numel() * dtype.itemsize  # residual, delta; y, total
    return Call(lambda: fused.residual_layer_norm(residual, delta, weight, bias), 0, nbytes)


def _layer_norm_backward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    inputs = residual, delta, weight, bias = _layer_norm_inputs(device, dtype, sizes)
    backward = gradients(fused.residual_layer_norm(residual, delta, weight, bias), inputs)
    return Call(backward, 0, 4 * residual.numel() * dtype.itemsize)  # dy, dtotal, total; dresidual


def _layer_norm_inputs(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> list[Tensor]:
    m, c = sizes["M"], sizes["C"]
    rows = [leaf(device, dtype, m, c) for _ in range(2)]
    return rows + [leaf(device, torch.float32, c) for _ in range(2)]


# ------------------------------------------------------------------------------- rows of the loss


def cross_entropy_lines(capability: int | None, dtype: torch.dtype) -> Iterator[Line]:
    current = (linear_cross_entropy.MAX_BLOCK, 256)

    def launch(tile: tuple[int, ...]) -> Callable[[int], dict[str, int]]:
        most, warp_cols = tile

        def formula(n_cols: int) -> dict[str, int]:
            block = max(256, min(most, 2 ** (n_cols - 1).bit_length()))
            return dict(BLOCK_N=block, num_warps=max(1, min(32, block // warp_cols)))

        return formula

    yield Line(
        name="cross_entropy rows",
        current=current,
        candidates=candidates(current, around(current[0], 256, 32768), (128, 256, 512)),
        put=in_module(linear_cross_entropy, "_launch", launch),
        call=_cross_entropy,
        sizes=(dict(M=4096, V=50304), dict(M=4096, V=50257), dict(M=16384, V=65)),
        probe=dict(M=16, V=50304),
        kernels=("_cross_entropy_rows_kernel",),
        text=formatted("MAX_BLOCK = {}  # num_warps=block_n // {}"),
    )


def _cross_entropy(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    m, v = sizes["M"], sizes["V"]
    logits = leaf(device, dtype, m, -(-v // 64) * 64).detach()
    work = torch.empty_like(logits)
    targets = torch.randint(v, (m,), device=device)
    losses = torch.empty(m, dtype=torch.float32, device=device)

    def run() -> list[Tensor]:
        linear_cross_entropy._rows(work[:, :v], targets, losses, -1, 0.0, 0.0, True)
        return [work[:, :v], losses]

    def reset() -> None:
        work.copy_(logits)

    reset()
    return Call(run, 0, 2 * m * v * dtype.itemsize, reset)


# --------------------------------------------------------------------------- GELU, embedding, AdamW


def gelu_lines(capability: int | None, dtype: torch.dtype) -> Iterator[Line]:
    """One launch for both directions."""
    for direction, call in (("fwd", _gelu_forward), ("bwd", _gelu_backward)):
        yield dict_line(
            gelu,
            "_LAUNCH",
            name=f"gelu {direction}",
            choices=(around(gelu._LAUNCH["BLOCK"], 256, 4096), (2, 4, 8)),
            call=call,
            sizes=(dict(M=32768, N=3072), dict(M=8192, N=6400), dict(M=1024, N=3072)),
            probe=dict(M=64, N=64),
            kernels=(f"_gelu_{direction}_kernel",),
        )


def _gelu_forward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    x = leaf(device, dtype, sizes["M"], sizes["N"]).detach()
    return Call(lambda: [gelu.gelu_forward(x, "none")], 0, 2 * x.numel() * dtype.itemsize)


def _gelu_backward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    x, dy = (leaf(device, dtype, sizes["M"], sizes["N"]).detach() for _ in range(2))
    return Call(lambda: [gelu.gelu_backward(dy, x, "none")], 0, 3 * x.numel() * dtype.itemsize)


def embedding_lines(capability: int | None, dtype: torch.dtype) -> Iterator[Line]:
    launch = embedding._LAUNCH
    sizes = (
        dict(B=32, T=1024, C=768, V=50304),
        dict(B=8, T=1024, C=1600, V=50257),
        dict(B=64, T=256, C=384, V=65),
    )
    yield dict_line(
        embedding,
        "_LAUNCH",
        name="embedding fwd",
        choices=(around(launch["BLOCK_M"], 1, 64), around(launch["BLOCK_N"], 32, 512), (2, 4, 8)),
        call=_embedding_forward,
        sizes=sizes,
        probe=dict(B=2, T=64, C=768, V=96),
        kernels=("_embedding_fwd_kernel",),
    )

    most, elements, num_warps = current = (1024, 4096, 4)  # as in the formula

    def launch_of(tile: tuple[int, ...]) -> Callable[[int], dict[str, int]]:
        most, elements, num_warps = tile

        def formula(n_cols: int) -> dict[str, int]:
            block_n = min(most, max(32, 2 ** (n_cols - 1).bit_length()))
            block_m = min(16, max(1, elements // block_n))
            return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps)

        return formula

    yield Line(
        name="embedding bwd token",
        current=current,
        candidates=candidates(
            current, around(most, 256, 2048), around(elements, 1024, 8192), (2, 4, 8)
        ),
        put=in_module(embedding, "_token_launch", launch_of),
        call=_embedding_backward,
        sizes=sizes,
        probe=dict(B=2, T=64, C=768, V=96),
        kernels=("_embedding_bwd_bands_kernel", "_embedding_bwd_token_kernel"),
        text=formatted(
            "block_n = min({}, max(32, triton.next_power_of_2(n_cols)))"
            "  # BLOCK_M=min(16, {} // block_n), num_warps={}"
        ),
    )


def _embedding_forward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    batch, length, width, vocab = (sizes[name] for name in "BTCV")
    idx = torch.randint(vocab, (batch, length), device=device)
    token = leaf(device, dtype, vocab, width).detach()
    position = leaf(device, dtype, length, width).detach()
    rows = idx.numel() + min(idx.numel(), vocab) + length  # out; those of the tables
    nbytes = rows * width * dtype.itemsize + idx.numel() * 8
    return Call(lambda: [fused.embedding(idx, token, position)], 0, nbytes)


def _embedding_backward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    """The gradients of both tables, sorting included."""
    batch, length, width, vocab = (sizes[name] for name in "BTCV")
    idx = torch.randint(vocab, (batch, length), device=device)
    tables = [leaf(device, dtype, vocab, width), leaf(device, dtype, length, width)]
    backward = gradients(fused.embedding(idx, *tables), tables)
    nbytes = (2 * idx.numel() + vocab + length) * width * dtype.itemsize
    return Call(backward, 0, nbytes)


def adamw_lines(capability: int | None, dtype: torch.dtype) -> Iterator[Line]:
    """float32 masters and moments, a rounded copy of ``dtype``."""
    yield dict_line(
        adamw,
        "_LAUNCH",
        name="adamw",
        choices=(around(adamw._LAUNCH["BLOCK"], 256, 4096), (2, 4, 8)),
        call=_adamw,
        sizes=(dict(N=124_475_904), dict(N=10_770_816)),
        probe=dict(N=4096),
        kernels=("_adamw_kernel",),
    )


def _adamw(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    n = sizes["N"]
    start = [leaf(device, torch.float32, n, std=0.02).detach() for _ in range(4)]
    start[3].abs_()  # second moments
    param, grad, exp_avg, exp_avg_sq = (x.clone() for x in start)
    rounded = None if dtype == torch.float32 else param.to(dtype)
    step, lr = torch.ones((), device=device), torch.full((), 1e-3, device=device)

    def run() -> list[Tensor]:
        fused.adamw(
            param, rounded, grad, exp_avg, exp_avg_sq, step, lr,
            betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
        )  # fmt: skip
        return [x for x in (param, rounded, exp_avg, exp_avg_sq) if x is not None]

    def reset() -> None:
        for x, y in zip((param, grad, exp_avg, exp_avg_sq), start, strict=True):
            x.copy_(y)
        step.fill_(1.0)

    written = 0 if rounded is None else n * dtype.itemsize
    return Call(run, 0, 28 * n + written, reset)
