"""``fastgpt ladder``: models of its rungs, output, files, rejected input."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import GPTConfig, ladder
from fastgpt.__main__ import main
from fastgpt.cli import ladder as command
from fastgpt.data.batches import Batches
from fastgpt.kernels import fused, reference
from fastgpt.training.trainer import Trainer
from tests.tools.small_models import V, small_config, tokens
from tests.tools.small_runs import TEXT, data_set, quiet
from tests.tools.small_runs import small_config as run_config

SMALL = dict(eval_iters=2, batch_size=4, n_layer=1, n_embd=8, n_head=2, max_iters=4)
ARGUMENTS = ["ladder", "--input=text.txt", "--device=cpu", "--max_iters=4"]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set small sizes for all rungs except the last; write a text into the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ladder, "_KEYS", ladder._KEYS | SMALL)
    Path("text.txt").write_text(TEXT)


def test_the_average_of_the_past():
    x = torch.randn(2, 5, 3)
    expected = x.cumsum(dim=1) / torch.arange(1, 6)[:, None]
    torch.testing.assert_close(ladder.Average()(x), expected)


def test_one_head_is_heads_of_one():
    config, x = small_config(n_head=1), torch.randn(2, 5, 32)
    head, heads = ladder.Head(config), ladder.Heads(config)
    weights = [layer.weight for layer in (head.query, head.key, head.value)]
    heads.c_attn.weight = torch.nn.Parameter(torch.cat(weights))
    torch.testing.assert_close(head(x), heads(x))


@pytest.mark.parametrize("rung", list(ladder.RUNGS)[1:-1])
def test_a_rung_on_the_kernels(rung, device, monkeypatch):
    """Loss and gradients equal those on the plain ops; no logit depends on a later token."""
    config = GPTConfig(8, V, n_layer=1, n_head=4, n_embd=32, bias=False)
    x, y = tokens(2, 8).to(device), tokens(2, 8, seed=2).to(device)
    found = []
    for used in (fused, reference):
        monkeypatch.setattr(ladder, "ops", used)
        torch.manual_seed(0)
        model = ladder.RUNGS[rung](config).to(device)
        loss = model(x, y)[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    changed = x.clone()
    changed[:, 5:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(x, y)[0][:, :5], model(changed, y)[0][:, :5])


def test_rungs_train_on_the_same_batches(small, tmp_path, monkeypatch):
    drawn: list[torch.Tensor] = []
    draw = Batches.next

    def record(*args: Any) -> Any:
        drawn.append((batch := draw(*args))[0])
        return batch

    monkeypatch.setattr(Batches, "next", record)
    data_dir = data_set(tmp_path)
    found = list(ladder.climb(["bigram", "head"], data_dir, tmp_path, quiet(), device="cpu"))
    assert [(r.rung, len(r.sample)) for r in found] == [("bigram", 60), ("head", 60)]
    assert len(drawn) == 10 and torch.equal(torch.stack(drawn[:5]), torch.stack(drawn[5:]))


def test_the_command(small, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra log")
    assert main([*ARGUMENTS, "--json"]) == 0
    out = capsys.readouterr()
    found = [json.loads(line) for line in out.out.splitlines()]
    assert [row["rung"] for row in found] == [*ladder.RUNGS][:-1]  # the last one needs a GPU
    parameters = [row["parameters"] for row in found]
    assert parameters == sorted(parameters) and parameters[2] == parameters[3]
    assert all(row["val_loss"] > 0 and row["tokens_per_second"] > 0 for row in found)
    assert "step 5: train loss" in out.err and Path("ladder.png").stat().st_size > 10_000
    assert main([*ARGUMENTS, "--rungs", "head", "--output=a/b.png"]) == 0
    table = capsys.readouterr().out
    head = found[2]
    assert f"{head['parameters']:,}" in table and f"{head['val_loss']:.3f}" in table
    assert Path("a/b.png").is_file()

    def missing(*names: str) -> None:
        raise ImportError("matplotlib is missing")

    monkeypatch.setattr(command, "optional", missing)
    assert main([*ARGUMENTS, "--rungs", "bigram", "bigram", "--output=c.png"]) == 0
    err = capsys.readouterr().err
    assert "no picture: matplotlib is missing" in err
    assert err.count("bigram: ") == 1 and "loaded model" not in err and "earlier run" not in err


def test_ctrl_c_keeps_what_is_finished(small, capsys, monkeypatch):
    update = Trainer._update

    def interrupted(self: Trainer, learning_rate: float) -> Any:
        if self.config.out_dir.endswith("head"):
            signal.raise_signal(signal.SIGINT)
        return update(self, learning_rate)

    monkeypatch.setattr(Trainer, "_update", interrupted)
    assert main([*ARGUMENTS, "--rungs", "bigram", "head", "heads"]) == 130
    out, err = capsys.readouterr()
    assert "  bigram  " in out and "  head  " not in out
    assert err.endswith("interrupted\n") and "init_from=resume" not in err
    assert Path("ladder.png").is_file()


def test_what_is_refused(small, refused):
    Path("short.txt").write_text("abc\n" * 50)
    Path("folder.png").mkdir()
    for arguments, message in (
        (["--rungs", "bigram", "hed"], "rungs must be among bigram, average, .*got 'hed'"),
        (["--input=absent"], "the input absent does not exist"),
        (["--output=a.svg"], "output must end in .png, got a.svg"),
        (["--output=folder.png"], "output must be a file, but folder.png is a folder"),
        (["--input=short.txt", "--rungs", "bigram", "scaled"], "more than 256 .* got 180 in train"),
    ):
        assert re.search(message, line := refused(*ARGUMENTS, *arguments)), line


def test_a_model_of_your_own_has_no_checkpoints(tmp_path):
    data_set(tmp_path)
    trainer = Trainer(run_config(tmp_path), quiet(), build=ladder.RUNGS["head"])
    trainer.run()
    assert isinstance(trainer.model, ladder.Stack) and not list((tmp_path / "out").glob("*.pt"))
    with pytest.raises(ValueError, match="init_from must be scratch with a custom model"):
        Trainer(run_config(tmp_path, init_from="resume"), quiet(), build=ladder.RUNGS["head"])
