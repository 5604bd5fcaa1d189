"""nanoGPT's GPT-2, with the same names and the same results, on the ops of ``fastgpt.ops``.

``from fastgpt import GPTConfig, GPT`` replaces nanoGPT's ``from model import GPTConfig, GPT``.
The layers are in ``blocks``; code shared with other language models is in ``language_model``.
In shape comments B is the batch size, T the sequence length, C the width ``n_embd``.
"""

import functools
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops as default_ops
from fastgpt._files import is_path
from fastgpt.blocks import (
    MLP,
    Attend,
    Block,
    CausalSelfAttention,
    Context,
    Dropout,
    LayerNorm,
    is_plain,
)
from fastgpt.interop import huggingface
from fastgpt.language_model import GPTConfig, LanguageModel

# (n_layer, n_head, n_embd) of OpenAI's checkpoints and of Hugging Face's distilgpt2
PRETRAINED_SHAPES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
    "distilgpt2": (6, 12, 768),
}
A100_PEAK_FLOPS = 312e12  # bf16, dense


def published_name(source: str) -> str | None:
    """Return the key of ``PRETRAINED_SHAPES`` that ``source`` names, or None. The owner on the Hub
    may precede it (``openai-community/gpt2``), unless a file or folder of that name exists here.
    """
    owner, slash, name = source.rpartition("/")
    its_owner = "distilbert" if name == "distilgpt2" else "openai-community"
    if name not in PRETRAINED_SHAPES or (slash and owner != its_owner):
        return None
    return None if slash and Path(source).exists() else name


class _Transformer(nn.ModuleDict):
    """The trunk. A subclass of ModuleDict only to declare the types of its entries."""

    wte: nn.Embedding
    wpe: nn.Embedding
    drop: nn.Dropout
    h: nn.ModuleList
    ln_f: LayerNorm


def _is_plain_embedding(module: Any) -> bool:
    """Whether it is a plain embedding with no option that changes its result or gradient."""
    return (
        is_plain(module, nn.Embedding)
        and module.padding_idx is None
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )


def _has_plain_attention(block: Any) -> bool:
    """Whether the block's attention is our own, which supports document masks and a KV cache."""
    return is_plain(block, Block) and is_plain(block.attn, CausalSelfAttention)


def _dropout_rate(module: nn.Module) -> float:
    """The rate of this module itself, not of its children; a user may have changed it."""
    if isinstance(module, CausalSelfAttention):
        return module.dropout
    return module.p if isinstance(module, nn.Dropout) else 0.0


