"""A chat GPT and its data, small enough that a run of any stage takes a second."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastgpt import GPT, GPTConfig
from fastgpt.tokenizer import CharTokenizer, ChatTokenizer, packed
from fastgpt.training import checkpoint as ckpt

LETTERS = "abcdefgh"


def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(CharTokenizer(dict(enumerate(LETTERS))))


def small_gpt(seed: int = 0, **changes: Any) -> GPT:
    """A GPT with larger weights than a new one, so that answers differ."""
    torch.manual_seed(seed)
    sizes = dict(block_size=16, vocab_size=16, n_layer=1, n_head=2)  # includes three padding ids
    model = GPT(GPTConfig(**{**sizes, "n_embd": 16, **changes}))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    return model


def folder_of(path: Path, model: GPT, own: dict[str, Any] | None = None) -> str:
    """Write a run's folder with this model; ``own`` replaces the tokenizer's entries."""
    path.mkdir()
    kind = {**ckpt.kind_and_gelu(model), **(packed(tokenizer()) if own is None else own)}
    saved = {"model": model.state_dict(), "model_args": asdict(model.config), "fastgpt": kind}
    ckpt.save({**saved, "iter_num": 1, "config": {}}, path / ckpt.BEST)
    return str(path)


def questions(count: int = 20) -> list[dict[str, Any]]:
    """Dialogues of one question each, all different, of one to three letters."""
    texts = [LETTERS[i % 8] * (1 + i // 8) for i in range(count)]
    return [{"messages": [{"role": "user", "content": text}]} for text in texts]


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def first_gradient(run: Any) -> torch.Tensor:
    """Execute a run; return the first update's gradient of all parameters."""
    found = []

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        found.append(torch.cat([grad.detach().flatten() for grad in grads if grad is not None]))

    run.optimizer.register_step_pre_hook(record)
    run.run()
    assert found[0].any()
    return found[0]


def assert_micro_batches_and_seed(run_of: Callable[..., Any]) -> None:
    """A batch of eight and eight micro-batches of one give the same gradient. Runs are repeatable;
    another seed gives another gradient."""
    runs, gradients = [], []
    for changes in (
        {"batch_size": 8},
        {"batch_size": 8},
        {"batch_size": 1, "gradient_accumulation_steps": 8},
        {"batch_size": 8, "seed": 1},
    ):
        runs.append(run_of(max_iters=2, **changes))
        gradients.append(first_gradient(runs[-1]))
    first, second, *_ = (run.model.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(gradients[0], gradients[3], rtol=1e-4, atol=1e-6)
