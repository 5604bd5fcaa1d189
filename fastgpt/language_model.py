"""``GPTConfig`` and the base class of all language models: loss, sampling, optimizer, loading.

In shape comments B is the batch size, T the sequence length, V ``vocab_size``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.generation import Generator, Sampling, check_finite


@dataclass
class GPTConfig:
    """The shape of a model. Has exactly nanoGPT's seven fields, which checkpoints contain.

    Raises TypeError or ValueError naming the field, the value and what is allowed.
    """

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the Linear and LayerNorm layers

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise TypeError(f"{name} must be an int of at least 1, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head, got n_embd={self.n_embd} "
                f"and n_head={self.n_head}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


class Trainable(nn.Module):
    """Base class of all models: the methods that an optimizer needs."""

    def low_precision_parameters(self) -> list[nn.Parameter]:
        """The parameters that autocast casts to half precision before each use. They may be stored
        in half precision if the optimizer keeps a float32 copy.
        """
        return [p for p in self.parameters() if p.dim() >= 2]

    def configure_optimizers(
        self,
        weight_decay: float,
        learning_rate: float,
        betas: tuple[float, float],
        device_type: str,
    ) -> torch.optim.AdamW:
        """AdamW (Loshchilov & Hutter 2019), eps 1e-8, fused on CUDA and on the CPU.

        Group 0 holds the matrices, with weight decay; group 1 the vectors, without. Both keep the
        order of ``named_parameters()``, which indexes a saved optimizer state.
        """
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        # None lets PyTorch choose on other devices. Unlike nanoGPT, also use the fused form on the
        # CPU: one pass, without temporaries.
        fused = True if torch.device(device_type).type in ("cuda", "cpu") else None
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)


class LanguageModel(Trainable):
    """Base class of language models: loss, sampling, optimizer, loading. A subclass adds its
    parameters and ``_logits``.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config

    def _logits(self, idx: Tensor, last_only: bool) -> Tensor:
        """Token ids (B, T) → logits (B, T, V), or (B, 1, V) of the last position only."""
        raise NotImplementedError

    def _loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy. A subclass may compute it without storing the logits."""
        return _cross_entropy(self._logits(idx, last_only=False), targets)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """The number of parameters, by default without a position embedding, if there is one.
        A tied weight counts once.
        """
        return sum(p.numel() for p in self.parameters())

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, return_logits: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predict the next token.

        ``idx`` and ``targets`` are (B, T) token ids, int64 or int32, 1 <= T <= block_size.
        Returns ``(logits, loss)``:

        - without targets: logits (B, 1, V) of the last position, and None;
        - with targets: logits (B, T, V) and the mean cross-entropy in nats, a float32 scalar
          (float64 for a float64 model). Targets of -1 are ignored; if all are, the loss is NaN.
        - while training (``self.training``, gradients enabled, targets given) logits is None,
          unless ``return_logits``: the fused loss never builds them. Code with a loss of its own
          passes ``return_logits=True``.

        Raises TypeError or ValueError on a wrong dtype, shape or device, and AssertionError, like
        nanoGPT, if T exceeds block_size. Ids are not checked against the vocabulary, because on a
        GPU this would synchronize the host in every step.
        """
        self._check_tokens("idx", idx)
        t = idx.shape[1]
        if t > self.config.block_size:
            raise AssertionError(
                f"Cannot forward sequence of length {t}, block size is only "
                f"{self.config.block_size}"
            )
        if targets is None:
            return self._logits(idx, last_only=True), None
        self._check_tokens("targets", targets)
        if targets.shape != idx.shape:
            raise ValueError(
                f"targets must have the shape of idx {tuple(idx.shape)}, got {tuple(targets.shape)}"
            )
        if self.training and torch.is_grad_enabled() and not return_logits:
            return None, self._loss(idx, targets)
        logits = self._logits(idx, last_only=False)
        return logits, _cross_entropy(logits, targets)

    def _check_tokens(self, name: str, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tokens).__name__}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be torch.int64 or torch.int32, got {tokens.dtype}")
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"{name} must have shape (B, T) with T of at least 1, got {tuple(tokens.shape)}"
            )
        device = next(self.parameters()).device
        if tokens.device != device:
            raise ValueError(
                f"{name} must be on the model's device ({device}), got {tokens.device}"
            )

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Tensor:
        """Append ``max_new_tokens`` sampled tokens to the prompts ``idx`` (B, T), T >= 1.

        Each token is drawn from the softmax of logits / ``temperature`` (0: the likeliest token),
        among the ``top_k`` likeliest if given. The model sees the last ``block_size`` tokens. Up to
        that length each token is one step with a KV cache; beyond it, each is a forward pass over
        the whole window. Sampling uses PyTorch's generator. Dropout stays on, and disables the
        cache, unless ``eval()`` was called.

        Returns (B, T + max_new_tokens). Raises ValueError or TypeError naming the argument, and
        FloatingPointError if logits are NaN or infinite.
        """
        self._check_tokens("idx", idx)
        self._check_ids("idx", idx)
        _check_max_new_tokens(max_new_tokens)
        generator = Generator(self, Sampling(temperature=temperature, top_k=top_k))
        if not max_new_tokens:
            return idx
        if not len(idx):
            return idx.new_zeros(0, idx.shape[1] + max_new_tokens, dtype=torch.int64)
        new = torch.stack(list(generator(list(idx), max_new_tokens)), dim=1)
        check_finite([int(new.min())])
        return torch.cat((idx, new), dim=1)

    def stream(
        self, prompts: Sequence[Tensor], max_new_tokens: int, sampling: Sampling | None = None
    ) -> Iterator[list[int]]:
        """Continue several prompts as one batch, token by token.

        ``prompts`` are token ids (T,), int64 or int32, each with its own T >= 1. Yields the next
        token of each prompt, ``max_new_tokens`` times; to stop earlier, stop iterating. By default
        tokens are drawn from the whole softmax. For window and dropout see ``generate``.

        Raises ValueError or TypeError naming the argument immediately, and FloatingPointError
        during iteration if logits are NaN or infinite.
        """
        _check_max_new_tokens(max_new_tokens)
        if not len(prompts):
            raise ValueError("prompts must hold at least one prompt, got none")
        for number, prompt in enumerate(prompts):
            name = f"prompts[{number}]"
            if isinstance(prompt, Tensor) and prompt.dim() != 1:
                raise ValueError(f"{name} must have shape (T,), got {tuple(prompt.shape)}")
            self._check_tokens(name, prompt[None] if isinstance(prompt, Tensor) else prompt)
            self._check_ids(name, prompt)
        return Generator(self, sampling or Sampling()).on_host(prompts, max_new_tokens)

    def _caches(self) -> bool:
        """Whether ``_prefill`` and ``_decode`` may be used; see ``generation.Predictor``."""
        return False

    def _prefill(self, idx: Tensor, last: Tensor, n_slots: int, cache: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def _decode(self, tokens: Tensor, positions: Tensor, cache: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def _n_ids(self) -> int:
        return self.config.vocab_size

    def _check_ids(self, name: str, idx: Tensor) -> None:
        if idx.numel() == 0:
            return
        for value in (int(idx.min()), int(idx.max())):
            if not 0 <= value < self._n_ids():
                raise ValueError(
                    f"{name} must hold token ids from 0 to {self._n_ids() - 1} "
                    f"(vocab_size {self._n_ids()}), got {value}"
                )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Like ``nn.Module.load_state_dict``, but also accepts the state of a compiled model (keys
        with the prefix ``_orig_mod.``) and old files with a causal mask that the model lacks.
        """
        own = self.state_dict().keys()
        weights = {
            name: tensor
            for name, tensor in ((k.removeprefix("_orig_mod."), v) for k, v in state_dict.items())
            if name in own or not name.endswith((".attn.bias", ".attn.masked_bias"))
        }
        return super().load_state_dict(weights, strict=strict, assign=assign)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    # half precision stores a loss near 10 to only two digits
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten().long(), ignore_index=-1)


def _check_max_new_tokens(max_new_tokens: int) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not hasattr(max_new_tokens, "__index__"):
        raise TypeError(f"max_new_tokens must be an integer, got {max_new_tokens}")
