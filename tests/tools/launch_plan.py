"""All kernels that a user's GPU may launch, at the sizes that the launcher specialises on: 1
becomes a constant, multiples of 16 are marked, 17 is neither; None is a constant.

``RUNS`` contains model updates, generation from prompts, and ops that no model uses. Each one runs
on small CPU tensors within ``static.recorded``, so that kernels compute nothing. Every pair of
values of two options occurs in some run.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
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


Options = SimpleNamespace
Run = Callable[[Options], None]
RUNS: dict[str, Callable[[], None]] = {}  # function name → run over all option pairs


def run(**options: Sequence[Any]) -> Callable[[Run], Run]:
    """Add the function to ``RUNS``, called so that every pair of values of two options occurs."""

    def add(function: Run) -> Run:
        def all_pairs() -> None:
            for chosen in pairs(options):
                function(Options(**chosen))

        RUNS[function.__name__] = all_pairs
        return function

    return add


def pairs(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Choices of a value for each option that together cover every pair of values (greedily)."""
    names = list(options)
    left = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(options[a])), range(len(options[b])))
    }
    found = []
    while left:
        chosen = dict(min(left))  # first an uncovered pair; then values that cover most
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
    """The same rows with the row stride increased by ``apart``, unaligned if ``shift``."""
    room = x.new_zeros(*x.shape[:-1], x.shape[-1] + apart + shift)
    return torch.cat([room[..., :shift], x, room[..., x.shape[-1] + shift :]], -1)[
        ..., shift : x.shape[-1] + shift
    ]


@run(
    **_MODEL,
    dropout=_DROPOUT, documents=(False, True), recompute=(False, True), clip=(0.0, 1.0),
    ignored=(False, True), strided=(False, True), fp8=("none",),
)  # fmt: skip
def _update(c: Options) -> None:
    width = c.n_head * c.head_size
    config = GPTConfig(c.length, c.vocab, c.n_layer, c.n_head, width, c.dropout, c.bias)
    eot_token = 0 if c.documents else None
    model = GPT(config, fused, c.gelu, c.recompute, c.fp8, eot_token)
    half = _HALF.get(c.dtype)
    rounds = None if half is None else MasterAdamW(model, half, 0.1, 1e-3, (0.9, 0.95))
    plain = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    text = torch.zeros(c.batch, c.length + 1, dtype=torch.int64)
    idx, targets = text[:, :-1], text[:, 1:]  # row stride length + 1, as in views of a token array
    if not c.strided:
        idx, targets = idx.contiguous(), targets.contiguous()
    if c.ignored:
        targets = torch.full_like(targets, -1)
    with _autocast(c.dtype):
        loss = model(idx, targets)[1]
    loss.backward()
    if rounds is None:
        plain.step()
        return
    if c.clip:
        rounds.clip_grad_norm_(c.clip)
        rounds.found_inf = torch.zeros(())
    rounds.step()


@run(
    batch=(1, 16), length=_SIZES, vocab=(16, 48), width=(16, 48), dtype=("bf16", "fp16"),
)  # fmt: skip
def _fp8(c: Options) -> None:
    rest = dict(bias=False, gelu="none", dropout=0.0, documents=False, recompute=False, clip=0.0)
    sizes = dict(n_head=1, head_size=c.width, n_layer=1)
    _update(Options(**vars(c), **sizes, **rest, ignored=False, strided=False, fp8="head"))


@run(
    **_MODEL,
    rounded=(False, True), room=(1, 16, 17), new=(2, 17),
)  # fmt: skip
def _continue(c: Options) -> None:
    """Prefill, decode, and forward passes over the window once sequences outgrow it."""
    width = c.n_head * c.head_size
    config = GPTConfig(c.length + c.room, c.vocab, c.n_layer, c.n_head, width, 0.0, c.bias)
    model = GPT(config, fused, c.gelu).eval()
    if c.rounded:
        model.to(_dtype(c.dtype))
    prompts = [torch.zeros(c.length, dtype=torch.int64)] * c.batch
    with _autocast(c.dtype):
        for _ in Generator(model, Sampling(temperature=0.0))(prompts, c.new):
            pass


