"""What a user's GPU is asked to launch, at the sizes where the launcher specialises: 1 becomes a
constant, a multiple of 16 says so, 17 is neither; None is a constant.

``RUNS`` holds updates of a model, prompts that it continues, and ops that no model reaches; each is
run on small CPU tensors within ``static.recorded``, so that nothing is computed by a kernel. Every
pair of values of two options occurs in some run.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench._compile.static import Launch, recorded
from fastgpt import GPT, GPTConfig, ops
from fastgpt.generation import Generator, Sampling
from fastgpt.kernels import fused
from fastgpt.training.optimizer import MasterAdamW

CAPABILITIES = (80, 86, 89, 90, 100, 120)

_SIZES = (1, 16, 17)
_DROPOUT = (0.0, 0.5, 0.1, 2**-16)  # thresholds of 32,768, 6,554 and 1
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MODEL: dict[str, tuple] = dict(
    batch=_SIZES,
    length=_SIZES,
    vocab=_SIZES,
    n_head=(1, 2, 16, 17),
    head_size=(*_SIZES, 8),
    n_layer=(1, 2),
    bias=(False, True),
    dtype=("fp32", "bf16", "fp16"),
    gelu=("none", "tanh"),
)
_UPDATE = _MODEL | dict(
    dropout=_DROPOUT,
    documents=(False, True),
    recompute=(False, True),
    clip=(0.0, 1.0),
    ignored=(False, True),
    strided=(False, True),
)
_FP8 = dict(
    batch=(1, 16), length=_SIZES, vocab=(16, 48), width=(16, 48), dtype=("bf16", "fp16"),
)  # fmt: skip
_CONTINUED = _MODEL | dict(rounded=(False, True), room=(1, 16, 17), new=(2, 17))
_DECODE = dict(
    batch=_SIZES, n_head=_SIZES, n_slots=(*_SIZES, 129, 2048), head_size=(*_SIZES, 256),
    places=(torch.int32, torch.int64), dtype=("fp32", "bf16", "fp16"),
)  # fmt: skip
_ATTENTION = dict(
    batch=(1, 2), n_head=(1, 2), n_queries=_SIZES, n_keys=_SIZES,
    head_size=(*_SIZES, 32, 64, 128, 256), mask=("none", "causal", "documents"), dropout=_DROPOUT,
    layout=("heads first", "tokens first"), tf32=(False, True), dtype=("fp32", "bf16", "fp16"),
)  # fmt: skip
_EMBEDDING = dict(
    batch=_SIZES, length=(*_SIZES, 64), n_vocab=_SIZES, width=(*_SIZES, 8), n_positions=(64, 65),
    dropout=_DROPOUT, documents=(False, True), ids=(torch.int32, torch.int64),
    dtype=("fp32", "bf16", "fp16"),
)  # fmt: skip
_ROWS = dict(
    n_rows=_SIZES, width=(*_SIZES, 8, 5000, 8192), apart=(0, 1, 16), shift=(0, 1),
    bias=(False, True), dtype=("fp32", "bf16", "fp16"),
)  # fmt: skip
_LOSS = dict(
    n_rows=_SIZES, n_classes=(*_SIZES, 5000), width=_SIZES, smoothing=(0.0, 0.1), z=(0.0, 1e-4),
    reduction=("mean", "sum"), gradient=(False, True), ignore_index=(-1, 0, 1), shift=(0, 1),
    dtype=("fp32", "bf16", "fp16"),
)  # fmt: skip
_ADAMW = dict(
    n=_SIZES, shift=(0, 1), rounded=(None, torch.bfloat16, torch.float16),
    clip=(False, True), skip=(False, True), beta=(0.0, 0.9),
)  # fmt: skip


def pairs(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Choices of one value for each option, so that every pair of values occurs in one of them."""
    names = list(options)
    left = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(options[a])), range(len(options[b])))
    }
    found = []
    while left:
        chosen = dict(min(left))  # what is still to come, in a fixed order; then greedily the most
        for name in names:
            if name not in chosen:
                chosen[name] = max(
                    range(len(options[name])),
                    key=lambda value: sum(
                        tuple(sorted(((name, value), other), key=lambda p: names.index(p[0])))
                        in left
                        for other in chosen.items()
                    ),
                )
        ordered = [(name, chosen[name]) for name in names]
        left -= set(itertools.combinations(ordered, 2))
        found.append({name: options[name][value] for name, value in ordered})
    return found


# ----------------------------------------------------------------------------------------- runs


