"""Writing text: nanoGPT's method (the whole window goes through the model for every token) beside
``GPT.generate``, in the same run, on the same random weights and prompts.

    python bench/bench_decode.py                          # GPT-2 124M, 256 new tokens
    python bench/bench_decode.py --batch_size=8 --out=decode.json

nanoGPT's method runs on the PyTorch functions that nanoGPT calls; on a GPU both under autocast,
ours with the matrices in half precision already, as ``fastgpt sample`` holds them. The two take
turns of a few tokens, so that whatever else the machine does meets both. In float32 their greedy
tokens are compared before.

Of a cached token memory traffic bounds the time: all weights but the position table, and half of
the cache on average. What is reached is given as a share of the rate of a device copy.
"""

import copy
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import _eager
import _machine
import torch
from _command import USER_ERRORS, failed, tyro
from _timing import Clock
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastgpt import GPT, GPTConfig
from fastgpt.config import Dtype
from fastgpt.devices import autocast, resolve_device, resolve_dtype
from fastgpt.generation import Generator, Sampling
from fastgpt.sampler import round_matrices

_TURN = 16  # tokens


@dataclass
class Options:
    """nanoGPT's way of writing text beside fastgpt's."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50304
    block_size: int = 1024
    prompt: int = 1
    """Tokens of the prompt."""
    new_tokens: int = 256
    batch_size: int = 1
    device: str = "auto"
    dtype: Dtype = "auto"
    threads: int = field(default_factory=torch.get_num_threads)
    """Of the CPU."""
    out: Path | None = None
    """File for the figures, as JSON; it must not exist yet."""


@torch.no_grad()
def whole_windows(model: GPT, idx: Tensor, new_tokens: int, greedy: bool) -> Iterator[Tensor]:
    """nanoGPT's method: the next token (B,) of each row, ``new_tokens`` times."""
    for _ in range(new_tokens):
        window = idx[:, -model.config.block_size :]
        logits = _eager.last_logits(model, window, _eager.sdpa)
        if greedy:
            drawn = logits.argmax(-1, keepdim=True)
        else:
            drawn = torch.multinomial(torch.softmax(logits.float(), -1), 1)
        idx = torch.cat((idx, drawn), dim=1)
        yield drawn[:, 0]


def same_greedy_tokens(plain: GPT, fast: GPT, idx: Tensor, new_tokens: int) -> bool:
    generator = Generator(fast, Sampling(temperature=0.0))
    pairs = zip(
        whole_windows(plain, idx, new_tokens, greedy=True),
        generator(list(idx), new_tokens),
        strict=True,
    )
    return all(torch.equal(a, b) for a, b in pairs)


def taking_turns(
    runs: dict[str, Iterator[Tensor]],
    device: torch.device,
    context: AbstractContextManager[object],
) -> dict[str, float]:
    """Seconds that each of the runs took, to its end."""
    seconds = dict.fromkeys(runs, 0.0)
    left = dict(runs)
    while left:
        for name, steps in list(left.items()):
            clock = Clock(device)
            with context:
                clock.mark()
                taken = sum(1 for _ in zip(range(_TURN), steps, strict=False))
                clock.mark()
            seconds[name] += clock.durations_ms()[0] / 1e3
            if taken < _TURN:
                del left[name]
    return seconds


def bytes_per_token(model: GPT, options: Options) -> float:
    """What a cached step has to read: the weights once, and each row's keys and values."""
    head = model.lm_head.weight
    tables = [model.transformer.wte.weight, model.transformer.wpe.weight]
    read = [p for p in model.parameters() if p is head or all(p is not table for table in tables)]
    weights = sum(p.numel() * p.element_size() for p in read)
    mean_length = options.prompt + options.new_tokens / 2
    element = model.transformer.h[0].attn.c_attn.weight.element_size()  # type: ignore
    cache = 2 * options.n_layer * options.n_embd * mean_length * element
    return weights + options.batch_size * cache


def measure(options: Options) -> dict[str, Any]:
    """The record of a run.

    Raises ValueError if the greedy tokens of the two differ in float32.
    """
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    config = GPTConfig(
        block_size=options.block_size,
        vocab_size=options.vocab_size,
        n_layer=options.n_layer,
        n_head=options.n_head,
        n_embd=options.n_embd,
        bias=False,
    )
    torch.manual_seed(0)
    plain = GPT(config).to(device).eval()
    fast = copy.deepcopy(plain)
    shape = (options.batch_size, options.prompt)
    idx = torch.randint(options.vocab_size, shape, device=device)
    if not same_greedy_tokens(plain, fast, idx, min(8, options.new_tokens)):
        raise ValueError("the greedy tokens with and without a cache differ in float32")
    round_matrices(fast, dtype)
    generator = Generator(fast, Sampling())

    def runs(new_tokens: int) -> dict[str, Iterator[Tensor]]:
        return {
            "nanoGPT's method": whole_windows(plain, idx, new_tokens, greedy=False),
            "fastgpt": generator(list(idx), new_tokens),
        }

    context = autocast(device, dtype)
    taking_turns(runs(min(4, options.new_tokens)), device, context)  # what happens once
    seconds = taking_turns(runs(options.new_tokens), device, context)
    made = options.batch_size * options.new_tokens
    rates = {name: made / time for name, time in seconds.items()}
    copied = _machine.ceilings(device)["copy_tb_per_s"] * 1e12
    moved = bytes_per_token(fast, options) * options.new_tokens / seconds["fastgpt"]
    return {
        "machine": _machine.facts(device),
        "options": {**asdict(options), "out": None},
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": fast.get_num_params(),
        "seconds": seconds,
        "tokens_per_s": rates,
        "speedup": rates["fastgpt"] / rates["nanoGPT's method"],
        "gb_per_s": moved / 1e9,
        "share_of_copy": moved / copied,
    }


def table(record: dict[str, Any]) -> Table:
    o = record["options"]
    out = Table(
        title=f"{_machine.name(record['machine'])}, {record['parameters'] / 1e6:.1f}M parameters, "
        f"{record['dtype']}, {o['batch_size']} x ({o['prompt']} + {o['new_tokens']} tokens)",
        caption=f"fastgpt over nanoGPT's method: {record['speedup']:.2f}x; it reads "
        f"{record['gb_per_s']:.1f} GB/s, {record['share_of_copy']:.0%} of what a copy moves",
    )
    for header in ("method", "tokens/s", "s"):
        out.add_column(header, justify="left" if header == "method" else "right")
    for name, rate in record["tokens_per_s"].items():
        out.add_row(name, f"{rate:.1f}", f"{record['seconds'][name]:.2f}")
    return out


def main(argv: list[str] | None = None) -> int:
    """0: done. 2: a wrong option, or a file that is there already."""
    try:
        options = tyro().cli(Options, description=__doc__, args=argv, use_underscores=True)
        if options.out is not None and options.out.exists():
            raise FileExistsError(f"{options.out} is there already: it would be replaced")
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
        record = measure(options)
    except USER_ERRORS as error:
        return failed(error)
    Console().print(table(record))
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
