"""Reinforcement learning: loss, sampling and rating of answers, runs, rejected input."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.assistant import policy_loss, template
from fastgpt.assistant.policy_loss import PolicyLoss, advantages, kl_estimates, token_logps
from fastgpt.assistant.reward_model import RewardModel
from fastgpt.assistant.rl import ReinforcementLearning, RLConfig
from fastgpt.assistant.scoring import Prompt
from fastgpt.assistant.words import exact, words
from fastgpt.data.batches import padded
from fastgpt.generation import Generator, Sampling
from fastgpt.sampler import Sampler
from fastgpt.tokenizer import CharTokenizer, ChatTokenizer, packed
from fastgpt.training import log
from fastgpt.training.config import SampleConfig
from tests.tools.small_assistants import (
    LETTERS,
    assert_micro_batches_and_seed,
    folder_of,
    questions,
    small_gpt,
    tokenizer,
    written,
)
from tests.tools.small_runs import arguments, assert_same, interrupted, quiet

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]

PROMPTS, ANSWERS = [[1, 2, 3], [4]], [[5, 6], [7, 1, 2, 3]]


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    texts = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    goals = [[-1] * (len(p) - 1) + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    return padded([text[:-1] for text in texts], 0, CPU), padded(goals, -1, CPU)


def plain_logps(model: Any) -> list[list[torch.Tensor]]:
    """Log-probabilities of each answer's tokens, one row at a time, in float64."""
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        text = torch.tensor([prompt + answer])
        logps = model._logits(text, last_only=False)[0].double().log_softmax(dim=-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        found.append([logps[t, token] for t, token in zip(places, answer, strict=True)])
    return found


def test_the_log_probabilities_are_those_of_each_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_loss, "_ROWS", 4)  # two chunks
    model = small_gpt()
    logps = token_logps(model, *inputs())
    expected = torch.stack(sum(plain_logps(model), []))
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.arange(6.0)
    grads = torch.autograd.grad((weights * logps).sum(), list(model.parameters()))
    plain = torch.autograd.grad((weights * expected).sum(), list(model.parameters()))
    torch.testing.assert_close(grads, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_loss_is_the_plainly_written_one(kl_weight: float) -> None:
    model, other = small_gpt(), small_gpt(seed=1)
    of_answers = torch.tensor([1.5, -0.5])
    idx, targets = inputs()
    reference = token_logps(other, idx, targets).detach()
    loss_module = PolicyLoss(model, kl_weight)
    loss = loss_module((idx, of_answers, reference), targets)[1]

    total, kl, number = torch.zeros(()), 0.0, 0
    for weight, ours, theirs in zip(
        of_answers, plain_logps(model), plain_logps(other), strict=True
    ):
        for p, q in zip(ours, theirs, strict=True):
            ratio = (q - p).exp()
            k = ratio - (q - p) - 1
            assert k >= 0
            total = total - (weight * (p - p.detach()).exp() - kl_weight * k)
            kl, number = kl + k.item(), number + 1
    assert number == 6 and loss_module.kl_sum.item() == pytest.approx(kl, rel=1e-4)
    torch.testing.assert_close(loss.double(), total / number, rtol=1e-4, atol=1e-6)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    plain = torch.autograd.grad(total / number, list(model.parameters()))
    torch.testing.assert_close(grads, plain, rtol=1e-3, atol=1e-5)


def test_advantages() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [3.0, 0.0, 0.0, 0.0]])
    third = math.sqrt(3)
    expected = [[1.0, -1.0, -1.0, 1.0], [0.0] * 4, [third, *[-1 / third] * 3]]
    torch.testing.assert_close(advantages(rewards), torch.tensor(expected))
    assert not advantages(torch.full((2, 3), 0.1)).any()


def test_the_estimate_has_the_mean_of_the_divergence() -> None:
    p, q = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.3, 0.5, 0.2])
    expected = (p * (p / q).log()).sum()
    estimates = kl_estimates(p.log(), q.log())
    assert bool((estimates >= 0).all())
    torch.testing.assert_close((p * estimates).sum(), expected)


# -- runs


