"""The encoder-decoder Transformer of "Attention is all you need" (Vaswani et al. 2017,
arXiv:1706.03762), built from the layers of ``blocks`` on the ops of ``fastgpt.ops``.

As in the paper: a bidirectional encoder, a causal decoder with cross-attention, sinusoidal
positions, embeddings scaled by sqrt(C) and tied to the head, label smoothing. As in GPT-2, not the
paper: LayerNorm before each layer instead of after it, and GELU instead of ReLU. It corresponds to
``torch.nn.Transformer(norm_first=True, activation="gelu")``.

In shape comments B is the batch size, S the source length, T the target length, C the width
``n_embd``, H the number of heads, D the head size, K the number of hypotheses per source.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import ops as default_ops
from fastgpt.blocks import (
    MLP,
    Attend,
    Block,
    CausalSelfAttention,
    Context,
    Delta,
    Dropout,
    LayerNorm,
)
from fastgpt.language_model import GPTConfig, Trainable

PADDING = -1  # fills the end of shorter sources and targets


@dataclass
class Seq2SeqConfig(GPTConfig):
    """The shape of a model. ``vocab_size`` is the targets', ``block_size`` the maximum length of a
    source or target with its end token, ``n_layer`` the number of layers of encoder and decoder.

    Raises TypeError or ValueError naming the field, the value and what is allowed.
    """

    source_vocab_size: int | None = None  # None: sources and targets share vocabulary and table
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source_vocab_size is not None and self.source_vocab_size < 1:
            raise ValueError(
                f"source_vocab_size must be at least 1 or None, got {self.source_vocab_size}"
            )
        if self.n_embd % 2:
            raise ValueError(f"n_embd must be even (sines and cosines), got {self.n_embd}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")


class Memory(NamedTuple):
    """The encoded sources: keys and values for the cross-attention of each layer."""

    keys_values: list[tuple[Tensor, Tensor]]  # per layer, each (B, H, S, D)
    lengths: Tensor  # (B,), int32


def sinusoids(n_positions: int, width: int) -> Tensor:
    """The paper's position encoding, (n_positions, width): sines in even columns, cosines in odd
    ones, with wavelengths from 2 pi to 10000 * 2 pi."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(n_positions)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)


