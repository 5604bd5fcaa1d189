"""The reward model: loss, training runs, run folder, rejected input."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.assistant.reward import RewardConfig, RewardTraining
from fastgpt.assistant.reward_model import PairLoss, RewardModel
from fastgpt.assistant.scoring import Answer, Prompt, scorer
from fastgpt.data.batches import padded
from fastgpt.training import log
from fastgpt.training.checkpoint import REWARD_HEAD
from tests.tools.small_assistants import (
    LETTERS,
    assert_micro_batches_and_seed,
    folder_of,
    questions,
    small_gpt,
    tokenizer,
    written,
)
from tests.tools.small_runs import quiet

CPU = torch.device("cpu")


def small_model(**changes: Any) -> RewardModel:
    gpt = small_gpt(**changes)
    model = RewardModel(gpt.config)
    model.load_state_dict(gpt.state_dict(), strict=False)
    torch.nn.init.normal_(model.reward_head.weight)
    return model


def test_the_loss_of_padded_rows_is_that_of_each_alone() -> None:
    model = small_model()
    chosen, rejected = [[1, 2, 3], [4]], [[3, 2], [5, 6, 7, 1, 2]]
    expected = []
    for good, bad in zip(chosen, rejected, strict=True):
        rewards = [
            model.reward_head(model._hidden(torch.tensor([text]))[0, -1]).item()
            for text in (good, bad)
        ]
        expected.append(rewards[0] - rewards[1])
    texts = chosen + rejected
    last = torch.tensor([len(text) - 1 for text in texts])
    for filler in (0, 7):
        margins, loss = PairLoss(model)((padded(texts, filler, CPU), last), torch.zeros(2))
        torch.testing.assert_close(margins, torch.tensor(expected))
        plain = -sum(math.log(1 / (1 + math.exp(-margin))) for margin in expected) / 2
        assert loss.item() == pytest.approx(plain, rel=1e-5)


def config(root: Path, **changes: Any) -> RewardConfig:
    """A run on pairs whose rejected answers end in "h"."""
    root.mkdir(exist_ok=True)
    if not (root / "tuned").exists():
        folder_of(root / "tuned", small_gpt(dropout=0.1))
    rows = [
        {**question, "chosen": LETTERS[i % 7], "rejected": LETTERS[i % 5] + "h"}
        for i, question in enumerate(questions())
    ]
    keys: dict[str, Any] = {
        "init_from": str(root / "tuned"),
        "dataset": written(root / "pairs.jsonl", rows),
        "out_dir": str(root / "out"),
        "max_iters": 30,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "eval_interval": 10,
        "device": "cpu",
    }
    return RewardConfig(**{**keys, **changes})


def test_a_run_learns_and_its_folder_rates_answers(tmp_path: Path) -> None:
    run = RewardTraining(config(tmp_path), quiet())
    assert (len(run.train), len(run.val)) == (18, 2)
    assert run.evaluate() == {"pair_loss": pytest.approx(math.log(2)), "accuracy": 0, "margin": 0}
    run.run()
    assert run.evaluate()["accuracy"] == 1.0 and run.evaluate()["margin"] > 1.0
    rows = log.read(tmp_path / "out" / "log.jsonl")
    assert [row["iter"] for row in rows if "val/accuracy" in row] == [0, 10, 20, 30]
    assert all("pair_loss" in row for row in rows if "lr" in row)

    score = scorer(str(tmp_path / "out"), tokenizer(), 16, CPU, run.autocast)
    pair = run.val[0]
    prompt = Prompt("", pair.prompt, None)
    answers = [Answer(text[len(pair.prompt) :], "", True) for text in (pair.chosen, pair.rejected)]
    good, bad = score([prompt, prompt], answers).tolist()
    assert good - bad == pytest.approx(run.loss(*run._batch([pair]))[0].item(), rel=1e-4)


def test_micro_batches_and_the_seed(tmp_path: Path) -> None:
    def run_of(**changes: Any) -> RewardTraining:
        run = RewardTraining(config(tmp_path, **changes), quiet())
        torch.nn.init.ones_(run.model.get_parameter(REWARD_HEAD))
        return run

    assert_micro_batches_and_seed(run_of)


GOOD: dict[str, Any] = {
    "messages": [{"role": "user", "content": "ab"}],
    "chosen": "a",
    "rejected": "b",
}


@pytest.mark.parametrize(
    "row, message",
    [
        ("[", "pairs.jsonl is not JSON"),
        ({**GOOD, "chosen": 3}, "chosen must be a text, not empty, got 3"),
        ({k: v for k, v in GOOD.items() if k != "rejected"}, "rejected must be a text"),
        ({**GOOD, "rejected": "a"}, "rejected must differ from chosen, got 'a' twice"),
        ({**GOOD, "chosen": "a" * 12}, "chosen must end within the model's block_size of 16"),
        ({**GOOD, "messages": GOOD["messages"] * 2}, "messages[1].role must be 'assistant'"),
        ({**GOOD, "chosen": "x"}, "chosen: "),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, row: Any, message: str, refused: Callable[..., str]
) -> None:
    lines = [json.dumps(GOOD), row if isinstance(row, str) else json.dumps(row)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    tuned = folder_of(tmp_path / "tuned", small_gpt())
    given = [f"--init_from={tuned}", f"--dataset={tmp_path / 'pairs.jsonl'}", "--device=cpu"]
    error = refused("reward", *given)
    assert error.startswith(f"error: line 2 of the input {tmp_path}") and message in error


def test_a_reward_model_is_no_language_model(tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = folder_of(tmp_path / "my reward", small_model())
    said = f"{folder}/ckpt.pt is a reward model: fastgpt rl --reward '{folder}' uses it"
    assert refused("sample", f"--out_dir={folder}", "--device=cpu") == f"error: {said}"
