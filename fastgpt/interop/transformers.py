"""Use the ops of ``fastgpt.ops`` in the GPT-2 of Hugging Face's transformers.

``apply_to(model)`` replaces attention, LayerNorm, GELU and loss in place; ``undo(model)`` reverts
it. Parameters, their names and the classes of the modules do not change. A layer that was replaced,
hooked or wrapped is called as a module. Matrix products stay PyTorch's: ``Conv1D`` stores weights
as (in, out), which cuBLAS reads directly and our matmuls would copy on every call.

``register()`` is for other decoders: see ``fastgpt.interop.transformers_attention``. In shape
comments B is the batch size, T the sequence length, C the width.
"""

import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.blocks import is_plain
from fastgpt.interop.huggingface import _GELUS
from fastgpt.interop.transformers_attention import MAX_HEAD_SIZE, NAME, causal_mask, short_form
from fastgpt.interop.transformers_attention import register as register

Model = TypeVar("Model", bound=nn.Module)

_IGNORED = -100  # transformers' label for tokens without a loss

# Parameters of GPT2Attention and GPT2Block after hidden_states. The cache has had two names.
_POSITIONAL = (
    ("cache", "past_key_values"),
    ("attention_mask",),
    ("encoder_hidden_states",),
    ("encoder_attention_mask",),
)
_CHANGES = "softcap", "s_aux", "position_bias", "is_causal"  # arguments that change attention

# The replacement for the forward of modules of exactly this type. Filled by ``_fill``.
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {}


def _attention_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """GPT2Attention's forward. Without a cache or right padding the op takes q, k and v packed, as
    computed by ``c_attn``, and writes one packed gradient. Otherwise runs the original forward,
    which calls ``transformers_attention.attention``.
    """
    cache, mask, encoder_states, _, more = _arguments(args, kwargs)
    short = short_form(mask)
    packed = (
        self.config._attn_implementation == NAME
        and cache is encoder_states is None
        and self.is_causal
        and self.head_dim <= MAX_HEAD_SIZE
        and all(more.get(name) is None for name in _CHANGES)
    )
    if not packed or short is None or "key_lengths" in short:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    y = ops.attention_qkvpacked(
        self.c_attn(hidden_states),  # (B, T, 3C)
        self.num_heads,
        scale=self.scaling,
        dropout_p=self.attn_dropout.p if self.training else 0.0,
        **short,
    )
    return self.resid_dropout(self.c_proj(y)), None


def _block_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """GPT2Block's forward. The first residual sum and the LayerNorm after it are one op."""
    cache, mask, encoder_states, _, more = _arguments(args, kwargs)
    norm = self.ln_2
    if encoder_states is not None or _hooked(norm):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    y, _ = self.attn(self.ln_1(hidden_states), cache, mask, **more)
    x, residual = ops.residual_layer_norm(hidden_states, y, norm.weight, norm.bias, norm.eps)
    return residual + self.mlp(x)


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The values of ``_POSITIONAL``, None if not given, and the other arguments."""
    more = dict(kwargs)
    found = []
    for i, names in enumerate(_POSITIONAL):
        values = [args[i]] if i < len(args) else []
        values += [more.pop(name) for name in names if name in more]
        found.append(values[0] if values else None)
    return *found, more


def _hooked(norm: Any) -> bool:
    """Whether the norm was replaced, wrapped or hooked, so that an op must not replace its call."""
    own = norm.__dict__
    return not (
        type(norm) is nn.LayerNorm
        and own.get("_fastgpt", False)
        and getattr(own["forward"], "__func__", None) is _FORWARDS[nn.LayerNorm]
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
    )


def _norm_forward(self: Any, input: Tensor) -> Tensor:
    weight = self.weight
    if weight is None or weight.dim() != 1 or weight.dtype not in (input.dtype, torch.float32):
        return type(self).forward(self, input)
    return ops.layer_norm(input, weight, self.bias, self.eps)


def _trunk_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """GPT2Model's forward. A compiled graph cannot read position ids to detect packed documents, so
    transformers would build a full mask even without packing or padding. Pass ``causal_mask``."""
    given = (kwargs.get(name) for name in ("attention_mask", "cache", "position_ids"))
    if (
        torch.compiler.is_compiling()
        and self.config._attn_implementation == NAME
        and getattr(self.config, "is_causal", True)
        and len(args) <= 1
        and all(each is None for each in given)
        and kwargs.get("past_key_values") is None
    ):
        kwargs["attention_mask"] = causal_mask(self.wte.weight.device)
    return type(self).forward(self, *args, **kwargs)


def _gelu_forward(approximate: str) -> Callable[..., Tensor]:
    def forward(self: Any, input: Tensor) -> Tensor:
        return ops.gelu(input, approximate)

    return forward


def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """GPT2LMHeadModel's forward. In training with labels, the loss does not store the logits, so
    ``logits`` is None. Without labels, and in evaluation, they are returned."""
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

    labels: Any = kwargs.get("labels")
    keep = kwargs.get("logits_to_keep", 0)
    head = self.lm_head
    fused = (
        self.training
        and labels is not None
        and isinstance(keep, int)
        and keep == 0
        and "_loss_function" not in self.__dict__  # set by the user
        and getattr(self, "loss_type", None) in (None, "ForCausalLM")
        and is_plain(head, nn.Linear)
        and head.bias is None
        and head.weight.shape[0] == self.config.vocab_size
    )
    if not fused:
        return type(self).forward(self, *args, **kwargs)
    more = {k: v for k, v in kwargs.items() if k not in ("labels", "logits_to_keep", "return_dict")}
    found = self.transformer(*args, **more, return_dict=True)
    ignored = kwargs.get("ignore_index", _IGNORED)
    shifted = kwargs.get("shift_labels")
    if shifted is None:
        shifted = F.pad(labels, (0, 1), value=ignored)[..., 1:]
    hidden_states = found.last_hidden_state.flatten(0, -2)  # (B T, C)
    n_items = kwargs.get("num_items_in_batch")
    loss = ops.linear_cross_entropy(
        hidden_states,
        head.weight,
        shifted.reshape(-1).to(hidden_states.device),
        ignore_index=ignored,
        reduction="mean" if n_items is None else "sum",
    )
    if n_items is not None:
        loss = loss / (n_items.to(loss.device) if isinstance(n_items, Tensor) else n_items)
    rest = {name: value for name, value in found.items() if name != "last_hidden_state"}
    output = CausalLMOutputWithCrossAttentions(loss=loss, **rest)
    return_dict = kwargs.get("return_dict")
    if return_dict is None:
        return_dict = self.config.return_dict
    return output if return_dict else output.to_tuple()


def _fill() -> None:
    """Fill ``_FORWARDS``, which needs transformers."""
    from transformers.activations import ACT2FN
    from transformers.models.gpt2 import modeling_gpt2

    replacements: dict[Any, Callable[..., Any]] = {
        nn.LayerNorm: _norm_forward,
        modeling_gpt2.GPT2Attention: _attention_forward,
        modeling_gpt2.GPT2Block: _block_forward,
        modeling_gpt2.GPT2Model: _trunk_forward,
        modeling_gpt2.GPT2LMHeadModel: _model_forward,
    }
    for name, approximate in _GELUS.items():
        replacements[type(ACT2FN[name])] = _gelu_forward(approximate)
    for kind, replacement in replacements.items():
        _FORWARDS.setdefault(kind, _switched(kind.forward, replacement))


def _switched(own: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """``replacement``; after ``undo``, when a wrapper may still call it, the class's forward."""

    @functools.wraps(own)  # generate and trainers read its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = replacement if self._fastgpt else type(self).forward
        return chosen(self, *args, **kwargs)

    return forward