def _autocast(dtype: str) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cpu", _HALF[dtype]) if dtype in _HALF else contextlib.nullcontext()


def _dtype(name: str) -> torch.dtype:
    return _HALF.get(name, torch.float32)


def _leaf(*shape: int, dtype: str = "fp32") -> Tensor:
    return torch.zeros(shape, dtype=_dtype(dtype), requires_grad=True)


def _view(x: Tensor, apart: int, shift: int) -> Tensor:
    """The same rows, ``apart`` elements more from one to the next, and not aligned if ``shift``."""
    room = x.new_zeros(*x.shape[:-1], x.shape[-1] + apart + shift)
    return torch.cat([room[..., :shift], x, room[..., x.shape[-1] + shift :]], -1)[
        ..., shift : x.shape[-1] + shift
    ]


def _update(
    batch: int, length: int, vocab: int, n_head: int, head_size: int, n_layer: int, bias: bool,
    dtype: str, gelu: str, dropout: float, documents: bool, recompute: bool, clip: float,
    ignored: bool, strided: bool, fp8: str = "none",
) -> None:  # fmt: skip
    config = GPTConfig(length, vocab, n_layer, n_head, n_head * head_size, dropout, bias)
    separator = 0 if documents else None
    model = GPT(config, fused, gelu, recompute, fp8, separator)
    rounds = MasterAdamW(model, _HALF[dtype], 0.1, 1e-3, (0.9, 0.95)) if dtype in _HALF else None
    plain = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    text = torch.zeros(batch, length + 1, dtype=torch.int64)
    idx, targets = text[:, :-1], text[:, 1:]  # rows of length + 1, as from an array of tokens
    if not strided:
        idx, targets = idx.contiguous(), targets.contiguous()
    if ignored:
        targets = torch.full_like(targets, -1)
    with _autocast(dtype):
        loss = model(idx, targets)[1]
    loss.backward()
    if rounds is None:
        plain.step()
        return
    if clip:
        rounds.clip_grad_norm_(clip)
        rounds.found_inf = torch.zeros(())
    rounds.step()


def _fp8(
    batch: int, length: int, vocab: int, width: int, dtype: str,
) -> None:  # fmt: skip
    _update(
        batch, length, vocab, 1, width, 1, False, dtype, "none", 0.0, False, False, 0.0, False,
        False, "head",
    )  # fmt: skip


def _continue(
    batch: int, length: int, vocab: int, n_head: int, head_size: int, n_layer: int, bias: bool,
    dtype: str, gelu: str, rounded: bool, room: int, new: int,
) -> None:  # fmt: skip
    """Prefill, decode, and the window when the sequences have outgrown it."""
    config = GPTConfig(length + room, vocab, n_layer, n_head, n_head * head_size, 0.0, bias)
    model = GPT(config, fused, gelu).eval()
    if rounded:
        model.to(_dtype(dtype))
    prompts = [torch.zeros(length, dtype=torch.int64)] * batch
    with _autocast(dtype):
        for _ in Generator(model, Sampling(temperature=0.0))(prompts, new):
            pass


def _attend(
    batch: int, n_head: int, n_queries: int, n_keys: int, head_size: int, mask: str,
    dropout: float, layout: str, tf32: bool, dtype: str,
) -> None:  # fmt: skip
    def part(length: int) -> Tensor:
        if layout == "heads first":
            return _leaf(batch, n_head, length, head_size, dtype=dtype)
        return _leaf(batch, length, n_head, head_size, dtype=dtype).transpose(1, 2)

    n_keys = n_keys if mask == "none" else n_queries
    q, k, v = part(n_queries), part(n_keys), part(n_keys)
    starts = torch.zeros(batch, n_keys, dtype=torch.int32) if mask == "documents" else None
    options: dict[str, Any] = dict(causal=mask != "none", dropout_p=dropout, starts=starts)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        fused.attention(q, k, v, **options).sum().backward()
    finally:
        torch.set_float32_matmul_precision(before)


def _embed(
    batch: int, length: int, n_vocab: int, width: int, n_positions: int, dropout: float,
    documents: bool, ids: torch.dtype, dtype: str,
) -> None:  # fmt: skip
    idx = torch.zeros(batch, length, dtype=ids)
    token, position = _leaf(n_vocab, width, dtype=dtype), _leaf(n_positions, width, dtype=dtype)
    starts = torch.zeros(batch, length, dtype=torch.int32) if documents else None
    y = fused.embedding(idx, token, position, dropout_p=dropout, starts=starts)
    y.sum().backward()