@run(
    batch=(1, 2), n_head=(1, 2), group=(1, 2), n_queries=_SIZES, n_keys=_SIZES,
    head_size=(*_SIZES, 32, 64, 128, 256),
    mask=("none", "causal", "documents", "lengths", "causal lengths"), dropout=_DROPOUT,
    layout=("heads first", "tokens first"), tf32=(False, True), dtype=("fp32", "bf16", "fp16"),
)  # fmt: skip
def _attend(c: Options) -> None:
    def part(n_head: int, length: int) -> Tensor:
        if c.layout == "heads first":
            return _leaf(c.batch, n_head, length, c.head_size, dtype=c.dtype)
        return _leaf(c.batch, length, n_head, c.head_size, dtype=c.dtype).transpose(1, 2)

    causal = c.mask not in ("none", "lengths")
    n_keys = c.n_queries if causal else c.n_keys
    q, k, v = part(c.n_head * c.group, c.n_queries), *(part(c.n_head, n_keys) for _ in "kv")
    options: dict[str, Any] = dict(causal=causal, dropout_p=c.dropout)
    if c.mask == "documents":
        options["doc_start"] = torch.zeros(c.batch, n_keys, dtype=torch.int32)
    if "lengths" in c.mask:
        options["key_lengths"] = torch.zeros(c.batch, dtype=torch.int32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if c.tf32 else "highest")
    try:
        fused.attention(q, k, v, **options).sum().backward()
    finally:
        torch.set_float32_matmul_precision(before)


@run(
    batch=_SIZES, length=(*_SIZES, 64), n_vocab=_SIZES, width=(*_SIZES, 8), n_positions=(64, 65),
    dropout=_DROPOUT, documents=(False, True), ids=(torch.int32, torch.int64),
    dtype=("fp32", "bf16", "fp16"),
)  # fmt: skip
def _embed(c: Options) -> None:
    idx = torch.zeros(c.batch, c.length, dtype=c.ids)
    token, position = (_leaf(n, c.width, dtype=c.dtype) for n in (c.n_vocab, c.n_positions))
    doc_start = torch.zeros(c.batch, c.length, dtype=torch.int32) if c.documents else None
    y = fused.embedding(idx, token, position, dropout_p=c.dropout, doc_start=doc_start)
    y.sum().backward()


@run(
    batch=_SIZES, n_head=_SIZES, n_slots=(*_SIZES, 129, 2048), head_size=(*_SIZES, 256),
    places=(torch.int32, torch.int64), dtype=("fp32", "bf16", "fp16"),
)  # fmt: skip
def _decode(c: Options) -> None:
    qkv = _leaf(c.batch, 1, 3 * c.n_head * c.head_size, dtype=c.dtype).detach()
    cache = qkv.new_zeros(2, c.batch, c.n_head, c.n_slots, c.head_size)
    fused.attention_decode(qkv, cache, torch.zeros(c.batch, dtype=c.places))


@run(
    n_rows=_SIZES, width=(*_SIZES, 8, 5000, 8192), apart=(0, 1, 16), shift=(0, 1),
    bias=(False, True), dtype=("fp32", "bf16", "fp16"),
)  # fmt: skip
def _rows(c: Options) -> None:
    """Each row-wise op by itself."""
    x = _view(_leaf(c.n_rows, c.width, dtype=c.dtype), c.apart, c.shift)
    weight, offset = (_view(_leaf(c.width), 0, c.shift) for _ in range(2))
    optional = offset if c.bias else None
    fused.gelu(x).sum().backward(retain_graph=True)
    fused.layer_norm(x, weight, optional).sum().backward(retain_graph=True)
    for dropout_p in _DROPOUT:
        y, total = fused.residual_layer_norm(
            x, x, weight, optional, delta_bias=optional, dropout_p=dropout_p
        )
        torch.autograd.backward((y, total), (y, total), retain_graph=True)
    y, _ = fused.residual_layer_norm(_leaf(c.n_rows, c.width), x, weight)
    y.sum().backward(retain_graph=True)
    for recompute in (None, (x, weight, optional, 1e-5)):
        for out in (*_SIZES, 8):
            matrix, back = _leaf(out, c.width, dtype=c.dtype), _leaf(c.width, out, dtype=c.dtype)
            added = _leaf(out, dtype=c.dtype) if c.bias else None
            y = fused.linear(x, matrix, added, recompute=recompute)
            y.sum().backward(retain_graph=True)
            y = fused.mlp(x, matrix, added, back, recompute=recompute)
            y.sum().backward(retain_graph=True)


