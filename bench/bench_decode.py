"""Generation speed: nanoGPT's method, which recomputes the whole window for every token, against
``GPT.generate``, in one run with the same random weights and prompts.

    python bench/bench_decode.py                          # GPT-2 124M, 256 new tokens
    python bench/bench_decode.py --batch_size=8 --out=decode.json

nanoGPT's method uses the PyTorch functions that nanoGPT calls. On a GPU both run under autocast,
ours with half-precision matrices as in ``fastgpt sample``. The two take turns of a few tokens, so
that other load on the machine affects both. First, their greedy tokens in float32 are compared.

Memory traffic bounds the time per token with a cache: all weights except the position table, and on
average half of the cache. The achieved bandwidth is also given as a share of a device copy's.
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._harness import cli, machine
from bench._step import baselines
from fastgpt import GPT, GPTConfig
from fastgpt.devices import autocast, resolve_device, resolve_dtype
from fastgpt.generation import Generator, Sampling
from fastgpt.sampler import round_matrices
from fastgpt.timing import Clock
from fastgpt.training.config import Dtype

_TURN = 16  # tokens


@dataclass
class Options:
    """Tokens per second of generation: nanoGPT's method against fastgpt's."""

    # Transformer blocks.
    n_layer: int = 12
    # Attention heads; must divide n_embd.
    n_head: int = 12
    # Embedding width.
    n_embd: int = 768
    # Rows of the embedding and the head.
    vocab_size: int = 50304
    # Context length in tokens.
    block_size: int = 1024
    # Tokens of the prompt.
    prompt: int = 1
    # Tokens to generate.
    new_tokens: int = 256
    # Sequences per batch.
    batch_size: int = 1
    # cuda, cuda:N, cpu, mps, or auto.
    device: str = "auto"
    # auto: bfloat16 on a GPU that supports it, float16 on an older one, float32 elsewhere.
    dtype: Dtype = "auto"
    # CPU threads.
    threads: int = field(default_factory=torch.get_num_threads)
    # JSON file for the results; it must not exist yet.
    out: Path | None = None


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


def take_turns(
    runs: dict[str, Iterator[Tensor]], device: torch.device, context: AbstractContextManager[object]
) -> dict[str, float]:
    """Run all methods to their ends in turns, and return the seconds of each."""
    seconds, left = dict.fromkeys(runs, 0.0), dict(runs)
    while left:
        for name, steps in list(left.items()):
            clock = Clock(device)
            with context:
                clock.mark()
                count = sum(1 for _ in zip(range(_TURN), steps, strict=False))
                clock.mark()
            seconds[name] += clock.durations_ms()[0] / 1e3
            if count < _TURN:
                del left[name]
    return seconds


def bytes_per_token(model: GPT, options: Options) -> float:
    """Bytes read by one step with a cache: the weights once, and each row's keys and values."""
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
    take_turns(runs(min(4, options.new_tokens)), device, context)  # warm-up
    seconds = take_turns(runs(options.new_tokens), device, context)
    rates = {name: options.batch_size * options.new_tokens / s for name, s in seconds.items()}
    copied = machine.ceilings(device)["copy_tb_per_s"] * 1e12
    moved = bytes_per_token(fast, options) * options.new_tokens / seconds["fastgpt"]
    return {
        "machine": machine.facts(device),
        "options": {**asdict(options), "out": None},
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": fast.get_num_params(),
        "seconds": seconds,
        "tokens_per_s": rates,
        "speedup": rates["fastgpt"] / rates["nanoGPT's method"],
        "gb_per_s": moved / 1e9,
        "share_of_copy": moved / copied,
    }


def lines(record: dict[str, Any]) -> list[str]:
    """The record as text."""
    o = record["options"]
    out = [
        f"{machine.name(record['machine'])}, {record['parameters'] / 1e6:.1f}M parameters, "
        f"{record['dtype']}, {o['batch_size']} x ({o['prompt']} + {o['new_tokens']} tokens)"
    ]
    for name, rate in record["tokens_per_s"].items():
        out.append(f"{name:16} {rate:10.1f} tokens/s {record['seconds'][name]:8.2f} s")
    out.append(
        f"fastgpt over nanoGPT's method: {record['speedup']:.2f}x; it reads "
        f"{record['gb_per_s']:.1f} GB/s, {record['share_of_copy']:.0%} of what a copy moves"
    )
    return out


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 2 for a wrong option or an existing file, 130 after an interrupt."""
    try:
        options = cli.options(Options(), argv)
        if options.out is not None and options.out.exists():
            raise FileExistsError(f"out must not exist yet, but {options.out} does")
        if options.out is not None:
            cli.made_folder(options.out.parent, "out must lie in a folder")
        record = measure(options)
    except cli.USER_ERRORS as error:
        return cli.failed(error)
    except KeyboardInterrupt:
        cli.failed("interrupted")
        return 130
    if options.out is not None:
        cli.write_json(options.out, record)
    print("\n".join(lines(record)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