def _decode(
    batch: int, n_head: int, n_slots: int, head_size: int, places: torch.dtype, dtype: str
) -> None:
    qkv = _leaf(batch, 1, 3 * n_head * head_size, dtype=dtype).detach()
    cache = qkv.new_zeros(2, batch, n_head, n_slots, head_size)
    fused.attention_decode(qkv, cache, torch.zeros(batch, dtype=places))


def _rows(n_rows: int, width: int, apart: int, shift: int, bias: bool, dtype: str) -> None:
    """Each op that takes rows, by itself."""
    x = _view(_leaf(n_rows, width, dtype=dtype), apart, shift)
    weight, offset = (_view(_leaf(width), 0, shift) for _ in range(2))
    optional = offset if bias else None
    fused.gelu(x).sum().backward(retain_graph=True)
    fused.layer_norm(x, weight, optional).sum().backward(retain_graph=True)
    for dropout_p in _DROPOUT:
        y, total = fused.residual_layer_norm(
            x, x, weight, optional, delta_bias=optional, dropout_p=dropout_p
        )
        torch.autograd.backward((y, total), (y, total), retain_graph=True)
    y, _ = fused.residual_layer_norm(_leaf(n_rows, width), x, weight)
    y.sum().backward(retain_graph=True)
    for recompute in (None, (x, weight, optional, 1e-5)):
        for out in (*_SIZES, 8):
            matrix, back = _leaf(out, width, dtype=dtype), _leaf(width, out, dtype=dtype)
            added = _leaf(out, dtype=dtype) if bias else None
            y = fused.linear(x, matrix, added, recompute=recompute)
            y.sum().backward(retain_graph=True)
            y = fused.mlp(x, matrix, added, back, recompute=recompute)
            y.sum().backward(retain_graph=True)


def _loss(
    n_rows: int, n_classes: int, width: int, smoothing: float, z: float, reduction: str,
    gradient: bool, ignore_index: int, shift: int, dtype: str,
) -> None:  # fmt: skip
    x, weight = _leaf(n_rows, width, dtype=dtype), _leaf(n_classes, width, dtype=dtype)
    targets = _view(torch.zeros(n_rows, dtype=torch.int64), 0, shift)
    if not gradient:
        x, weight = x.detach(), weight.detach()
    loss = fused.linear_cross_entropy(
        x, weight, targets, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=smoothing, z_loss=z,
    )  # fmt: skip
    if gradient:
        loss.backward()


def _adamw(
    n: int, shift: int, rounded: torch.dtype | None, clip: bool, skip: bool, beta: float
) -> None:
    param, grad, exp_avg, exp_avg_sq = (_view(torch.zeros(n), 0, shift) for _ in range(4))
    step, lr, factor, found_inf = (torch.zeros(()) for _ in range(4))
    fused.adamw(
        param, None if rounded is None else param.to(rounded), grad, exp_avg, exp_avg_sq, step, lr,
        betas=(beta, beta), eps=1e-8, weight_decay=0.1, clip=factor if clip else None,
        skip=found_inf if skip else None,
    )  # fmt: skip


def _all(run: Callable[..., None], options: Mapping[str, Sequence[Any]]) -> None:
    for chosen in pairs(options):
        run(**chosen)


# Name → what is run.
RUNS: dict[str, Callable[[], None]] = {
    "update": partial(_all, _update, _UPDATE),
    "fp8": partial(_all, _fp8, _FP8),
    "continue": partial(_all, _continue, _CONTINUED),
    "attention": partial(_all, _attend, _ATTENTION),
    "embedding": partial(_all, _embed, _EMBEDDING),
    "decode": partial(_all, _decode, _DECODE),
    "rows": partial(_all, _rows, _ROWS),
    "loss": partial(_all, _loss, _LOSS),
    "adamw": partial(_all, _adamw, _ADAMW),
}


@contextlib.contextmanager
def _on_gpu(capability: int) -> Iterator[list[Launch]]:
    """``static.recorded``; and ``fastgpt.ops`` takes CPU tensors to the Triton kernels."""
    with (
        recorded(capability) as launches,
        mock.patch.object(ops, "_implementation", lambda _: fused),
    ):
        yield launches


def launches(capability: int) -> list[Launch]:
    """All that ``RUNS`` would launch there."""
    with _on_gpu(capability) as found:
        for name, run in RUNS.items():
            if name != "fp8" or capability >= 89:
                run()
    return found