class CrossAttention(nn.Module):
    """Attention of the targets to the encoded sources, with scale 1 / sqrt(D)."""

    def __init__(self, config: Seq2SeqConfig, ops: ModuleType = default_ops) -> None:
        super().__init__()
        width = config.n_embd
        self.c_q = nn.Linear(width, width, bias=config.bias)
        self.c_kv = nn.Linear(width, 2 * width, bias=config.bias)
        self.c_proj = nn.Linear(width, width, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self._linear = ops.linear
        self._attention = ops.attention

    def keys_values(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, C) → keys and values (B, H, S, D)."""
        kv = self._linear(encoded, self.c_kv.weight, self.c_kv.bias)
        k, v = kv.unflatten(2, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def delta(
        self, x: Tensor, keys_values: tuple[Tensor, Tensor], lengths: Tensor, context: Context
    ) -> Delta:
        """x is (B, T, C), or (B * K, 1, C) with the K hypotheses of a source as its queries."""
        k, v = keys_values
        q = self._linear(x, self.c_q.weight, self.c_q.bias)
        n_queries = (len(x) // max(len(k), 1) or 1) * x.shape[1]  # per source: T or K
        q = q.view(len(k), n_queries, self.n_head, k.shape[3]).transpose(1, 2)  # (B, H, T or K, D)
        drop = context.dropout.arguments(self, self.dropout)
        y = self._attention(q, k, v, causal=False, key_lengths=lengths, **drop)
        y = y.transpose(1, 2).reshape(x.shape)
        return Delta(self._linear(y, self.c_proj.weight), self.c_proj.bias, self.resid_dropout)


class DecoderBlock(nn.Module):
    """A pre-LayerNorm block: causal self-attention, cross-attention, MLP, each added to its
    input."""

    def __init__(self, config: Seq2SeqConfig, ops: ModuleType = default_ops) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias, ops)
        self.attn = CausalSelfAttention(config, ops)
        self.ln_cross = LayerNorm(config.n_embd, config.bias, ops)
        self.cross = CrossAttention(config, ops)
        self.ln_2 = LayerNorm(config.n_embd, config.bias, ops)
        self.mlp = MLP(config, ops)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        next_norm: LayerNorm,
        context: Context,
        attend: Attend | None,
        keys_values: tuple[Tensor, Tensor],
        lengths: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The block applied to ``x = ln_1(residual)``. Returns ``next_norm(new_residual)`` and the
        new residual. ``attend`` is called instead of causal self-attention."""
        dropout = context.dropout
        delta = self.attn.delta(x, context, attend=attend)
        x, residual = self.ln_cross.of_sum(residual, delta, dropout)
        delta = self.cross.delta(x, keys_values, lengths, context)
        x, residual = self.ln_2.of_sum(residual, delta, dropout)
        return next_norm.of_sum(residual, self.mlp.delta(x), dropout)


class Seq2Seq(Trainable):
    """Encoder and decoder for sources (B, S) and targets (B, T), token ids padded by ``PADDING``.

    The last id of each vocabulary is the end token. It ends every source and target, and is also
    the first input of the decoder. ``ops`` is a module of ops, as for ``GPT``.
    """

    encoder: Sequence[Block]
    decoder: Sequence[DecoderBlock]
    positions: Tensor

    def __init__(self, config: Seq2SeqConfig, ops: ModuleType = default_ops) -> None:
        super().__init__()
        self.config = config
        width, blocks = config.n_embd, range(config.n_layer)
        self.wte = nn.Embedding(config.vocab_size, width)  # of the targets, and the head
        self.source_wte = self.wte
        if config.source_vocab_size is not None:
            self.source_wte = nn.Embedding(config.source_vocab_size, width)
        self.drop = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(Block(config, ops) for _ in blocks)  # type: ignore
        self.ln_encoder = LayerNorm(width, config.bias, ops)
        self.decoder = nn.ModuleList(DecoderBlock(config, ops) for _ in blocks)  # type: ignore
        self.ln_decoder = LayerNorm(width, config.bias, ops)
        # Divided by sqrt(C) here because the sum with the token embedding is multiplied by it.
        table = sinusoids(config.block_size, width) / math.sqrt(width)
        self.register_buffer("positions", table, persistent=False)
        self._dropout_seed = ops.dropout_seed
        self._embedding = ops.embedding
        self._linear = ops.linear
        self._attention = ops.attention
        self._linear_cross_entropy = ops.linear_cross_entropy
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):  # variance 1 after scaling by sqrt(C)
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def end(self) -> int:
        """The targets' end token."""
        return self.config.vocab_size - 1

    def forward(
        self, source: Tensor, target: Tensor, return_logits: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        """Return the logits (B, T, V) of the targets, each given the source and the targets before
        it, and the loss: the mean cross-entropy in nats over the targets that are not padding, a
        float32 scalar, label-smoothed in training mode. Logits are None without ``return_logits``.

        Raises ValueError if a sequence is longer than ``block_size``.
        """
        context = self._context(source.device)
        memory = self._memory(source, context)
        start = target.new_full((len(target), 1), self.end)
        shifted = torch.cat((start, target[:, :-1]), dim=1).clamp(min=0)
        x = self._embedded(self.wte, shifted, context)
        x = self._decoded(x, memory, context, [None] * len(self.decoder))
        loss = self._linear_cross_entropy(
            x,
            self.wte.weight,
            target,
            ignore_index=PADDING,
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
        )
        return self._linear(x, self.wte.weight) if return_logits else None, loss

    def encode(self, source: Tensor) -> Memory:
        """Token ids (B, S) → keys and values for ``decode``."""
        return self._memory(source, self._context(source.device))

    def empty_cache(self, n_sequences: int, n_slots: int) -> list[Tensor]:
        """A KV cache for targets of at most ``n_slots`` tokens: per layer
        (2, n_sequences, H, n_slots, D)."""
        n_head, weight = self.config.n_head, self.wte.weight
        dtype, kind = weight.dtype, weight.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        shape = (2, n_sequences, n_head, n_slots, self.config.n_embd // n_head)
        return [weight.new_zeros(shape, dtype=dtype) for _ in self.decoder]

    def decode(self, tokens: Tensor, position: int, memory: Memory, cache: list[Tensor]) -> Tensor:
        """The newest token of each hypothesis (B * K,), all at the same position → logits
        (B * K, V) of the next one. Writes its keys and values to ``cache``."""
        context = Context(Dropout(None))
        positions = torch.full_like(tokens, position)
        x = self._embedded(self.wte, tokens[:, None], context, position)
        attends = [
            functools.partial(block.attn.decode, of_layer, positions)
            for block, of_layer in zip(self.decoder, cache, strict=True)
        ]
        x = self._decoded(x, memory, context, attends)[:, 0]
        return self._linear(x, self.wte.weight)

    def _context(self, device: torch.device) -> Context:
        drops = self.training and self.config.dropout > 0.0
        return Context(Dropout(self._dropout_seed(device) if drops else None))

    def _embedded(
        self, table: nn.Embedding, idx: Tensor, context: Context, position: int = 0
    ) -> Tensor:
        """Dropout of token embedding times sqrt(C) plus position: (B, T, C)."""
        end = position + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(
                f"a sequence must have at most block_size {self.config.block_size} tokens, "
                f"got {end}"
            )
        positions = self.positions[position:end].to(table.weight.dtype)
        drop = context.dropout.arguments(self.drop, self.config.dropout)
        return self._embedding(idx, table.weight, positions, **drop) * self.config.n_embd**0.5

    def _memory(self, source: Tensor, context: Context) -> Memory:
        lengths = (source != PADDING).sum(1, dtype=torch.int32)
        residual = self._embedded(self.source_wte, source.clamp(min=0), context)
        norms = [*(block.ln_1 for block in self.encoder), self.ln_encoder]
        x = norms[0](residual)
        for block, next_norm in zip(self.encoder, norms[1:], strict=True):
            attend = functools.partial(self._bidirectional, block.attn, lengths, context)
            x, residual = block(x, residual, next_norm, context, attend)
        return Memory([block.cross.keys_values(x) for block in self.decoder], lengths)

    def _bidirectional(
        self, attn: CausalSelfAttention, lengths: Tensor, context: Context, qkv: Tensor
    ) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, attn.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, S, D)
        drop = context.dropout.arguments(attn, attn.dropout)
        y = self._attention(q, k, v, causal=False, key_lengths=lengths, **drop)
        return y.transpose(1, 2).flatten(2)

    def _decoded(
        self,
        residual: Tensor,
        memory: Memory,
        context: Context,
        attends: Sequence[Attend | None],
    ) -> Tensor:
        norms = [*(block.ln_1 for block in self.decoder), self.ln_decoder]
        x = norms[0](residual)
        for block, next_norm, attend, keys_values in zip(
            self.decoder, norms[1:], attends, memory.keys_values, strict=True
        ):
            x, residual = block(
                x, residual, next_norm, context, attend, keys_values, memory.lengths
            )
        return x

    def low_precision_parameters(self) -> list[nn.Parameter]:
        # A bias added by a matrix product has the matrix's dtype; the others are added in float32.
        own = [m.c_attn for m in self.modules() if isinstance(m, CausalSelfAttention)]
        own += [m.c_fc for m in self.modules() if isinstance(m, MLP)]
        for cross in (m for m in self.modules() if isinstance(m, CrossAttention)):
            own += [cross.c_q, cross.c_kv]
        biases = [layer.bias for layer in own if layer.bias is not None]
        return super().low_precision_parameters() + biases
