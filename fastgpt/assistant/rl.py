"""``fastgpt rl``: reinforcement learning of an assistant with ``policy_loss``.

Each step samples ``group_size`` answers per prompt, all in one batch, scores them, and makes one
update. The reference policy is the fine-tuned model that the run starts from.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastgpt._progress import AnyConsole
from fastgpt.assistant import template
from fastgpt.assistant.policy_loss import PolicyLoss, advantages, token_logps
from fastgpt.assistant.scoring import Answer, Prompt, scorer
from fastgpt.assistant.stage import Stage, StageConfig, held_out, loaded_gpt
from fastgpt.data.batches import padded
from fastgpt.generation import Generator, Sampling, check_finite
from fastgpt.tokenizer import ChatTokenizer
from fastgpt.training.run import Figures

# Tokens between two checks whether all answers have ended, which synchronize a GPU.
_CHECK_EVERY = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True, kw_only=True)
class RLConfig(StageConfig):
    """Reinforcement learning: make answers with higher rewards likelier."""

    # The reward: the folder of a reward model, or module:function, which is called with the text of
    # a prompt, one message per line, and of an answer, and returns a number.
    reward: str
    # JSONL file of dialogues: {"messages": [...]}. A final answer is not part of the prompt; the
    # evaluation counts how often answers to held-out prompts equal it.
    dataset: str
    # Folder for ckpt.pt and log.jsonl.
    out_dir: str = "out-rl"
    # Prompts per micro-batch.
    batch_size: int = 8
    # Answers sampled per prompt.
    group_size: int = 8
    # Maximum number of tokens in an answer.
    max_new_tokens: int = 64
    # Weight of the KL divergence from the fine-tuned model.
    kl_weight: float = 0.05
    # End the run if the KL divergence per token, in nats, exceeds this.
    max_kl: float = 0.5
    # Maximum number of held-out prompts to answer in an evaluation.
    eval_prompts: int = 200


def read_prompt(
    tokenizer: ChatTokenizer, block_size: int, max_new_tokens: int, row: dict[str, Any]
) -> Prompt:
    """The prompt in a row of the data set. Raises ValueError naming the field."""
    template.check(row.get("messages"))
    messages, answer = row["messages"], None
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        answer = last["content"]
    tokens = tuple(template.prompt(tokenizer, messages))
    if len(tokens) + max_new_tokens > block_size:
        raise ValueError(
            f"messages must leave room for max_new_tokens={max_new_tokens} in the model's "
            f"block_size of {block_size} tokens, got {len(tokens)} tokens"
        )
    return Prompt("\n".join(message["content"] for message in messages), tokens, answer)


class ReinforcementLearning(Stage):
    """A run of ``fastgpt rl``. Raises the errors of the config, the data, the models and the
    reward: ValueError, ImportError, FileNotFoundError, NotADirectoryError.
    """

    config: RLConfig

    def __init__(self, config: RLConfig, console: AnyConsole) -> None:
        policy, tokenizer = loaded_gpt(config.init_from)
        read = partial(read_prompt, tokenizer, policy.config.block_size, config.max_new_tokens)
        train, val = held_out(config, read, lambda prompt: prompt.tokens)
        self.val = val[: config.eval_prompts]
        longest = max(len(prompt.tokens) for prompt in train + self.val)
        self._capacity = longest + config.max_new_tokens
        reference = deepcopy(policy).requires_grad_(False).eval()
        loss = partial(PolicyLoss, kl_weight=config.kl_weight)
        super().__init__(config, policy, loss, tokenizer, train, console)
        self._reference = reference.to(self.device)
        self._score = scorer(config.reward, tokenizer, self._capacity, self.device, self.autocast)
        # On a GPU both capture CUDA graphs, for which the weights must keep their addresses.
        self._sampler = Generator(policy, Sampling(), self.autocast)
        self._greedy = Generator(policy, Sampling(temperature=0.0), self.autocast)
        console.print(f"{len(self.train):,} prompts; {len(self.val):,} held-out ones are evaluated")

    def _stop(self, figures: Mapping[str, Any]) -> str | None:
        kl, bound = figures["kl"], self.config.max_kl
        if kl <= bound:
            return None
        return f"the KL divergence of {kl:.4g} nats per token exceeds max_kl={bound}"

    def answers(self, prompts: Sequence[Prompt], generator: Generator) -> list[Answer]:
        """An answer to each prompt, generated in one batch."""
        device = self.device
        stops = template.stops(self._tokenizer)
        inputs = [torch.tensor(prompt.tokens, device=device) for prompt in prompts]
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        drawn = []
        # The same capacity for all batches, so that cache and graph are reused.
        room = self._capacity - max(len(row) for row in inputs)
        for tokens in generator(inputs, room):
            drawn.append(tokens)
            ended |= (tokens >= stops.start) & (tokens < stops.stop)
            check = len(drawn) % _CHECK_EVERY.get(device.type, 1) == 0
            if len(drawn) == self.config.max_new_tokens or (check and bool(ended.all())):
                break
        found = []
        for row in torch.stack(drawn, dim=1).tolist():
            end = next((i for i, token in enumerate(row) if token in stops), len(row))
            check_finite(row[: end + 1])
            # A vocabulary padded for speed has ids without a text.
            ids = [token for token in row[:end] if token < stops.stop]
            found.append(Answer(row[: end + 1], self._tokenizer.decode(ids), end < len(row)))
        return found

    def _update(self, learning_rate: float) -> tuple[Figures, int]:
        config, device = self.config, self.device
        prompts = [prompt for prompt in self._next_rows() for _ in range(config.group_size)]
        answers = self.answers(prompts, self._sampler)
        rewards = self._score(prompts, answers)
        of_answers = advantages(rewards.view(-1, config.group_size)).flatten()
        batches = []
        for start in range(0, len(prompts), config.batch_size * config.group_size):
            part = slice(start, start + config.batch_size * config.group_size)
            rows = list(zip(prompts[part], answers[part], strict=True))
            texts = [[*prompt.tokens, *answer.tokens][:-1] for prompt, answer in rows]
            goals = [[-1] * (len(prompt.tokens) - 1) + answer.tokens for prompt, answer in rows]
            idx, targets = padded(texts, 0, device), padded(goals, -1, device)
            with torch.no_grad(), self.autocast:
                reference = token_logps(self._reference, idx, targets)
            batches.append(((idx, of_answers[part], reference), targets))
        self.loss.kl_sum.zero_()
        self._updated(batches, learning_rate)
        n_tokens = sum(len(answer.tokens) for answer in answers)
        figures = {
            "reward": rewards.mean().item(),
            "kl": self.loss.kl_sum.item() / n_tokens,
            "length": n_tokens / len(answers),
            "ended": sum(answer.ended for answer in answers) / len(answers),
        }
        return figures, n_tokens + sum(len(prompt.tokens) for prompt in prompts)

    def evaluate(self) -> Figures:
        """Greedy answers to the held-out prompts: mean reward, mean length and, if the data set has
        answers, the share of those that are equal.
        """
        size = self.config.batch_size * self.config.group_size
        answers: list[Answer] = []
        rewards = []
        for start in range(0, len(self.val), size):
            part = self.val[start : start + size]
            answers += (new := self.answers(part, self._greedy))
            rewards.append(self._score(part, new))
        all_rewards = torch.cat(rewards)
        figures = {
            "reward": all_rewards.mean().item(),
            "length": sum(len(answer.tokens) for answer in answers) / len(answers),
        }
        known = [(p.answer, a) for p, a in zip(self.val, answers, strict=True) if p.answer]
        if known:
            figures["match"] = sum(text == a.text and a.ended for text, a in known) / len(known)
        self.console.print(
            f"{self.val[0].text!r} → {answers[0].text!r} (reward {all_rewards[0].item():.4g})"
        )
        return figures