# ----------------------------------------------------------------------------------- the switch


def apply_to(model: Model) -> Model:
    """Replace the layers of transformers' GPT-2, or of a model that contains one (peft's), by the
    ops of ``fastgpt.ops``: kernels on a supported GPU, PyTorch's operators elsewhere.

    Modules of another type than transformers built, or with a patched ``forward``, are not changed.
    Calling it again on the same model has no effect.

    Raises:
        ValueError: ``model`` contains no GPT-2, or one with an option that the ops do not support.
            Nothing is replaced then.
        ImportError: transformers is not installed, or older than 5.17.
    """
    register()
    roots = list(_roots(model))
    for root in roots:
        _check(root.config)
    _fill()
    for root in roots:
        if not hasattr(root, "_fastgpt_before"):
            root._fastgpt_before = root.config._attn_implementation
        root.set_attn_implementation(NAME)
        for module in root.modules():
            forward = _FORWARDS.get(type(module))
            if forward is None:
                continue
            if "forward" not in module.__dict__:
                module.forward = MethodType(forward, module)  # type: ignore[method-assign]
                module._fastgpt = True  # type: ignore[assignment]
            elif hasattr(module, "_fastgpt"):  # switched off by undo after it had been wrapped
                module._fastgpt = True  # type: ignore[assignment]
    return model


def undo(model: Model) -> Model:
    """Undo ``apply_to``: results are bitwise the same as before it. Wrappers that were added to a
    module's ``forward`` since then (a trainer's mixed precision) stay and call the original.

    Raises ValueError if ``model`` is not patched.
    """
    roots = [root for root in _roots(model) if hasattr(root, "_fastgpt_before")]
    if not roots:
        raise ValueError(f"model must be patched by apply_to, got {type(model).__name__} as built")
    for root in roots:
        if root.config._attn_implementation == NAME:
            root.set_attn_implementation(root._fastgpt_before)
        del root._fastgpt_before
        for module in root.modules():
            if "_fastgpt" not in module.__dict__:
                continue
            if getattr(module.forward, "__func__", None) is _FORWARDS.get(type(module)):
                del module.forward, module._fastgpt
            else:
                module._fastgpt = False  # type: ignore[assignment]
    return model


def _roots(model: nn.Module) -> Iterator[Any]:
    """The outermost module of each GPT-2 in a model."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel

    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GPT2PreTrainedModel) and module not in inside:
            inside.update(module.modules())
            yield module
    if not inside:
        raise ValueError(
            f"model must be a GPT-2 of transformers, got {type(model).__name__}; other decoders "
            'take attn_implementation="fastgpt"'
        )


def _check(config: Any) -> None:
    allowed = {
        "activation_function": tuple(_GELUS),
        "add_cross_attention": (False,),
        "output_attentions": (False, None),
        "reorder_and_upcast_attn": (False,),
    }
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            wanted = " or ".join(map(repr, values))
            raise ValueError(f"{name} must be {wanted}, got {getattr(config, name)!r}")
