"""Attention of ``fastgpt.ops`` for the decoders of Hugging Face's transformers.

transformers calls ``attention_mask`` once per forward pass and passes its result to ``attention``
in every layer, so this one tensor encodes both causality and padding:

    None                   causal; all keys for a single query or a layer that is not causal
    int32 (1, 1, 1, 0)     the same, if a tensor is required (``causal_mask``)
    int32 (B, 1, 1, 1)     key lengths; causal if there is more than one query
    int32 (B, 1, T, 1)     query i sees the keys start[i] <= j <= i
    any other, 4-D         a full mask, handled by PyTorch's attention

In shape comments B is the batch size, T the number of queries, S the number of keys, H the number
of heads, D the head size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt._optional import optional

NAME = "fastgpt"
MAX_HEAD_SIZE = 256
_OLDEST = (5, 17)  # version of transformers; older mask functions have other arguments


def register() -> None:
    """Register ``attn_implementation="fastgpt"`` with transformers. May be called repeatedly.

    Raises ImportError if transformers is missing or older than 5.17.
    """
    transformers = optional("transformers", 'attn_implementation="fastgpt"', "hf")
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        raise ImportError(
            f'attn_implementation="fastgpt" needs transformers {wanted} or newer, '
            f"found {transformers.__version__}"
        )
    transformers.AttentionInterface.register(NAME, attention)
    transformers.AttentionMaskInterface.register(NAME, attention_mask)


# ---------------------------------------------------------------------------------------- masks


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """transformers' ``sdpa_mask``, in one of the short forms above if possible.

    Like ``sdpa_mask``, it synchronizes with the device to read whether and where there is padding.
    Under ``torch.compile`` values cannot be read, so a given mask is kept in full.
    """
    # Names, not the module: PyTorch 2.11's Dynamo cannot import from transformers' lazy module.
    from transformers.masking_utils import causal_mask_function, sdpa_mask
    from transformers.utils.import_utils import is_tracing

    causal = mask_function is causal_mask_function and kv_offset == 0
    # Queries and keys are the same tokens. The offset of a static cache is a tensor.
    square = q_length == kv_length and isinstance(q_offset, int) and q_offset == 0
    readable = attention_mask is None or not is_tracing(attention_mask)
    if causal and readable and (q_length == 1 or square and allow_is_causal_skip):
        keys = torch.arange(kv_length, device=device)
        visible = (keys <= q_offset if q_length == 1 else keys >= 0)[None]  # (1, S)
        if attention_mask is not None:
            padding = attention_mask[:, :kv_length].bool()
            visible = visible & F.pad(padding, (0, kv_length - padding.shape[1]))
            found, short = _without_padding(visible, q_length)
            if found and short is None and not allow_is_causal_skip:
                return _lengths(visible)  # the form of the other steps, whose graph is compiled
            if found:
                return short
        elif isinstance(q_offset, Tensor):
            return _lengths(visible.expand(batch_size, -1))
        elif allow_is_causal_skip:
            return None
    make: Callable[..., Any] = sdpa_mask
    whole = make(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        device=device,
        **kwargs,
    )
    if whole is None or not square or q_length == 1 or is_tracing(whole):
        return whole
    return _as_starts(whole)


def _lengths(visible: Tensor) -> Tensor:
    return visible.sum(-1, dtype=torch.int32)[:, None, None, None]


def _without_padding(visible: Tensor, n_queries: int) -> tuple[bool, Tensor | None]:
    """Whether a short form can express which keys (B, S) are not padding, and that form."""
    keys = torch.arange(visible.shape[1], device=visible.device, dtype=torch.int32)
    lengths = _lengths(visible)
    first = visible.byte().argmax(-1, keepdim=True).int()  # (B, 1)
    last = first + lengths[:, :, 0, 0]
    at_end = (visible == (keys < lengths[:, :, 0, 0])).all()
    around = (visible == ((keys >= first) & (keys < last))).all()
    none, at_end, around = torch.stack([visible.all(), at_end, around]).tolist()
    if none:
        return True, None
    if at_end:
        return True, lengths
    if around and n_queries > 1:  # after the last token only padding sees padding
        return True, torch.minimum(first, keys)[:, None, :, None]
    return False, None


def _as_starts(mask: Tensor) -> Tensor:
    """Convert a bool mask (B, 1, T, T) to the first visible key of each query (B, 1, T, 1) if that
    is equivalent, as for documents and sliding windows; otherwise return it unchanged."""
    rows = torch.arange(mask.shape[2], device=mask.device)
    any_visible = mask.any(-1)
    starts = torch.where(any_visible, mask.byte().argmax(-1), rows)  # padding sees itself
    expected = (rows >= starts[..., None]) & (rows <= rows[:, None])
    same = ((mask == expected) | ~any_visible[..., None]).all()
    rising = (starts.diff(dim=-1) >= 0).all()
    return starts.int()[..., None] if bool(same & rising) else mask


def causal_mask(device: torch.device) -> Tensor:
    """The mask to pass to a model that would otherwise build one: causal, without padding."""
    return torch.empty(1, 1, 1, 0, dtype=torch.int32, device=device)


def short_form(mask: Tensor | None) -> dict[str, Any] | None:
    """A mask as arguments of ``ops.attention``, empty if it hides nothing; None for a full mask."""
    if mask is None or mask.dtype == torch.int32 and mask.shape[3] == 0:
        return {}
    if mask.dtype != torch.int32 or mask.shape[3] > 1:
        return None
    if mask.shape[2] == 1:
        return {"key_lengths": mask[:, 0, 0, 0]}
    return {"doc_start": mask[:, 0, :, 0]}


def _whole(mask: Any, n_queries: int, n_keys: int) -> Tensor:
    """Expand a short form that hides something to a bool mask, (B, 1, T, S) or (B, 1, 1, S)."""
    keys = torch.arange(n_keys, device=mask.device)
    visible = keys < mask if mask.shape[2] == 1 else keys >= mask
    return visible & (keys <= keys[:n_queries, None]) if n_queries > 1 else visible


# ------------------------------------------------------------------------------------ attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: ``ops.attention`` for the short masks above, otherwise
    ``sdpa_attention_forward`` with the equivalent full mask.

    query (B, H, T, D), key and value (B, H_kv, S, D), H a multiple of H_kv → (B, T, H, D). Raises
    ValueError for ``softcap`` and ``s_aux`` (attention sinks).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f'{name} must be None with attn_implementation="fastgpt"')
    n_queries, n_keys = query.shape[2], key.shape[2]
    short = short_form(attention_mask)
    served = (
        kwargs.get("position_bias") is None
        and query.dtype == key.dtype == value.dtype
        and query.shape[0] == key.shape[0]
        and query.shape[3] == key.shape[3] == value.shape[3] <= MAX_HEAD_SIZE
    )
    if short is None or not served:
        if short is not None:
            attention_mask = _whole(attention_mask, n_queries, n_keys) if short else None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(n_queries > 1 and (short or is_causal))
    if causal and not short:  # a static cache is empty after the first n_queries keys
        key, value = key[:, :, :n_queries], value[:, :, :n_queries]
    out = ops.attention(query, key, value, causal=causal, scale=scaling, dropout_p=dropout, **short)
    return out.transpose(1, 2).contiguous(), None
