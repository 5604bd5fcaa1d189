"""A reward model: a GPT with a scalar head on the hidden state of the last token.

It is trained on pairs of answers to the same prompt (Bradley & Terry 1952; Ouyang et al. 2022,
arXiv:2203.02155). With the rewards r of the two,

    loss = -log(sigmoid(r_chosen - r_rejected)),  the mean over pairs
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.data.batches import padded
from fastgpt.language_model import GPTConfig
from fastgpt.model import GPT


class RewardModel(GPT):
    """``GPT`` with a scalar head, without bias, on the final LayerNorm. All rewards start at 0.

    In shape comments B is the batch size, T the sequence length.
    """

    def __init__(self, config: GPTConfig, gelu: str = "none") -> None:
        super().__init__(config, gelu=gelu)
        self.reward_head = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.zeros_(self.reward_head.weight)

    def low_precision_parameters(self) -> list[nn.Parameter]:
        return [p for p in super().low_precision_parameters() if p is not self.reward_head.weight]

    def rewards(self, idx: Tensor, last: Tensor) -> Tensor:
        """Token ids (B, T), where row b ends at ``last[b]`` (see ``rows``) → rewards (B,), at least
        float32.
        """
        x = self._hidden(idx)[torch.arange(len(idx), device=idx.device), last]  # (B, C)
        weight = self.reward_head.weight
        # Not a matmul, which autocast would round: the loss subtracts rewards.
        return (x.to(weight.dtype) * weight).sum(dim=-1)


def rows(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Arguments of ``RewardModel.rewards``: padded ids (B, T), and the end of each text (B,)."""
    last = torch.tensor([len(text) - 1 for text in texts], device=device)
    return padded(texts, 0, device), last


def pair_loss(margins: Tensor) -> Tensor:
    """Margins r_chosen - r_rejected (B,) → the mean loss."""
    return F.softplus(-margins).mean()


class PairLoss(nn.Module):
    """The loss of a micro-batch of pairs, as ``training.step.Step`` calls it."""

    def __init__(self, model: RewardModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: tuple[Tensor, Tensor], pairs: Tensor) -> tuple[Tensor, Tensor]:
        """``x``: the arguments of ``RewardModel.rewards``, with the B chosen texts before the
        rejected ones. ``pairs`` (B,): any values but -1, which would not be counted.

        Returns the margins (B,) and the mean loss.
        """
        chosen, rejected = self.model.rewards(*x).chunk(2)
        return chosen - rejected, pair_loss(chosen - rejected)
