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
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._harness import machine
from bench._harness.cli import USER_ERRORS, failed, failure_of, tyro, write_json
from bench._harness.timing import Clock
from bench._step import baselines
from fastgpt import GPT, GPTConfig
from fastgpt.devices import autocast, resolve_device, resolve_dtype
from fastgpt.generation import Generator, Sampling
from fastgpt.sampler import round_matrices
from fastgpt.training.config import Dtype

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
        logits = baselines.last_logits(model, window, baselines.sdpa)
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


@dataclass
class Taken:
    """What a method has done so far."""

    seconds: float = 0.0
    steps: int = 0
    failure: str | None = None


def taking_turns(
    runs: dict[str, Iterator[Tensor]],
    device: torch.device,
    context: AbstractContextManager[object],
    taken: dict[str, Taken],
) -> None:
    """Run all to their ends, and keep in ``taken`` what each took. A failure ends one alone."""
    taken.update({name: Taken() for name in runs})
    left = dict(runs)
    while left:
        for name, steps in list(left.items()):
            clock = Clock(device)
            try:
                with context:
                    clock.mark()
                    count = sum(1 for _ in zip(range(_TURN), steps, strict=False))
                    clock.mark()
                taken[name].seconds += clock.durations_ms()[0] / 1e3
            except Exception as error:  # whatever it is, the other method is measured all the same
                traceback.print_exc()
                taken[name].failure = failure_of(error)
                count = 0
            taken[name].steps += count
            if count < _TURN:
                del left[name]


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
    taken: dict[str, Taken] = {}
    complete = True
    try:
        taking_turns(runs(min(4, options.new_tokens)), device, context, {})  # what happens once
        taking_turns(runs(options.new_tokens), device, context, taken)
    except KeyboardInterrupt:
        complete = False
    rates = {
        name: options.batch_size * one.steps / one.seconds
        for name, one in taken.items()
        if one.steps and one.failure is None
    }
    record = {
        "complete": complete and len(rates) == len(taken),
        "machine": machine.facts(device),
        "options": {**asdict(options), "out": None},
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": fast.get_num_params(),
        "seconds": {name: one.seconds for name, one in taken.items()},
        "steps": {name: one.steps for name, one in taken.items()},
        "failures": {name: one.failure for name, one in taken.items() if one.failure},
        "tokens_per_s": rates,
        "speedup": None,
        "gb_per_s": None,
        "share_of_copy": None,
    }
    if record["complete"]:
        copied = machine.ceilings(device)["copy_tb_per_s"] * 1e12
        moved = bytes_per_token(fast, options) * options.new_tokens / taken["fastgpt"].seconds
        record["speedup"] = rates["fastgpt"] / rates["nanoGPT's method"]
        record["gb_per_s"], record["share_of_copy"] = moved / 1e9, moved / copied
    return record


def table(record: dict[str, Any]) -> Table:
    o = record["options"]
    if record["complete"]:
        caption = (
            f"fastgpt over nanoGPT's method: {record['speedup']:.2f}x; it reads "
            f"{record['gb_per_s']:.1f} GB/s, {record['share_of_copy']:.0%} of what a copy moves"
        )
    else:
        failures = [f"{name}: {failure}" for name, failure in record["failures"].items()]
        caption = "\n".join(failures or ["not complete: the run was interrupted"])
    out = Table(
        title=f"{machine.name(record['machine'])}, {record['parameters'] / 1e6:.1f}M parameters, "
        f"{record['dtype']}, {o['batch_size']} x ({o['prompt']} + {o['new_tokens']} tokens)",
        caption=caption,
    )
    for header in ("method", "tokens/s", "s"):
        out.add_column(header, justify="left" if header == "method" else "right")
    for name, rate in record["tokens_per_s"].items():
        out.add_row(name, f"{rate:.1f}", f"{record['seconds'][name]:.2f}")
    return out


def main(argv: list[str] | None = None) -> int:
    """0: done. 1: a method failed. 2: a wrong option, or a file that is there already. 130:
    interrupted; what was measured until then is written."""
    try:
        options = tyro().cli(Options, description=__doc__, args=argv, use_underscores=True)
        if options.out is not None and options.out.exists():
            raise FileExistsError(f"{options.out} is there already: it would be replaced")
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
        record = measure(options)
    except USER_ERRORS as error:
        return failed(error)
    except KeyboardInterrupt:
        failed("interrupted before anything was measured")
        return 130
    if options.out is not None:
        write_json(options.out, record)
    Console().print(table(record))
    if record["complete"]:
        return 0
    return 1 if record["failures"] else 130


if __name__ == "__main__":
    sys.exit(main())
