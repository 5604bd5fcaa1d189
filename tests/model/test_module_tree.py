"""Replaced, wrapped, hooked and patched layers are called: results equal those of a plain model,
written here with nanoGPT's names, after the same change."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.kernels import fused, torch_ops

CONFIG = GPTConfig(block_size=16, vocab_size=48, n_layer=2, n_head=2, n_embd=32, bias=True)
Change = Callable[[Any], object]  # changes either model in place


class PlainAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head

    def forward(self, x: Tensor) -> Tensor:
        heads = self.c_attn(x).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~causal, -torch.inf)
        y = (scores.softmax(3) @ v).transpose(1, 2).flatten(2)
        out: Tensor = self.resid_dropout(self.c_proj(y))
        return out


class PlainMLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.c_proj(self.gelu(self.c_fc(x))))
        return out


class PlainBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = PlainAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = PlainMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class PlainGPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer: Any = nn.ModuleDict(
            {
                "wte": wte,
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        trunk = self.transformer
        x = trunk.drop(trunk.wte(idx) + trunk.wpe(torch.arange(idx.shape[1])))
        for block in trunk.h:
            x = block(x)
        logits = self.lm_head(trunk.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class LoRALinear(nn.Linear):
    """As in loralib: a subclass whose ``forward`` adds a low-rank product."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__(old.in_features, old.out_features, bias=old.bias is not None)
        self.load_state_dict(old.state_dict())
        self.weight.requires_grad = False
        self.lora_A = nn.Parameter(0.2 * torch.randn(2, old.in_features))
        self.lora_B = nn.Parameter(0.2 * torch.randn(old.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.t() @ self.lora_B.t()


class LoRAWrapper(nn.Module):
    """As in peft: a wrapper module, which has neither weight nor bias."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.base_layer = old.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale * self.base_layer(x)
        return out


class ScaledEmbedding(nn.Embedding):
    @classmethod
    def of(cls, old: nn.Embedding) -> "ScaledEmbedding":
        return cls(old.num_embeddings, old.embedding_dim, _weight=old.weight)

    def forward(self, idx: Tensor) -> Tensor:
        return 3.0 * super().forward(idx)


class OwnLayer(nn.Module):
    """A user's own attention or MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(CONFIG.n_embd, CONFIG.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1).tanh() + torch.relu(self.proj(x))


def _owners(model: Any, name: str) -> Iterator[tuple[nn.Module, str]]:
    """(parent, attribute) of each module whose name ends with ``name``."""
    for path, _ in list(model.named_modules()):
        parent, _, last = path.rpartition(".")
        if path == name or path.endswith(f".{name}"):
            yield model.get_submodule(parent), last


def replaced(name: str, make: Callable[[Any], nn.Module]) -> Change:
    def change(model: Any) -> None:
        for i, (owner, attribute) in enumerate(_owners(model, name)):
            torch.manual_seed(i)
            setattr(owner, attribute, make(getattr(owner, attribute)))

    return change


def hooked(name: str, register: Callable[[nn.Module], object]) -> Change:
    def change(model: Any) -> None:
        for owner, attribute in _owners(model, name):
            register(getattr(owner, attribute))

    return change


def _patch(module: nn.Module) -> None:
    old = module.forward
    module.forward = lambda x: old(x) + 0.5  # type: ignore[method-assign]


def _doubled(grads: Any) -> tuple[Tensor, ...]:
    return (2 * grads[0],)


def _grow(model: Any) -> None:
    """Enlarge the vocabulary, as for new special tokens."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.cat((model.lm_head.weight, torch.randn(5, CONFIG.n_embd))).detach())
    model.transformer.wte.weight = model.lm_head.weight = weight


def _own_block(model: Any) -> None:
    kind = type(model.transformer.h[0])

    class Parallel(kind):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor) -> Tensor:
            x = self.ln_1(x)
            out: Tensor = x + self.attn(x) + self.mlp(self.ln_2(x))
            return out

    model.transformer.h[1].__class__ = Parallel


LAYERS = (
    *("wte", "wpe", "drop", "h.0", "ln_1", "attn", "c_attn", "attn.c_proj", "resid_dropout"),
    *("ln_2", "mlp", "c_fc", "gelu", "mlp.c_proj", "mlp.dropout", "ln_f", "lm_head"),
)
LINEARS = ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "lm_head")
CHANGES: dict[str, Change] = {
    "nothing": lambda model: None,
    **{f"LoRA subclass {n}": replaced(n, LoRALinear) for n in LINEARS},
    **{f"LoRA wrapper {n}": replaced(n, LoRAWrapper) for n in LINEARS},
    **{
        f"hook on {n}": hooked(n, lambda m: m.register_forward_hook(lambda m, args, out: 1.5 * out))
        for n in LAYERS
    },
    **{
        f"pre-hook on {n}": hooked(
            n, lambda m: m.register_forward_pre_hook(lambda m, args: (1.5 * args[0],))
        )
        for n in ("h.1", "attn", "ln_2", "c_fc", "lm_head")
    },
    **{
        f"backward hook on {n}": hooked(
            n, lambda m: m.register_full_backward_hook(lambda m, grads, _: _doubled(grads))
        )
        for n in ("h.1", "attn", "mlp", "ln_1", "c_attn", "c_fc", "gelu", "ln_f", "lm_head")
    },
    **{f"patched forward of {n}": hooked(n, _patch) for n in LAYERS if n not in ("wte", "wpe")},
    "embedding subclass": replaced("wte", ScaledEmbedding.of),
    "positions replaced": replaced("wpe", lambda old: nn.Embedding(16, 32)),
    "drop = Identity": replaced("drop", lambda old: nn.Identity()),
    "nn.LayerNorm": replaced("ln_1", lambda old: nn.LayerNorm(32)),
    "nn.RMSNorm": replaced("ln_1", lambda old: nn.RMSNorm(32)),
    "ln_f = Identity": replaced("ln_f", lambda old: nn.Identity()),
    "gelu = ReLU": replaced("gelu", lambda old: nn.ReLU()),
    "gelu = tanh form": replaced("gelu", lambda old: nn.GELU(approximate="tanh")),
    "own attention": replaced("attn", lambda old: OwnLayer()),
    "own MLP": replaced("mlp", lambda old: OwnLayer()),
    "own block": _own_block,
    "no block": lambda model: setattr(model.transformer, "h", nn.ModuleList()),
    "block = Sequential": replaced("h.0", lambda old: nn.Sequential(nn.Linear(32, 32), nn.Tanh())),
    "bias on lm_head": lambda model: setattr(
        model.lm_head, "bias", nn.Parameter(torch.linspace(-9.0, 9.0, 48))
    ),
    "head untied": lambda model: setattr(
        model.lm_head, "weight", nn.Parameter(1.5 * model.lm_head.weight.detach())
    ),
    "vocabulary grown": _grow,
}


def changed(change: Change, ops: Any = torch_ops) -> tuple[Any, Any]:
    """Our model and the plain one with equal weights, after the change."""
    torch.manual_seed(1)
    ours, plain = GPT(CONFIG, ops=ops), PlainGPT(CONFIG)
    for p in ours.parameters():  # nontrivial biases and norms
        p.data += 0.1 * torch.randn_like(p)
    plain.load_state_dict(ours.state_dict())
    for model in (ours, plain):
        change(model)
    return ours, plain


def tokens() -> tuple[Tensor, Tensor]:
    idx = torch.randint(48, (2, 12))
    return idx, idx.roll(-1, 1)


def assert_same_gradients(ours: Any, plain: Any, idx: Tensor, targets: Tensor) -> None:
    loss, expected = (model(idx, targets)[1] for model in (ours, plain))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        grad = gradients[name]
        assert (p.grad is None) == (grad is None) == (not p.requires_grad), name
        if grad is not None:
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("change", list(CHANGES.values()), ids=list(CHANGES))
def test_the_numbers_are_those_of_the_module_tree(change: Change) -> None:
    ours, plain = changed(change)
    idx, targets = tokens()
    assert_same_gradients(ours, plain, idx, targets)
    for model in (ours, plain):
        model.eval()
    torch.testing.assert_close(ours(idx, targets)[0], plain(idx, targets)[0])
    prompt = expected = idx[:, :3]
    for _ in range(6):
        logits = plain(expected, expected)[0][:, -1]
        expected = torch.cat((expected, logits.argmax(1, keepdim=True)), 1)
    assert torch.equal(ours.generate(prompt, 6, temperature=0.0), expected)


@pytest.mark.parametrize(
    "name", ["LoRA subclass c_attn", "hook on ln_2", "hook on gelu", "nn.RMSNorm", "own MLP"]
)
def test_the_kernels_serve_what_is_left_plain(name: str, device: str) -> None:
    ours, plain = (model.to(device) for model in changed(CHANGES[name], fused))
    if device == "cuda":
        pytest.skip("the plain model masks on the CPU")
    idx, targets = tokens()
    torch.testing.assert_close(ours(idx, targets)[1], plain(idx, targets)[1])


@pytest.mark.parametrize("ops", [fused, torch_ops], ids=["fused", "torch_ops"])
@pytest.mark.parametrize("name", ["wte", "wpe", "c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"])
def test_a_layer_in_another_dtype(name: str, ops: Any) -> None:
    """Under autocast, as where the base of an adapter is held in bfloat16."""
    ours, plain = changed(replaced(name, lambda old: old.bfloat16()), ops)
    idx, targets = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = (model(idx, targets)[1] for model in (ours, plain))
    torch.testing.assert_close(loss, expected, rtol=0.0, atol=0.01)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in ours.parameters())


def test_ids_of_a_vocabulary_that_grew() -> None:
    ours, _ = changed(_grow)
    assert ours.generate(torch.tensor([[52]]), 1).shape == (1, 2)
    with pytest.raises(ValueError, match="from 0 to 52 .vocab_size 53., got 53"):
        ours.generate(torch.tensor([[53]]), 1)


def test_hooks_fire_as_often_as_in_the_plain_model() -> None:
    def fired(model: Any) -> list[str]:
        names: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, args, out, name=name: names.append(name))
        model(*tokens())
        return names

    ours, plain = map(fired, changed(lambda model: None))
    assert ours == plain and len(ours) == 1 + 5 + 2 * 12


def test_layers_are_called_as_in_nanogpt() -> None:
    ours, plain = changed(lambda model: None)
    x = torch.randn(2, 5, 32)
    for path in ("h.0", "h.0.attn", "h.1.mlp", "h.1.ln_1", "ln_f"):
        expected = plain.transformer.get_submodule(path)(x)
        torch.testing.assert_close(ours.transformer.get_submodule(path)(x), expected)
    assert type(ours.transformer.h[0]) is fastgpt.Block
    assert type(ours.transformer.h[0].attn) is fastgpt.CausalSelfAttention
    assert type(ours.transformer.h[0].mlp) is fastgpt.MLP
    assert type(ours.transformer.ln_f) is fastgpt.LayerNorm


def test_dropout_of_a_hooked_block() -> None:
    """Dropout is active in training only."""
    config = GPTConfig(16, 48, 1, 2, 32, dropout=0.5)
    model = GPT(config)
    model.transformer.h[0].register_forward_hook(lambda m, args, out: None)
    idx, targets = tokens()
    losses = {model(idx, targets)[1].item() for _ in range(4)}
    assert len(losses) == 4
    model.eval()
    assert torch.equal(model(idx, targets)[0], model(idx, targets)[0])


def test_an_untied_head_stays_untied() -> None:
    model = GPT(CONFIG)
    model.lm_head.weight = nn.Parameter(1.5 * model.lm_head.weight.detach())
    saved = copy.deepcopy(model.state_dict())
    for assign in (False, True):
        model.load_state_dict(saved, assign=assign)
        assert torch.equal(model.transformer.wte.weight * 1.5, model.lm_head.weight)
    fresh = GPT(CONFIG)
    fresh.load_state_dict(copy.deepcopy(GPT(CONFIG).state_dict()), assign=True)
    assert fresh.transformer.wte.weight is fresh.lm_head.weight


@pytest.mark.filterwarnings("ignore")  # deprecated but still used
def test_quantised_layers_are_called() -> None:
    model = GPT(CONFIG).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    idx, targets = tokens()
    logits, exact = quantised(idx, targets)[0], model(idx, targets)[0]
    assert not torch.equal(logits, exact)
    torch.testing.assert_close(logits, exact, atol=0.1, rtol=0.1)


def test_options_that_a_custom_layer_does_not_support_are_rejected() -> None:
    model = GPT(CONFIG, eot_token=0)
    replaced("attn", lambda old: OwnLayer())(model)
    with pytest.raises(ValueError, match="eot_token must be None with a custom block or attention"):
        model(*tokens())
    model = GPT(CONFIG, fp8="head")
    model.lm_head = LoRAWrapper(model.lm_head)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="fp8 must be 'none' if lm_head is custom or has a bias"):
        model(*tokens())
