"""The lines of the launch tables that ``sweep.py`` tries to improve: what else each could say, how
it is put into its table, and the calls whose time it decides.

Nothing is copied from the host functions: a candidate takes the line's place for the time of a
call, and the call is the one that the operators make.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastgpt.kernels import (
    _common,
    adamw,
    attention_tiles,
    embedding,
    fused,
    gelu,
    gemm,
    layer_norm,
    linear_cross_entropy,
)
from fastgpt.kernels._costs import attention_pairs

# What a line says, as numbers; None for a product that is left to cuBLAS.
Tile = tuple[int, ...] | None
Sizes = Mapping[str, int]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Call:
    """``run()`` launches the kernels and returns what they wrote, a new tensor or the same every
    time; ``reset()`` comes before it and is not timed. FLOPs and bytes as in ``_ceilings``."""

    run: Callable[[], Sequence[Tensor]]
    flops: int
    bytes: int
    reset: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Line:
    """One line of a launch table."""

    name: str  # "attention fwd, head size 64"
    current: Tile
    candidates: tuple[Tile, ...]  # the current one not among them
    put: Callable[[Tile], AbstractContextManager[None]]  # within, the table says this
    call: Callable[[torch.device, torch.dtype, Sizes], Call]
    sizes: tuple[Sizes, ...]  # those that are timed, the most important first
    probe: Sizes  # small, with the specialisation of those: what is compiled ahead of time
    kernels: tuple[str, ...]  # that the line configures
    text: Callable[[Tile], str]  # as it stands in the source
    resident: bool = False  # the last number is how many programs fit on a multiprocessor


def _candidates(current: Tile, *choices: Iterable[int | None]) -> tuple[Tile, ...]:
    return tuple(tile for tile in itertools.product(*choices) if tile != current)  # type: ignore


def _around(value: int, least: int, most: int) -> list[int]:
    """Half, the same and twice."""
    return sorted({v for v in (value // 2, value, value * 2) if least <= v <= most})


def _stages(value: int) -> list[int]:
    return [n for n in (value - 1, value, value + 1) if n >= 1]


def _in_dict(table: dict[Any, Any], key: Any) -> Callable[[Tile], AbstractContextManager[None]]:
    @contextmanager
    def put(tile: Tile) -> Iterator[None]:
        with mock.patch.dict(table, {key: tile}):
            yield

    return put


def _in_module(
    module: Any, name: str, value_of: Callable[[tuple[int, ...]], Any]
) -> Callable[[Tile], AbstractContextManager[None]]:
    @contextmanager
    def put(tile: Tile) -> Iterator[None]:
        assert tile is not None
        with mock.patch.object(module, name, value_of(tile)):
            yield

    return put


def _formatted(text: str) -> Callable[[Tile], str]:
    """A line that holds the numbers one by one."""
    return lambda tile: text.format(*(tile or ()))


def _leaf(device: torch.device, dtype: torch.dtype, *shape: int, std: float = 1.0) -> Tensor:
    """Random, never zeros; it wants a gradient."""
    return torch.randn(shape, device=device).mul_(std).to(dtype).requires_grad_()


def _gradients(outputs: Tensor | Sequence[Tensor], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    """The backward of a graph that stays, with random gradients."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    grads = [torch.randn_like(out) for out in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


# -------------------------------------------------------------------------------------- attention