class GPT(LanguageModel):
    """GPT-2 (Radford et al. 2019): token and position embeddings, ``n_layer`` pre-LayerNorm
    blocks, a final LayerNorm, and a head tied to the token embedding.

    Args:
        ops: a module of ops: ``fastgpt.ops`` (Triton on CUDA, PyTorch elsewhere), or ``fused``,
            ``torch_ops`` or ``reference`` of ``fastgpt.kernels``.
        gelu: "none" for the exact erf form, as in nanoGPT, or "tanh" for the form that OpenAI's
            weights were trained with. Stored as ``gelu_approximate``.
        recompute: recompute GELU and LayerNorm in the backward: less memory, the same results.
        fp8: "head" uses 8-bit matrix products in the training loss: faster, less precise. Needs
            compute capability 8.9 or newer (checked in the first forward pass), and ``n_embd`` and
            ``vocab_size`` divisible by 16.
        eot_token: id of the token that starts each document. Attention and positions then stay
            within a document, as if each were run alone, and ``generate`` uses no KV cache.

    The attributes ``recompute``, ``fp8`` and ``eot_token`` may be changed at any time. With the
    same seed the initial weights equal nanoGPT's bit for bit.
    """

    def __init__(
        self,
        config: GPTConfig,
        ops: ModuleType = default_ops,
        gelu: str = "none",
        recompute: bool = False,
        fp8: str = "none",
        eot_token: int | None = None,
    ) -> None:
        super().__init__(config)
        if gelu not in ("none", "tanh"):
            raise ValueError(f"gelu must be 'none' or 'tanh', got {gelu!r}")
        self.gelu_approximate = gelu
        self.recompute = recompute
        self.fp8 = fp8
        self.eot_token = eot_token
        self._dropout_seed = ops.dropout_seed
        self._embedding = ops.embedding
        self._linear = ops.linear
        self._linear_cross_entropy = ops.linear_cross_entropy
        # Do not reorder: the order of construction determines which random numbers each weight
        # gets and how a saved optimizer state is indexed.
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
            if name.endswith("c_proj.weight"):  # each layer adds to the residual stream twice
                nn.init.normal_(param, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    @property
    def fp8(self) -> str:
        return self._fp8

    @fp8.setter
    def fp8(self, which: str) -> None:
        if which not in ("none", "head"):
            raise ValueError(f"fp8 must be 'none' or 'head', got {which!r}")
        for name in ("n_embd", "vocab_size"):
            size = getattr(self.config, name)
            if which != "none" and size % 16:
                raise ValueError(
                    f"{name} must be a multiple of 16 with fp8={which!r}, got {size}: pad it, for "
                    f"example to {-(-size // 64) * 64}"
                )
        self._fp8 = which

    @property
    def eot_token(self) -> int | None:
        return self._eot_token

    @eot_token.setter
    def eot_token(self, token: int | None) -> None:
        if token is not None and (not isinstance(token, int) or isinstance(token, bool)):
            raise TypeError(f"eot_token must be a token id or None, got {token!r}")
        if token is not None and not 0 <= token < self.config.vocab_size:
            raise ValueError(
                f"eot_token must lie in [0, {self.config.vocab_size}) or be None, got {token}"
            )
        self._eot_token = token

    def _doc_start(self, idx: Tensor) -> Tensor | None:
        """(B, T), int32: the position where the document of each token starts."""
        if self._eot_token is None:
            return None
        positions = torch.arange(idx.shape[1], dtype=torch.int32, device=idx.device)
        return positions.where(idx == self._eot_token, 0).cummax(dim=1).values

    def _tie_weights(self) -> None:
        self.transformer.wte.weight = self.lm_head.weight

    def _is_tied(self) -> bool:
        weights = [getattr(m, "weight", None) for m in (self.transformer.wte, self.lm_head)]
        return weights[0] is weights[1] is not None

    def _n_ids(self) -> int:
        """The size of the token embedding, which the user may have enlarged or replaced."""
        weight = getattr(self.transformer.wte, "weight", None)
        return self.config.vocab_size if weight is None else weight.shape[0]

    def _hidden(self, idx: Tensor, attends: Iterable[Attend | None] | None = None) -> Tensor:
        """Token ids (B, T) → the final LayerNorm's output (B, T, C)."""
        trunk = self.transformer
        drops = self.training and self.config.dropout > 0.0
        dropout = Dropout(self._dropout_seed(idx.device) if drops else None)
        context = Context(dropout, self._doc_start(idx), self.recompute)
        return self._through_blocks(
            self._embedded(idx, context), context, attends or [None] * len(trunk.h)
        )

    def _embedded(self, idx: Tensor, context: Context) -> Tensor:
        """Dropout of token plus position embedding: (B, T, C)."""
        wte, wpe, drop = self.transformer.wte, self.transformer.wpe, self.transformer.drop
        doc_start, plain_drop = context.doc_start, is_plain(drop, nn.Dropout)
        if (
            _is_plain_embedding(wte)
            and _is_plain_embedding(wpe)
            and wte.weight.dtype == wpe.weight.dtype
        ):
            drops = context.dropout.arguments(drop, drop.p) if plain_drop else {}
            x = self._embedding(idx, wte.weight, wpe.weight, doc_start=doc_start, **drops)
            return x if plain_drop else drop(x)
        positions = torch.arange(idx.shape[1], device=idx.device)
        return drop(wte(idx) + wpe(positions if doc_start is None else positions - doc_start))

    def _through_blocks(
        self, residual: Tensor, context: Context, attends: Iterable[Attend | None]
    ) -> Tensor:
        trunk = self.transformer
        blocks: list[Any] = list(trunk.h)
        ours = [is_plain(block, Block) for block in blocks]
        if context.doc_start is not None and not all(map(_has_plain_attention, blocks)):
            raise ValueError(
                "eot_token must be None with a custom block or attention, which takes no "
                f"document mask, got {self._eot_token}"
            )
        norms = [block.ln_1 if own else None for block, own in zip(blocks, ours, strict=True)]
        x = None  # ln_1(residual), if the previous block has computed it
        for block, own, next_norm, attend in zip(
            blocks, ours, [*norms, trunk.ln_f][1:], attends, strict=True
        ):
            if own:
                x = block.ln_1(residual) if x is None else x
                x, residual = block(x, residual, next_norm, context, attend)
            else:
                x, residual = None, block(residual)
        return trunk.ln_f(residual) if x is None else x

    def _logits(self, idx: Tensor, last_only: bool) -> Tensor:
        x = self._hidden(idx)
        return self.lm_head(x[:, -1:] if last_only else x)

    def _loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        if not is_plain(self.lm_head, nn.Linear) or self.lm_head.bias is not None:
            if self.fp8 != "none":
                raise ValueError(
                    f"fp8 must be 'none' if lm_head is custom or has a bias, got {self.fp8!r}"
                )
            return super()._loss(idx, targets)
        return self._linear_cross_entropy(
            self._hidden(idx),
            self.lm_head.weight,
            targets,
            ignore_index=-1,
            fp8=self.fp8 == "head",
        )

    def _caches(self) -> bool:
        training = [module for module in self.modules() if module.training]
        drops = training and max(self.config.dropout, *map(_dropout_rate, training)) > 0.0
        blocks: list[Any] = list(self.transformer.h)
        # A custom layer in place of the MLP may depend on other tokens than the new one.
        token_wise = all(_has_plain_attention(b) and is_plain(b.mlp, MLP) for b in blocks)
        return not drops and self._eot_token is None and token_wise

    def _prefill(self, idx: Tensor, last: Tensor, n_slots: int, cache: list[Tensor]) -> Tensor:
        blocks: list[Any] = list(self.transformer.h)
        attends = [
            functools.partial(block.attn.prefill, cache, layer, n_slots)
            for layer, block in enumerate(blocks)
        ]
        x = self._hidden(idx, attends)
        return self.lm_head(x[torch.arange(len(idx), device=idx.device), last])

    def _decode(self, tokens: Tensor, positions: Tensor, cache: list[Tensor]) -> Tensor:
        trunk = self.transformer
        x = trunk.drop(trunk.wte(tokens) + trunk.wpe(positions))[:, None]  # (B, 1, C)
        blocks: list[Any] = list(trunk.h)
        attends = [
            functools.partial(block.attn.decode, of_layer, positions)
            for block, of_layer in zip(blocks, cache, strict=True)
        ]
        x = self._through_blocks(x, Context(Dropout(None)), attends)[:, 0]
        lm_head = self.lm_head
        if is_plain(lm_head, nn.Linear):
            return self._linear(x, lm_head.weight, lm_head.bias)
        return lm_head(x)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """The number of parameters, by default without the position embedding. The token embedding
        counts because it is also the head's weight.
        """
        n_params = super().get_num_params()
        return n_params - self.transformer.wpe.weight.numel() if non_embedding else n_params

    def low_precision_parameters(self) -> list[nn.Parameter]:
        # Not the bias of c_proj: the residual LayerNorm adds it in float32.
        matrices = super().low_precision_parameters()
        layers = (m for m in self.modules() if isinstance(m, (CausalSelfAttention, MLP)))
        first = (m.c_fc if isinstance(m, MLP) else m.c_attn for m in layers)
        plain = (layer for layer in first if is_plain(layer, nn.Linear))
        return matrices + [layer.bias for layer in plain if layer.bias is not None]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        tied = self._is_tied()
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if tied:
            self._tie_weights()  # assign=True replaces the tied weight by two parameters
        return result

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context to ``block_size`` tokens, in the config too. Call it before
        ``configure_optimizers``: it replaces the position embedding by a smaller parameter.

        Raises ValueError unless 1 <= block_size <= the current one.
        """
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(
                f"block_size must lie between 1 and the current {self.config.block_size}, "
                f"got {block_size}"
            )
        wpe = self.transformer.wpe
        # a view would keep the whole table in memory and in checkpoints
        kept = wpe.weight[:block_size].detach().clone()
        wpe.weight = nn.Parameter(kept, requires_grad=wpe.weight.requires_grad)
        wpe.num_embeddings = self.config.block_size = block_size

    @classmethod
    def from_pretrained(
        cls, model_type: str | os.PathLike[str], override_args: Mapping[str, Any] | None = None
    ) -> "GPT":
        """Load pretrained weights, in float32. ``model_type`` is one of

        - ``gpt2``, ``gpt2-medium``, ``gpt2-large``, ``gpt2-xl`` (OpenAI) or ``distilgpt2``, also
          with their owners (``openai-community/gpt2``, ``distilbert/distilgpt2``): from Hugging
          Face's cache, or else downloaded from the Hub;
        - a folder written by transformers' GPT2LMHeadModel or ``fastgpt export --to=hf``;
        - a ``.safetensors`` file of such a folder, or from ``fastgpt export --to=safetensors``.

        ``override_args`` may only contain ``dropout``. The model uses the GELU that the weights
        were trained with, which for OpenAI's is the tanh form. This is the one numeric difference
        from nanoGPT's ``from_pretrained``, which uses the erf form.

        Raises ValueError on another name or override and on files of another model type,
        FileNotFoundError if the folder or file does not exist, ConnectionError if weights cannot be
        downloaded, ImportError without the extra ``hf``.
        """
        overrides = dict(override_args or {})
        unknown = sorted(set(overrides) - {"dropout"})
        if unknown:
            raise ValueError(f"override_args may only contain 'dropout', got {', '.join(unknown)}")
        name = os.fspath(model_type)
        if published_name(name):
            source = huggingface.download(name)
        elif is_path(name):
            source = Path(name)
        else:
            raise ValueError(
                f"model_type must be one of {', '.join(PRETRAINED_SHAPES)}, a folder or a "
                f".safetensors file, got {model_type!r}"
            )
        config, gelu, state = huggingface.read(source)
        model = cls(replace(config, dropout=overrides.get("dropout", 0.0)))
        model.gelu_approximate = gelu  # set here because a subclass may only take the config
        for module in model.modules():
            if isinstance(module, MLP):
                module.gelu.approximate = gelu
        try:
            model.load_state_dict(state)
        except RuntimeError as error:  # missing, unknown or wrongly shaped tensors
            raise ValueError(f"{source} does not hold the weights of {config}: {error}") from error
        return model

    def estimate_mfu(self, fwdbwd_per_iter: int, dt: float) -> float:
        """Model FLOPs utilisation (PaLM, Chowdhery et al. 2022, appendix B), as in nanoGPT
        relative to an A100's bf16 peak of 312 TFLOP/s, whatever the GPU.

        ``dt``: seconds for forward and backward of ``fwdbwd_per_iter`` sequences of block_size.
        """
        config = self.config
        head_size = config.n_embd // config.n_head
        attention = 12 * config.n_layer * config.n_head * head_size * config.block_size
        flops_per_token = 6 * self.get_num_params() + attention
        flops_per_iter = flops_per_token * config.block_size * fwdbwd_per_iter
        return flops_per_iter / dt / A100_PEAK_FLOPS
