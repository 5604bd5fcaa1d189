"""GPT-2 as nanoGPT defines it (same names, same numbers) on the ops of ``fastgpt.ops``.

``from fastgpt import GPTConfig, GPT`` replaces nanoGPT's ``from model import GPTConfig, GPT``.
In the shape comments B is the batch, T the length, C the width ``n_embd``, V ``vocab_size``.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops as default_ops
from fastgpt.ops import Recipe

# layers, heads and width of the checkpoints that OpenAI published
_PRETRAINED_SHAPES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
# Hugging Face stores these as (in, out), nn.Linear as (out, in)
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_A100_PEAK_FLOPS = 312e12  # bf16, dense


@dataclass
class GPTConfig:
    """The shape of a model. Exactly these seven fields: nanoGPT reads them from checkpoints.

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


class _Dropout:
    """The dropout of one forward pass: every place that drops has a stream of its own under one
    seed, so that no mask is ever stored. Without a seed PyTorch's generator draws the masks.
    """

    def __init__(self, seed: Tensor | None) -> None:
        self._seed = seed
        self._places = itertools.count()

    def arguments(self, module: nn.Module, p: float) -> dict[str, Any]:
        """For the op in the place of ``module``, whose mode says whether it drops."""
        p = p if module.training else 0.0
        seed = self._seed if p > 0.0 else None
        return dict(dropout_p=p, seed=seed, stream=next(self._places))


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension (``ndim``), with or without a bias; eps is 1e-5."""

    def __init__(self, ndim: int, bias: bool, ops: ModuleType = default_ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None
        self._layer_norm = ops.layer_norm
        self._residual_layer_norm = ops.residual_layer_norm

    def forward(self, x: Tensor) -> Tensor:
        return self._layer_norm(x, self.weight, self.bias, 1e-5)

    def of_sum(
        self, residual: Tensor, delta: Tensor, delta_bias: Tensor | None, dropout: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The norm of ``residual + dropout(delta + delta_bias)``, and that sum."""
        return self._residual_layer_norm(
            residual, delta, self.weight, self.bias, 1e-5, delta_bias=delta_bias, **dropout
        )

    def recipe(self, x: Tensor) -> Recipe:
        """How to make ``self(x)`` again."""
        return x, self.weight, self.bias, 1e-5


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention on (B, T, C), with scale 1 / sqrt(head size). The bias of
    ``c_proj`` and the dropout behind it are left to the residual sum.
    """

    def __init__(self, config: GPTConfig, ops: ModuleType = default_ops) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        # part of the interface only: the op drops probabilities itself, at the rate `dropout`
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout
        self._linear = ops.linear
        self._attention = ops.attention_qkvpacked

    def forward(self, x: Tensor, recompute: Recipe | None, dropout: _Dropout) -> Tensor:
        c_attn = self.c_attn
        qkv = self._linear(x, c_attn.weight, c_attn.bias, recompute=recompute)  # (B, T, 3C)
        y = self._attention(qkv, self.n_head, **dropout.arguments(self, self.dropout))
        return self._linear(y, self.c_proj.weight)  # (B, T, C)


class MLP(nn.Module):
    """Linear to 4C, GELU, Linear back to C. The bias of ``c_proj`` and the dropout behind it are
    left to the residual sum.
    """

    def __init__(
        self, config: GPTConfig, ops: ModuleType = default_ops, gelu: str = "none"
    ) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = functools.partial(ops.gelu, approximate=gelu)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self._mlp = ops.mlp
        self._approximate = gelu

    def forward(self, x: Tensor, recompute: Recipe | None) -> Tensor:
        return self._mlp(
            x,
            self.c_fc.weight,
            self.c_fc.bias,
            self.c_proj.weight,
            approximate=self._approximate,
            recompute=recompute,
        )


class Block(nn.Module):
    """A pre-LayerNorm transformer block: attention, then MLP, each added to its input.

    A sum and the LayerNorm behind it are one op, so a block begins with a normalised x beside the
    residual that it was made from, and ends with the next LayerNorm.
    """

    def __init__(
        self, config: GPTConfig, ops: ModuleType = default_ops, gelu: str = "none"
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias, ops)
        self.attn = CausalSelfAttention(config, ops)
        self.ln_2 = LayerNorm(config.n_embd, config.bias, ops)
        self.mlp = MLP(config, ops, gelu)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        next_norm: LayerNorm,
        dropout: _Dropout,
        recompute: bool,
    ) -> tuple[Tensor, Tensor]:
        """``x`` is ``ln_1(residual)``, both (B, T, C); returns their likes for the next block."""
        attn, mlp = self.attn, self.mlp
        delta = attn(x, self.ln_1.recipe(residual) if recompute else None, dropout)
        drop = dropout.arguments(attn.resid_dropout, attn.resid_dropout.p)
        x, residual = self.ln_2.of_sum(residual, delta, attn.c_proj.bias, drop)
        delta = mlp(x, self.ln_2.recipe(residual) if recompute else None)
        drop = dropout.arguments(mlp.dropout, mlp.dropout.p)
        return next_norm.of_sum(residual, delta, mlp.c_proj.bias, drop)


class LanguageModel(nn.Module):
    """What every model here shares: loss, sampling, optimizer, loading. A model adds its
    parameters and ``_logits``.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config

    def _logits(self, idx: Tensor, last_only: bool) -> Tensor:
        """Token ids (B, T) → logits of the next token (B, T, V), or (B, 1, V) of the last one."""
        raise NotImplementedError

    def _loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy, for training: no logits are asked for."""
        return _cross_entropy(self._logits(idx, last_only=False), targets)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """The number of parameters; by default without the position table, if there is one.
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
        - While training (``self.training``, gradients enabled, targets given) logits is None,
          unless ``return_logits``: the fused loss never builds them.

        Raises TypeError or ValueError on a wrong dtype, shape or device, and AssertionError, as
        nanoGPT does, on a T over block_size. Ids are not checked against the vocabulary: on a
        GPU that would stall every step.
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
        among the ``top_k`` likeliest if given. The model sees the last ``block_size`` tokens.
        Sampling uses PyTorch's generator; dropout stays on unless ``eval()`` was called.

        Returns (B, T + max_new_tokens). Raises ValueError or TypeError naming the argument.
        """
        self._check_tokens("idx", idx)
        self._check_ids(idx)
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        if not temperature >= 0.0:
            raise ValueError(f"temperature must be at least 0 (greedy), got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all tokens, got {top_k}")
        for _ in range(max_new_tokens):
            logits, _loss = self(idx[:, -self.config.block_size :])
            idx = torch.cat((idx, _draw(logits[:, -1, :], temperature, top_k)), dim=1)
        return idx

    def _check_ids(self, idx: Tensor) -> None:
        if idx.numel() == 0:
            return
        for value in (int(idx.min()), int(idx.max())):
            if not 0 <= value < self.config.vocab_size:
                raise ValueError(
                    f"idx must hold token ids from 0 to {self.config.vocab_size - 1} "
                    f"(vocab_size {self.config.vocab_size}), got {value}"
                )

    def configure_optimizers(
        self,
        weight_decay: float,
        learning_rate: float,
        betas: tuple[float, float],
        device_type: str,
    ) -> torch.optim.AdamW:
        """AdamW (Loshchilov & Hutter 2019), eps 1e-8, fused on CUDA and on the CPU.

        Group 0 holds the matrices and is decayed, group 1 the vectors and is not. Each keeps the
        order of ``named_parameters()``, by which a saved optimizer state is indexed.
        """
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        # None lets PyTorch choose for other devices. On the CPU too (nanoGPT leaves that out) one
        # pass takes a fraction of the loop's time and none of its temporaries.
        fused = True if torch.device(device_type).type in ("cuda", "cpu") else None
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As ``nn.Module.load_state_dict``; also takes what a compiled model saved (keys with the
        prefix ``_orig_mod.``) and old files that hold the causal mask.
        """
        weights = {
            name.removeprefix("_orig_mod."): tensor
            for name, tensor in state_dict.items()
            if not name.endswith((".attn.bias", ".attn.masked_bias"))
        }
        return super().load_state_dict(weights, strict=strict, assign=assign)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    # half precision holds a loss near 10 to two digits only
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten().long(), ignore_index=-1)