def config(root: Path, **changes: Any) -> RLConfig:
    root.mkdir(exist_ok=True)
    if not (root / "tuned").exists():
        folder_of(root / "tuned", small_gpt(dropout=0.1))
    keys: dict[str, Any] = {
        "init_from": str(root / "tuned"),
        "dataset": written(root / "prompts.jsonl", questions()),
        "reward": f"{__name__}:share_of_a",
        "out_dir": str(root / "out"),
        "max_iters": 8,
        "batch_size": 4,
        "group_size": 8,
        "max_new_tokens": 6,
        "learning_rate": 1e-2,
        "max_kl": 100.0,
        "eval_interval": 4,
        "device": "cpu",
    }
    return RLConfig(**{**keys, **changes})


def share_of_a(prompt: str, answer: str) -> float:
    assert set(prompt) <= set("abcdefgh")
    return answer.count("a") / max(len(answer), 1)


def test_a_run_learns_and_its_folder_is_a_model(tmp_path: Path) -> None:
    rows = questions()
    rows[9]["messages"].append({"role": "assistant", "content": "aaaaaa"})
    dataset = written(tmp_path / "answered.jsonl", rows)
    run = ReinforcementLearning(config(tmp_path, max_iters=20, dataset=dataset), quiet())
    run.run()
    found = log.read(tmp_path / "out" / "log.jsonl")
    reports = [row for row in found if "reward" in row]
    evaluations = [row for row in found if "val/reward" in row]
    assert reports[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert reports[-1]["reward"] > reports[0]["reward"] + 0.3 and reports[-1]["kl"] > 0.01
    assert evaluations[-1]["val/reward"] > evaluations[0]["val/reward"] + 0.3
    assert {row["val/match"] for row in evaluations} <= {0.0, 1.0}  # one answer per evaluation
    assert all(0 < row["length"] <= 6 and 0 <= row["ended"] <= 1 for row in reports)

    sampler = Sampler(SampleConfig(out_dir=str(tmp_path / "out"), device="cpu", start="a"))
    assert_same(dict(sampler.model.state_dict()), dict(run.model.state_dict()))


def test_micro_batches_and_the_seed(tmp_path: Path) -> None:
    assert_micro_batches_and_seed(
        lambda **changes: ReinforcementLearning(config(tmp_path, **changes), quiet())
    )


@pytest.mark.parametrize("device", DEVICES)
def test_answers_are_those_of_the_present_weights(tmp_path: Path, device: str) -> None:
    """Caches and CUDA graphs are reused across batches while the optimizer changes the weights."""
    run = ReinforcementLearning(config(tmp_path, max_iters=6, device=device), quiet())
    stops = template.stops(tokenizer())
    prompts = [Prompt("", prompt.tokens, None) for prompt in run.train[:3]]
    before = [answer.tokens for answer in run.answers(prompts, run._greedy)]
    for _ in range(5):  # a graph is captured at the fourth call
        run.answers(prompts, run._greedy)
    run.run()
    after = run.answers(prompts, run._greedy)
    assert [answer.tokens for answer in after] != before
    for prompt, answer in zip(prompts, after, strict=True):
        alone = Generator(run.model, Sampling(temperature=0.0), run.autocast)
        tokens = torch.tensor(prompt.tokens, device=run.device)
        expected = [int(step) for step in alone([tokens], 6)]
        end = next((i for i, token in enumerate(expected) if token in stops), len(expected))
        assert answer.tokens == expected[: end + 1]
        assert answer.ended == (end < 6)
        assert answer.text == "".join(LETTERS[i] for i in expected[:end] if i < len(LETTERS))


def test_the_bound_on_the_divergence_ends_a_run(tmp_path: Path) -> None:
    console = quiet()
    run = ReinforcementLearning(config(tmp_path, max_kl=0.01, max_iters=20), console)
    run.run()
    kls = [row["kl"] for row in log.read(tmp_path / "out" / "log.jsonl") if "kl" in row]
    assert kls[-1] > 0.01 and len(kls) < 20
    assert "nats per token exceeds" in console.file.getvalue()  # type: ignore[attr-defined]
    assert (tmp_path / "out" / "ckpt.pt").exists()


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    """A stopped and resumed run ends like an uninterrupted one; its master weights are saved."""
    keys: dict[str, Any] = {"dtype": "bfloat16", "max_iters": 5, "log_interval": 1}
    whole = ReinforcementLearning(config(tmp_path, **keys, out_dir=str(tmp_path / "w")), quiet())
    whole.run()
    stopped = ReinforcementLearning(config(tmp_path, **keys, eval_interval=100), quiet())
    with interrupted(ReinforcementLearning, 2), pytest.raises(KeyboardInterrupt):
        stopped.run()
    saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert saved["iter_num"] == 3
    assert {tensor.dtype for tensor in saved["model"].values()} == {torch.float32}
    ReinforcementLearning(config(tmp_path, **keys, resume=True), quiet()).run()
    expected, found = (
        torch.load(tmp_path / f / "ckpt.pt", weights_only=True) for f in ("w", "out")
    )
    assert_same(expected["model"], found["model"])
    rows = [
        [row["reward"] for row in log.read(tmp_path / name / "log.jsonl") if "reward" in row]
        for name in ("w", "out")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 5


def test_the_reward_of_the_words() -> None:
    """It distinguishes the two answers of every generated pair, in first and second turns."""
    pairs = words(lines=1, train=1, heldout=1, pairs=60).pairs
    assert {len(pair["messages"]) for pair in pairs} == {1, 3}
    for pair in pairs:
        prompt = "\n".join(message["content"] for message in pair["messages"])
        assert (exact(prompt, pair["chosen"]), exact(prompt, pair["rejected"])) == (1.0, 0.0)
    with pytest.raises(ValueError, match="is not a question about a word"):
        exact("Hello?", "Hello.")


# -- rejected input


def raising(prompt: str, answer: str) -> float:
    raise KeyError("two\nlines")


def no_number(prompt: str, answer: str) -> Any:
    return [1.0]


def infinite(prompt: str, answer: str) -> float:
    return math.inf


HERE = f"reward='{__name__}"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reward": f"{__name__}:raising"}, "failed: KeyError: 'two\\nlines'"),
        ({"reward": f"{__name__}:no_number"}, "must return a finite number, got [1.0]"),
        ({"reward": f"{__name__}:infinite"}, "must return a finite number, got inf"),
        ({"reward": f"{__name__}:nothing"}, "has no function 'nothing'"),
        ({"reward": "no_such_module:f"}, "cannot be imported: ModuleNotFoundError"),
        ({"reward": "nowhere"}, "reward must be the folder of a run, but there is no nowhere"),
        ({"reward": "TUNED"}, "holds a language model"),
        ({"init_from": "nowhere"}, "init_from must be the folder of a run"),
        ({"init_from": "BASE"}, "init_from must be the folder of a model trained on dialogues"),
        ({"dataset": "nowhere.jsonl"}, "dataset must be a JSONL file, but there is no file"),
        ({"val_dataset": "nowhere.jsonl"}, "val_dataset must be a JSONL file"),
        ({"resume": True}, "there is no checkpoint"),
        ({"max_new_tokens": 14}, "line 1 of the input"),
        ({"group_size": 1}, "group_size must be at least 2, got 1"),
        ({"max_iters": 0}, "max_iters must be at least 1, got 0"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str, refused: Callable[..., str]
) -> None:
    places = {"TUNED": tmp_path / "tuned", "BASE": tmp_path / "base"}
    folder_of(tmp_path / "tuned", small_gpt())
    folder_of(tmp_path / "base", small_gpt(), own={"characters": "abcdefghijklmnop"})
    keys = {
        "init_from": places["TUNED"],
        "dataset": written(tmp_path / "prompts.jsonl", questions()),
        "reward": f"{__name__}:share_of_a",
        "out_dir": tmp_path / "out",
        "device": "cpu",
        "max_iters": 1,
        "max_new_tokens": 4,
        **{key: places.get(value, value) for key, value in changes.items()},
    }
    assert message in refused("rl", *arguments(keys))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages[0].role must be"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages[0].content: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    dataset = written(tmp_path / "bad.jsonl", [*questions(), row])
    with pytest.raises(ValueError, match="line 21 of the input ") as raised:
        ReinforcementLearning(config(tmp_path, dataset=dataset), quiet())
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "letters, block_size, message",
    [
        ("abcdefghi", 16, "was trained on other tokens"),
        (LETTERS, 8, "reads at most 8 tokens, but a prompt and its answer may have 13"),
    ],
)
def test_a_reward_model_that_does_not_fit_is_refused(
    tmp_path: Path, letters: str, block_size: int, message: str
) -> None:
    own = packed(ChatTokenizer(CharTokenizer(dict(enumerate(letters)))))
    model = RewardModel(small_gpt(block_size=block_size).config)
    reward = folder_of(tmp_path / "reward", model, own=own)
    with pytest.raises(ValueError, match=message):
        ReinforcementLearning(config(tmp_path, reward=reward), quiet())
