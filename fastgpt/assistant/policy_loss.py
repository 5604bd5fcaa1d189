"""The loss of group-relative policy optimization (GRPO, Shao et al. 2024, arXiv:2402.03300).

For each prompt a group of answers is sampled from the policy p. With the reward r_i of answer i:

    A_i  = (r_i - mean of its group's r) / (their standard deviation)
    k_it = q / p - log(q / p) - 1          for token t of answer i, q the reference's probability
    loss = -(1 / N) * sum over i, t of (A_i * p / stop_gradient(p) - kl_weight * k_it)

N is the number of tokens in all answers of the step, so that tokens have the same weight in short
and long answers (Yu et al. 2025, arXiv:2503.14476). Each answer is used for one update, so there is
no clipped ratio to an older policy. k is never negative, and its mean over tokens sampled from p is
the divergence KL(p || q) (Schulman 2020, "Approximating KL divergence").

In shape comments B is the batch size, T the sequence length, N the batch's answer tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt.model import GPT

# Logits are computed for this many tokens at a time, and recomputed in the backward pass.
_ROWS = 2048


def token_logps(model: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (N,), at least float32, of the targets that are not -1, row by row.

    ``idx`` and ``targets`` (B, T) are token ids; a target is the token that follows that of
    ``idx``. Rows are padded on the right with any ids and targets of -1.
    """
    answers = targets != -1
    x = model._hidden(idx)[answers]  # (N, C)
    parts = zip(x.split(_ROWS), targets[answers].split(_ROWS), strict=True)
    return torch.cat(
        [checkpoint(_logps, model.lm_head, *part, use_reentrant=False) for part in parts]
    )


def _logps(lm_head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    logits = lm_head(x)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, reduction="none")


def advantages(rewards: Tensor) -> Tensor:
    """Rewards (prompts, answers per prompt) → advantages; 0 in a group of equal rewards."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return (centred / rewards.std(dim=1, correction=0, keepdim=True)).masked_fill(equal, 0.0)


def kl_estimates(logps: Tensor, reference: Tensor) -> Tensor:
    """k of each token (N,), from its log-probabilities under policy and reference."""
    log_ratio = reference - logps
    return log_ratio.exp() - log_ratio - 1.0


class PolicyLoss(nn.Module):
    """The loss of a micro-batch, as ``training.step.Step`` calls it.

    ``kl_sum`` accumulates k over the tokens of all calls, until the caller resets it to 0.
    """

    def __init__(self, policy: GPT, kl_weight: float) -> None:
        super().__init__()
        self.policy = policy
        self._kl_weight = kl_weight
        self.kl_sum = torch.zeros((), device=next(policy.parameters()).device)

    def forward(self, x: tuple[Tensor, Tensor, Tensor], targets: Tensor) -> tuple[None, Tensor]:
        """``x``: the token ids (B, T), the advantages (B,), and the reference's log-probabilities
        (N,) of ``targets`` from ``token_logps``. Returns None and the mean loss.
        """
        idx, of_answers, reference = x
        logps = token_logps(self.policy, idx, targets)
        kl = kl_estimates(logps, reference)
        self.kl_sum += kl.detach().sum()
        weights = of_answers[:, None].expand_as(targets)[targets != -1]
        gain = weights * (logps - logps.detach()).exp()
        return None, (self._kl_weight * kl - gain).mean()