def _attention_lines(capability: int | None, dtype: torch.dtype) -> Iterator[Line]:
    table = attention_tiles.tiles(capability, dtype)
    limits = attention_tiles.MAX_REGISTERS
    for head_size in (64, 128):
        for kernel in ("fwd", "dq", "dkdv"):
            key = (kernel, head_size)
            block_m, block_n, num_warps, num_stages = table[key]
            limited = capability == 90 and _common.is_half(dtype) and kernel == "fwd"
            current = (*table[key], limits.get(key, 0)) if limited else table[key]
            lengths = ((32, 1024), (8, 4096), (128, 256), (2, 16384), (512, 64))
            yield Line(
                name=f"attention {kernel}, head size {head_size}",
                current=current,
                candidates=_candidates(
                    current,
                    _around(block_m, 16, 256),
                    _around(block_n, 16, 256),
                    (4, 8),
                    _stages(num_stages),
                    *([(0, 128)] if limited else []),
                ),
                put=_with_limit(table, limits, key) if limited else _in_dict(table, key),
                call=_attention_forward if kernel == "fwd" else _attention_backward,
                sizes=tuple(dict(B=b, T=t, H=768 // head_size, D=head_size) for b, t in lengths),
                probe=dict(B=1, T=1024, H=2, D=head_size),
                kernels=(
                    "_attention_fwd_kernel"
                    if kernel == "fwd"
                    else f"_attention_bwd_{kernel}_kernel",
                ),
                text=_attention_text(key, limited),
            )


def _with_limit(
    table: dict[Any, Any], limits: dict[Any, int], key: tuple[str, int]
) -> Callable[[Tile], AbstractContextManager[None]]:
    """The last number of a candidate is the registers that a thread may have; 0 for no limit."""

    @contextmanager
    def put(tile: Tile) -> Iterator[None]:
        assert tile is not None
        *shape, limit = tile
        with mock.patch.dict(table, {key: tuple(shape)}), mock.patch.dict(limits):
            limits.pop(key, None)
            if limit:
                limits[key] = limit
            yield

    return put


def _attention_text(key: tuple[str, int], limited: bool) -> Callable[[Tile], str]:
    name = f'("{key[0]}", {key[1]})'

    def text(tile: Tile) -> str:
        if not limited or tile is None:
            return f"{name}: {tile},"
        *shape, limit = tile
        note = f"{name}: {limit}" if limit else f"nothing for {name}"
        return f"{name}: {tuple(shape)},  # MAX_REGISTERS: {note}"

    return text


def _attention_forward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    qkv, n_head, product, nbytes = _attention_inputs(device, dtype, sizes)
    qkv = qkv.detach()
    return Call(lambda: [fused.attention_qkvpacked(qkv, n_head)], 2 * product, 4 * nbytes)


def _attention_backward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    """Both kernels: one needs what the other wrote."""
    qkv, n_head, product, nbytes = _attention_inputs(device, dtype, sizes)
    backward = _gradients(fused.attention_qkvpacked(qkv, n_head), [qkv])
    return Call(backward, 5 * product, 9 * nbytes)


def _attention_inputs(
    device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> tuple[Tensor, int, int, int]:
    """qkv, heads, FLOPs of one product under the diagonal, bytes of (B, T, C)."""
    batch, length, n_head, head_size = (sizes[name] for name in "BTHD")
    qkv = _leaf(device, dtype, batch, length, 3 * n_head * head_size)
    product = 2 * batch * n_head * attention_pairs(length, length, causal=True) * head_size
    return qkv, n_head, product, qkv.numel() // 3 * dtype.itemsize


# ------------------------------------------------------------------------------------------- GEMMs


def _gemm_lines(capability: int | None, dtype: torch.dtype) -> Iterator[Line]:
    if capability is None:
        table = gemm.INTERPRETER_TILES
    elif dtype == torch.float32:
        return  # cuBLAS
    elif 90 <= capability < 120:
        table = gemm.TMA_TILES
    else:
        table = gemm.POINTER_TILES
    calls = {
        "fwd": _linear_gelu,
        "bwd": _linear_gelu_gradient,
        "bwd_recompute": _linear_gelu_gradient_recompute,
        "weight": _weight_gradient,
    }
    kernel_sizes = {
        # fc and its gradient: (M, K) by (K, N)
        True: ((32768, 768, 3072), (8192, 1600, 6400), (16384, 384, 1536), (4096, 768, 3072)),
        # the gradients of fc, qkv, projection and fc2: (T, M)ᵀ by (T, N)
        False: ((32768, 3072, 768), (32768, 2304, 768), (32768, 768, 768), (4096, 3072, 768)),
    }
    for kernel, call in calls.items():
        current = table[kernel]
        block_m, block_n, block_k, _, num_stages, _ = current or (128, 128, 64, 8, 3, 2)
        tiles = _candidates(
            current,
            _around(block_m, 64, 256),
            _around(block_n, 64, 256),
            sorted({32, 64, block_k}),
            (4, 8),
            _stages(num_stages),
            (1,),
        )
        epilogue = kernel != "weight"
        names = ("M", "K", "N") if epilogue else ("T", "M", "N")
        yield Line(
            name=f"gemm {kernel}",
            current=current,
            candidates=tiles if current is None else (*tiles, None),
            put=_in_dict(table, kernel),
            call=call,
            sizes=tuple(dict(zip(names, sizes, strict=True)) for sizes in kernel_sizes[epilogue]),
            probe=dict(zip(names, (256, 256, 256), strict=True)),
            kernels=("_linear_gelu_kernel" if epilogue else "_weight_grad_kernel",),
            text=lambda tile, kernel=kernel: f'"{kernel}": {tile},',  # type: ignore
            resident=True,
        )


def _linear_gelu(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    m, k, n = sizes["M"], sizes["K"], sizes["N"]
    x, weight = _leaf(device, dtype, m, k).detach(), _leaf(device, dtype, n, k, std=0.02).detach()
    bias = _leaf(device, dtype, n).detach()
    nbytes = dtype.itemsize * (m * k + n * k + n + 2 * m * n)
    return Call(lambda: gemm.linear_gelu(x, weight, bias, "none"), 2 * m * n * k, nbytes)


def _linear_gelu_gradient(
    device: torch.device, dtype: torch.dtype, sizes: Sizes, recompute: bool = False
) -> Call:
    m, k, n = sizes["M"], sizes["K"], sizes["N"]
    dy, weight = _leaf(device, dtype, m, k).detach(), _leaf(device, dtype, k, n, std=0.02).detach()
    pre = _leaf(device, dtype, m, n).detach()
    nbytes = dtype.itemsize * (m * k + n * k + (3 if recompute else 2) * m * n)

    def run() -> list[Tensor]:
        found = gemm.linear_gelu_gradient(dy, weight, pre, "none", recompute)
        return [x for x in found if x is not None]

    return Call(run, 2 * m * n * k, nbytes)


def _linear_gelu_gradient_recompute(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    return _linear_gelu_gradient(device, dtype, sizes, recompute=True)


def _weight_gradient(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    t, m, n = sizes["T"], sizes["M"], sizes["N"]
    dy, x = _leaf(device, dtype, t, m).detach(), _leaf(device, dtype, t, n).detach()

    def run() -> list[Tensor]:
        return [g for g in gemm.weight_gradient(dy, x, True, torch.float32) if g is not None]

    return Call(run, 2 * t * m * n, dtype.itemsize * t * (m + n) + 4 * (m * n + m))


# --------------------------------------------------------------------------------------- LayerNorm


def _layer_norm_lines(capability: int | None, dtype: torch.dtype) -> Iterator[Line]:
    """A formula of the width: one line serves all widths."""
    formula = layer_norm._launch
    currents = {"fwd": (4096, 8, 256), "bwd": (2048, 4, 512)}  # as the calls of the formula say
    for kernel, current in currents.items():
        elements, max_rows, warp_cols = current
        yield Line(
            name=f"layer_norm {kernel}",
            current=current,
            candidates=_candidates(
                current,
                _around(elements, 512, 16384),
                _around(max_rows, 1, 16),
                _around(warp_cols, 128, 1024),
            ),
            put=_in_module(
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
            text=_formatted("launch = _launch(n_cols, elements={}, max_rows={}, warp_cols={})"),
        )


def _layer_norm_forward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    """The residual sum and its LayerNorm, as in 24 of GPT-2's 25 places."""
    residual, delta, weight, bias = (x.detach() for x in _layer_norm_inputs(device, dtype, sizes))
    nbytes = 4 * residual.numel() * dtype.itemsize  # residual, delta; y, total
    return Call(lambda: fused.residual_layer_norm(residual, delta, weight, bias), 0, nbytes)


def _layer_norm_backward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    inputs = residual, delta, weight, bias = _layer_norm_inputs(device, dtype, sizes)
    backward = _gradients(fused.residual_layer_norm(residual, delta, weight, bias), inputs)
    return Call(backward, 0, 4 * residual.numel() * dtype.itemsize)  # dy, dtotal, total; dresidual


def _layer_norm_inputs(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> list[Tensor]:
    m, c = sizes["M"], sizes["C"]
    rows = [_leaf(device, dtype, m, c) for _ in range(2)]
    return rows + [_leaf(device, torch.float32, c) for _ in range(2)]


# ------------------------------------------------------------------------------- rows of the loss


def _cross_entropy_lines(capability: int | None, dtype: torch.dtype) -> Iterator[Line]:
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
        candidates=_candidates(current, _around(current[0], 256, 32768), (128, 256, 512)),
        put=_in_module(linear_cross_entropy, "_launch", launch),
        call=_cross_entropy,
        sizes=(dict(M=4096, V=50304), dict(M=4096, V=50257), dict(M=16384, V=65)),
        probe=dict(M=16, V=50304),
        kernels=("_cross_entropy_rows_kernel",),
        text=_formatted("MAX_BLOCK = {}  # num_warps=block_n // {}"),
    )


def _cross_entropy(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    m, v = sizes["M"], sizes["V"]
    logits = _leaf(device, dtype, m, -(-v // 64) * 64).detach()
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


def _gelu_lines(capability: int | None, dtype: torch.dtype) -> Iterator[Line]:
    """One launch for both directions."""
    for direction, call in (("fwd", _gelu_forward), ("bwd", _gelu_backward)):
        yield _dict_line(
            gelu,
            "_LAUNCH",
            name=f"gelu {direction}",
            choices=(_around(gelu._LAUNCH["BLOCK"], 256, 4096), (2, 4, 8)),
            call=call,
            sizes=(dict(M=32768, N=3072), dict(M=8192, N=6400), dict(M=1024, N=3072)),
            probe=dict(M=64, N=64),
            kernels=(f"_gelu_{direction}_kernel",),
        )


def _gelu_forward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    x = _leaf(device, dtype, sizes["M"], sizes["N"]).detach()
    return Call(lambda: [gelu.gelu_forward(x, "none")], 0, 2 * x.numel() * dtype.itemsize)


def _gelu_backward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    x, dy = (_leaf(device, dtype, sizes["M"], sizes["N"]).detach() for _ in range(2))
    return Call(lambda: [gelu.gelu_backward(dy, x, "none")], 0, 3 * x.numel() * dtype.itemsize)


def _embedding_lines(capability: int | None, dtype: torch.dtype) -> Iterator[Line]:
    launch = embedding._LAUNCH
    sizes = (
        dict(B=32, T=1024, C=768, V=50304),
        dict(B=8, T=1024, C=1600, V=50257),
        dict(B=64, T=256, C=384, V=65),
    )
    yield _dict_line(
        embedding,
        "_LAUNCH",
        name="embedding fwd",
        choices=(_around(launch["BLOCK_M"], 1, 64), _around(launch["BLOCK_N"], 32, 512), (2, 4, 8)),
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
        candidates=_candidates(
            current, _around(most, 256, 2048), _around(elements, 1024, 8192), (2, 4, 8)
        ),
        put=_in_module(embedding, "_token_launch", launch_of),
        call=_embedding_backward,
        sizes=sizes,
        probe=dict(B=2, T=64, C=768, V=96),
        kernels=("_embedding_bwd_bands_kernel", "_embedding_bwd_token_kernel"),
        text=_formatted(
            "block_n = min({}, max(32, triton.next_power_of_2(n_cols)))"
            "  # BLOCK_M=min(16, {} // block_n), num_warps={}"
        ),
    )


def _embedding_forward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    batch, length, width, vocab = (sizes[name] for name in "BTCV")
    idx = torch.randint(vocab, (batch, length), device=device)
    token = _leaf(device, dtype, vocab, width).detach()
    position = _leaf(device, dtype, length, width).detach()
    rows = idx.numel() + min(idx.numel(), vocab) + length  # out; those of the tables
    nbytes = rows * width * dtype.itemsize + idx.numel() * 8
    return Call(lambda: [fused.embedding(idx, token, position)], 0, nbytes)


def _embedding_backward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    """The gradients of both tables, sorting included."""
    batch, length, width, vocab = (sizes[name] for name in "BTCV")
    idx = torch.randint(vocab, (batch, length), device=device)
    tables = [_leaf(device, dtype, vocab, width), _leaf(device, dtype, length, width)]
    backward = _gradients(fused.embedding(idx, *tables), tables)
    nbytes = (2 * idx.numel() + vocab + length) * width * dtype.itemsize
    return Call(backward, 0, nbytes)


def _adamw_lines(capability: int | None, dtype: torch.dtype) -> Iterator[Line]:
    """float32 masters and moments, a rounded copy of ``dtype``."""
    yield _dict_line(
        adamw,
        "_LAUNCH",
        name="adamw",
        choices=(_around(adamw._LAUNCH["BLOCK"], 256, 4096), (2, 4, 8)),
        call=_adamw,
        sizes=(dict(N=124_475_904), dict(N=10_770_816)),
        probe=dict(N=4096),
        kernels=("_adamw_kernel",),
    )


def _adamw(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    n = sizes["N"]
    start = [_leaf(device, torch.float32, n, std=0.02).detach() for _ in range(4)]
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


def _dict_line(
    module: Any, name_in_module: str, choices: Sequence[Iterable[int]], **fields: Any
) -> Line:
    """A launch that stands in its module as one dict."""
    launch: dict[str, int] = getattr(module, name_in_module)
    current = tuple(launch.values())

    def of(tile: tuple[int, ...]) -> dict[str, int]:
        return dict(zip(launch, tile, strict=True))

    def text(tile: Tile) -> str:
        assert tile is not None
        return f"{name_in_module} = dict({', '.join(f'{k}={v}' for k, v in of(tile).items())})"

    return Line(
        current=current,
        candidates=_candidates(current, *choices),
        put=_in_module(module, name_in_module, of),
        text=text,
        **fields,
    )


OPS: dict[str, Callable[[int | None, torch.dtype], Iterator[Line]]] = {
    "attention": _attention_lines,
    "gemm": _gemm_lines,
    "layer_norm": _layer_norm_lines,
    "cross_entropy": _cross_entropy_lines,
    "gelu": _gelu_lines,
    "embedding": _embedding_lines,
    "adamw": _adamw_lines,
}


def lines(op: str, capability: int | None, dtype: torch.dtype) -> dict[str, Line]:
    """Name → line. ``capability``: 80, 90, 100, ...; None for the interpreter's tables."""
    return {line.name: line for line in OPS[op](capability, dtype)}