@run(
    n_rows=(1000, 1024), width=(8, 16), out=(8, 16), bias=(False, True), wide=(False, True),
    dtype=("bf16", "fp16"),
)  # fmt: skip
def _many_rows(c: Options) -> None:
    """Split-K weight gradients, for weights in x's dtype and in float32."""
    dtype = "fp32" if c.wide else c.dtype
    weight, bias = _leaf(c.out, c.width, dtype=dtype), _leaf(c.out, dtype=dtype)
    x = _leaf(c.n_rows, c.width, dtype=c.dtype)
    fused.linear(x, weight, bias if c.bias else None).sum().backward()


@run(
    n_rows=_SIZES, n_classes=(*_SIZES, 5000), width=_SIZES, smoothing=(0.0, 0.1), z=(0.0, 1e-4),
    reduction=("mean", "sum"), gradient=(False, True), ignore_index=(-1, 0, 1), shift=(0, 1),
    dtype=("fp32", "bf16", "fp16"),
)  # fmt: skip
def _loss(c: Options) -> None:
    x, weight = _leaf(c.n_rows, c.width, dtype=c.dtype), _leaf(c.n_classes, c.width, dtype=c.dtype)
    targets = _view(torch.zeros(c.n_rows, dtype=torch.int64), 0, c.shift)
    if not c.gradient:
        x, weight = x.detach(), weight.detach()
    loss = fused.linear_cross_entropy(
        x, weight, targets, ignore_index=c.ignore_index, reduction=c.reduction,
        label_smoothing=c.smoothing, z_loss=c.z,
    )  # fmt: skip
    if c.gradient:
        loss.backward()


@run(
    n=_SIZES, shift=(0, 1), rounded=(None, torch.bfloat16, torch.float16),
    clip=(False, True), skip=(False, True), beta=(0.0, 0.9),
)  # fmt: skip
def _adamw(c: Options) -> None:
    param, grad, exp_avg, exp_avg_sq = (_view(torch.zeros(c.n), 0, c.shift) for _ in range(4))
    step, lr, factor, found_inf = (torch.zeros(()) for _ in range(4))
    fused.adamw(
        param, None if c.rounded is None else param.to(c.rounded), grad, exp_avg, exp_avg_sq,
        step, lr,
        betas=(c.beta, c.beta), eps=1e-8, weight_decay=0.1, clip=factor if c.clip else None,
        skip=found_inf if c.skip else None,
    )  # fmt: skip
    fused.accumulate([grad], [param.to(c.rounded or torch.bfloat16)])


@contextlib.contextmanager
def _on_gpu(capability: int) -> Iterator[list[Launch]]:
    """``static.recorded``, with ``fastgpt.ops`` sending CPU tensors to the Triton kernels."""
    with (
        recorded(capability) as launches,
        mock.patch.object(ops, "_implementation", lambda _: fused),
    ):
        yield launches


def launches(capability: int) -> list[Launch]:
    """All launches of ``RUNS`` on this compute capability."""
    with _on_gpu(capability) as found:
        for name, run in RUNS.items():
            if name != "_fp8" or capability >= 89:
                run()
    return found