def _draw(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """One token (B, 1) from the logits (B, V) of the next one."""
    if temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -math.inf)
    return torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)


class _Transformer(nn.ModuleDict):
    """The trunk; a class only to declare what the names hold."""

    wte: nn.Embedding
    wpe: nn.Embedding
    drop: nn.Dropout
    h: nn.ModuleList
    ln_f: LayerNorm


class GPT(LanguageModel):
    """GPT-2 (Radford et al. 2019): token and position embeddings, ``n_layer`` pre-LayerNorm
    blocks, a final LayerNorm, and a head tied to the token embedding.

    ``ops`` is a module of ops: ``fastgpt.ops`` (Triton on CUDA, PyTorch elsewhere), or ``fused``,
    ``portable`` or ``reference`` of ``fastgpt.kernels``. ``gelu`` is "none" for the exact erf form,
    as in nanoGPT, or "tanh" for the one that OpenAI's weights were trained with;
    ``gelu_approximate`` holds the choice. With ``recompute`` the results of GELU and LayerNorm are
    made again in the backward rather than kept: less memory, the same numbers. The attribute
    ``recompute`` may be changed at any time.

    With the same seed the initial weights are nanoGPT's, bit for bit.
    """

    def __init__(
        self,
        config: GPTConfig,
        ops: ModuleType = default_ops,
        gelu: str = "none",
        recompute: bool = False,
    ) -> None:
        super().__init__(config)
        if gelu not in ("none", "tanh"):
            raise ValueError(f"gelu must be 'none' or 'tanh', got {gelu!r}")
        self.gelu_approximate = gelu
        self.recompute = recompute
        self._dropout_seed = ops.dropout_seed
        self._embedding = ops.embedding
        self._linear_cross_entropy = ops.linear_cross_entropy
        # The order of construction, of initialisation and of the state dict is part of the
        # contract: it fixes which random numbers a weight gets and how saved state is indexed.
        self.transformer = _Transformer(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, ops, gelu) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, config.bias, ops),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._tie_weights()
        self.apply(self._init_weights)
        for name, param in self.named_parameters():
            if name.endswith("c_proj.weight"):  # two additions to the residual stream per layer
                nn.init.normal_(param, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _tie_weights(self) -> None:
        self.transformer.wte.weight = self.lm_head.weight

    def _hidden(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) → the final LayerNorm's output (B, T, C)."""
        trunk = self.transformer
        drops = self.training and self.config.dropout > 0.0
        dropout = _Dropout(self._dropout_seed(idx.device) if drops else None)
        residual = self._embedding(
            idx,
            trunk.wte.weight,
            trunk.wpe.weight,
            **dropout.arguments(trunk.drop, trunk.drop.p),
        )
        norms: list[Any] = [*(block.ln_1 for block in trunk.h), trunk.ln_f]
        x = norms[0](residual)
        for block, next_norm in zip(trunk.h, norms[1:], strict=True):
            x, residual = block(x, residual, next_norm, dropout, self.recompute)
        return x

    def _logits(self, idx: Tensor, last_only: bool) -> Tensor:
        x = self._hidden(idx)
        return self.lm_head(x[:, -1:] if last_only else x)

    def _loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self._linear_cross_entropy(
            self._hidden(idx), self.lm_head.weight, targets, ignore_index=-1
        )

    def get_num_params(self, non_embedding: bool = True) -> int:
        """The number of parameters; by default without the position table. The token table
        counts, being the head's weight as well.
        """
        n_params = super().get_num_params()
        return n_params - self.transformer.wpe.weight.numel() if non_embedding else n_params

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._tie_weights()  # assign=True puts two parameters where one was
        return result

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context to ``block_size`` tokens, in the config too. To be called before
        ``configure_optimizers``: the position table becomes a new, smaller parameter.

        Raises ValueError unless 1 <= block_size <= the present one.
        """
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(
                f"block_size must lie between 1 and the present {self.config.block_size}, "
                f"got {block_size}"
            )
        wpe = self.transformer.wpe
        kept = wpe.weight[:block_size].detach().clone()  # a view would keep, and save, it all
        wpe.weight = nn.Parameter(kept, requires_grad=wpe.weight.requires_grad)
        wpe.num_embeddings = self.config.block_size = block_size

    @classmethod
    def from_pretrained(
        cls, model_type: str, override_args: Mapping[str, Any] | None = None
    ) -> "GPT":
        """OpenAI's weights, by way of Hugging Face: ``gpt2``, ``gpt2-medium``, ``gpt2-large`` or
        ``gpt2-xl``, in float32. Of the config only ``dropout`` may be overridden.

        The model uses the tanh GELU, which these weights were trained with. That is the one
        numeric difference from nanoGPT's ``from_pretrained``, which applies the erf form to them.

        Raises ValueError on another name or override, ImportError without ``transformers``.
        """
        if model_type not in _PRETRAINED_SHAPES:
            raise ValueError(
                f"model_type must be one of {', '.join(_PRETRAINED_SHAPES)}, got {model_type!r}"
            )
        overrides = dict(override_args or {})
        refused = sorted(set(overrides) - {"dropout"})
        if refused:
            raise ValueError(f"override_args may hold 'dropout' only, got {', '.join(refused)}")
        try:
            from transformers import GPT2LMHeadModel
        except ImportError as error:
            raise ImportError(
                'from_pretrained needs Hugging Face transformers: pip install "fastgpt-triton[hf]"'
            ) from error
        n_layer, n_head, n_embd = _PRETRAINED_SHAPES[model_type]
        config = GPTConfig(1024, 50257, n_layer, n_head, n_embd, bias=True, **overrides)
        model = cls(config, gelu="tanh")
        published = GPT2LMHeadModel.from_pretrained(model_type).state_dict()
        model.load_state_dict(
            {
                name: tensor.t() if name.endswith(_TRANSPOSED) else tensor
                for name, tensor in published.items()
            }
        )
        return model

    def estimate_mfu(self, fwdbwd_per_iter: int, dt: float) -> float:
        """Model FLOPs utilisation (PaLM, Chowdhery et al. 2022, appendix B) as a share of an
        A100's bf16 peak, 312 TFLOP/s, whatever the GPU.

        ``fwdbwd_per_iter`` sequences of block_size tokens went forward and backward in ``dt``
        seconds.
        """
        config = self.config
        head_size = config.n_embd // config.n_head
        attention = 12 * config.n_layer * config.n_head * head_size * config.block_size
        flops_per_token = 6 * self.get_num_params() + attention
        flops_per_iter = flops_per_token * config.block_size * fwdbwd_per_iter
        return flops_per_iter / dt / _A100_PEAK_FLOPS
