"""The drop-in contract of ``fastgpt.GPT``: what code written for nanoGPT relies on."""

import copy
import dataclasses
import hashlib
import importlib
import inspect
import io
import math
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.kernels import portable, reference
from fastgpt.model import MLP, Block, CausalSelfAttention, LayerNorm

V, BLOCK = 65, 16


def small_config(**changes) -> GPTConfig:
    sizes = dict(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=2, n_embd=32)
    return GPTConfig(**{**sizes, **changes})


def small_model(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(small_config(**changes))


def tokens(batch: int = 3, length: int = BLOCK, seed: int = 1) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


# -- the package


def test_import_is_light_and_a_clone_has_a_version():
    code = """
import importlib.metadata as metadata, sys
found = metadata.version
def version(name):
    if name == "fastgpt-triton":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
import fastgpt
heavy = {"triton", "matplotlib", "transformers", "fastgpt.kernels.fused"} & set(sys.modules)
print(fastgpt.__version__, sorted(heavy))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split("\n") == ["0+unknown []", ""], run.stderr


def test_version_of_an_installation(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"1.2 of {name}")
    try:
        assert importlib.reload(fastgpt).__version__ == "1.2 of fastgpt-triton"
    finally:
        monkeypatch.undo()
        importlib.reload(fastgpt)


def test_the_library_prints_nothing(capfd):
    model = small_model()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    model(tokens(), tokens())[1].backward()
    optimizer.step()
    model.crop_block_size(8)
    model.generate(tokens(1, 1), 2)
    assert capfd.readouterr() == ("", "")


# -- config


def test_config_has_nanogpts_seven_fields_in_order():
    assert dataclasses.asdict(GPTConfig()) == {
        "block_size": 1024,
        "vocab_size": 50304,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "dropout": 0.0,
        "bias": True,
    }
    assert GPTConfig(1, 2, 3, 4, 8, 0.5, False) == GPTConfig(
        block_size=1, vocab_size=2, n_layer=3, n_head=4, n_embd=8, dropout=0.5, bias=False
    )


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        *((name, 0, ValueError) for name in ("block_size", "vocab_size", "n_layer", "n_head")),
        ("n_embd", -4, ValueError),
        ("n_embd", 33, ValueError),
        ("dropout", 1.0, ValueError),
        ("dropout", -0.1, ValueError),
        ("dropout", math.nan, ValueError),
        ("vocab_size", None, TypeError),
        ("n_embd", 32.0, TypeError),
    ],
)
def test_config_refuses(field, value, error):
    with pytest.raises(error, match=rf"{field} must .*{value}"):
        small_config(**{field: value})


def test_an_odd_head_size_is_legal():
    logits, _ = small_model(n_head=2, n_embd=50)(tokens())
    assert logits.shape == (3, 1, V)


# -- structure


def expected_state_dict(config: GPTConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes as nanoGPT's checkpoints have them, in order."""
    width, items = config.n_embd, []

    def add(name: str, *shape: int, bias: bool) -> None:
        items.append((f"{name}.weight", shape))
        if bias:
            items.append((f"{name}.bias", shape[:1]))

    add("transformer.wte", config.vocab_size, width, bias=False)
    add("transformer.wpe", config.block_size, width, bias=False)
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        add(f"{block}.ln_1", width, bias=config.bias)
        add(f"{block}.attn.c_attn", 3 * width, width, bias=config.bias)
        add(f"{block}.attn.c_proj", width, width, bias=config.bias)
        add(f"{block}.ln_2", width, bias=config.bias)
        add(f"{block}.mlp.c_fc", 4 * width, width, bias=config.bias)
        add(f"{block}.mlp.c_proj", width, 4 * width, bias=config.bias)
    add("transformer.ln_f", width, bias=config.bias)
    add("lm_head", config.vocab_size, width, bias=False)
    return items


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_names_order_and_shapes(bias):
    config = small_config(bias=bias)
    state = GPT(config).state_dict()
    assert [(name, tuple(t.shape)) for name, t in state.items()] == expected_state_dict(config)
    assert list(GPT(config).buffers()) == []


def test_module_attributes():
    model = small_model(dropout=0.25, bias=False)
    block = model.transformer.h[0]
    assert isinstance(block, Block) and model.transformer["h"][0] is block
    assert isinstance(block.attn, CausalSelfAttention) and isinstance(block.mlp, MLP)
    assert (block.attn.n_head, block.attn.n_embd, block.attn.dropout) == (2, 32, 0.25)
    for dropout in (
        model.transformer.drop,
        block.attn.attn_dropout,
        block.attn.resid_dropout,
        block.mlp.dropout,
    ):
        assert isinstance(dropout, nn.Dropout) and dropout.p == 0.25
    assert isinstance(block.ln_1, LayerNorm) and block.ln_1.bias is None
    assert block.mlp.gelu(torch.ones(1)).item() == pytest.approx(0.8413447, abs=1e-6)


def test_submodules_stand_alone():
    config, x = small_config(), torch.randn(2, 5, 32)
    for module in (LayerNorm(32, bias=True), CausalSelfAttention(config), MLP(config)):
        assert module(x).shape == x.shape
    assert Block(config)(x).shape == x.shape


def test_method_signatures():
    def names(function) -> list[str]:
        return list(inspect.signature(function).parameters)[1:]

    assert names(GPT.forward)[:2] == ["idx", "targets"]
    assert names(GPT.get_num_params) == ["non_embedding"]
    assert names(GPT.crop_block_size) == ["block_size"]
    assert list(inspect.signature(GPT.from_pretrained).parameters) == [
        "model_type",
        "override_args",
    ]
    assert names(GPT.configure_optimizers) == [
        "weight_decay",
        "learning_rate",
        "betas",
        "device_type",
    ]
    assert names(GPT.estimate_mfu) == ["fwdbwd_per_iter", "dt"]
    assert names(GPT.generate) == ["idx", "max_new_tokens", "temperature", "top_k"]


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (GPTConfig(bias=False), 123.59),
        (GPTConfig(bias=True), 123.69),
        (GPTConfig(vocab_size=50257), 123.65),
        (GPTConfig(256, 65, 6, 6, 384, 0.2, False), 10.65),
    ],
)
def test_parameter_counts(config, millions):
    with torch.device("meta"):
        model = GPT(config)
    assert round(model.get_num_params() / 1e6, 2) == millions
    positions = config.block_size * config.n_embd
    assert model.get_num_params(non_embedding=False) == model.get_num_params() + positions


# -- initialisation


def test_golden_initialisation():
    torch.manual_seed(1337)
    model = GPT(GPTConfig(64, 65, 2, 2, 32, dropout=0.0, bias=False))

    def digest(tensor: Tensor) -> str:
        return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()[:12]

    assert digest(model.transformer.wte.weight) == "158a55ef019f"
    assert digest(model.transformer.wpe.weight) == "7879d8efb54a"
    assert torch.randint(1000, (3,)).tolist() == [172, 573, 110]


def test_initial_distribution():
    model = small_model(n_embd=256, n_layer=3)
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            assert not param.any()
        elif param.dim() == 1:
            assert (param == 1).all()
        else:
            std = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
            assert param.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(param.mean().item()) < 0.05 * std, name


# -- tied weights, copies, loading


def copied(model: GPT) -> GPT:
    return copy.deepcopy(model)


def pickled(model: GPT) -> GPT:
    return pickle.loads(pickle.dumps(model))


def saved(model: GPT) -> GPT:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(model: GPT) -> GPT:
    other = GPT(model.config)
    other.load_state_dict(model.state_dict())
    return other


def assigned(model: GPT) -> GPT:
    with torch.device("meta"):
        other = GPT(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other


@pytest.mark.parametrize("way", [copied, pickled, saved, loaded, assigned, GPT.float, GPT.cpu])
def test_a_copy_keeps_weights_and_tie(way):
    model = small_model()
    before = model(tokens())[0]
    other = way(model)
    assert other.transformer.wte.weight is other.lm_head.weight
    assert torch.equal(other(tokens())[0], before)
    assert other.gelu_approximate == "none"
    other(tokens(), tokens())[1].backward()


def test_head_and_token_table_share_gradients():
    model = small_model()
    assert model.lm_head.weight is model.transformer.wte.weight
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))[1].backward()
    assert model.lm_head.weight.grad[V - 1].any()  # row 64 was never an input: the head's part


def test_loads_what_a_compiled_model_saved():
    model = small_model()
    state = torch.compile(model).state_dict()
    assert all(name.startswith("_orig_mod.") for name in state)
    other = small_model(seed=5)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(other(tokens())[0], model(tokens())[0])


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_loads_old_files_with_masks(prefix):
    model = small_model(bias=True)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    for i in range(2):
        state[f"{prefix}transformer.h.{i}.attn.bias"] = torch.ones(1, 1, BLOCK, BLOCK).tril()
        state[f"{prefix}transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    names = list(state)
    other = small_model(seed=5, bias=True)
    other.load_state_dict(state)
    assert list(state) == names  # the caller's dict is left alone
    assert torch.equal(other(tokens())[0], model(tokens())[0])


def test_loading_refuses_missing_unknown_and_misshapen():
    state = small_model().state_dict()
    with pytest.raises(RuntimeError, match="Missing key.*ln_f.weight"):
        small_model().load_state_dict({k: v for k, v in state.items() if "ln_f.weight" not in k})
    with pytest.raises(RuntimeError, match="Unexpected key.*stranger"):
        small_model().load_state_dict({**state, "stranger": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch for transformer.wpe.weight"):
        small_model(block_size=8).load_state_dict(state)


# -- forward


def test_forward_returns_by_mode():
    model, x = small_model(), tokens()
    logits, loss = model(x, x)
    assert logits is None and loss.shape == ()
    full, same_loss = model(x, x, return_logits=True)
    assert full.shape == (3, BLOCK, V) and torch.equal(loss, same_loss)
    last, none = model(x)
    assert last.shape == (3, 1, V) and none is None
    torch.testing.assert_close(last, full[:, -1:])
    with torch.no_grad():
        assert torch.equal(model(x, x)[0], full)  # as nanoGPT's evaluation sees it
    assert torch.equal(model.eval()(x, x)[0], full)


def test_loss_is_mean_cross_entropy_without_ignored_targets():
    model, x, y = small_model(), tokens(), tokens(seed=2)
    y[:, ::3] = -1
    logits, loss = model(x, y, return_logits=True)
    log_probs = logits.double().log_softmax(-1)
    expected = -log_probs.gather(2, y.clamp(min=0)[..., None])[..., 0][y >= 0].mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_all_targets_ignored_gives_nan():
    assert small_model()(tokens(), torch.full((3, BLOCK), -1))[1].isnan()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_types_and_strides(dtype):
    model, x, y = small_model(), tokens(), tokens(seed=2)
    loss = model(x, y)[1]
    assert torch.equal(model(x.to(dtype), y.to(dtype))[1], loss)
    assert torch.equal(model(x.T.contiguous().T.to(dtype), y.T.contiguous().T.to(dtype))[1], loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameter_dtypes(dtype):
    expected = small_model()(tokens(), tokens())[1]
    model = small_model().to(dtype)
    logits, loss = model(tokens(), tokens(), return_logits=True)
    assert logits.dtype == dtype and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(expected.item(), abs=0.02)
    loss.backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


def test_length_over_block_size_is_nanogpts_error():
    with pytest.raises(AssertionError) as caught:
        small_model()(tokens(1, BLOCK + 1))
    assert str(caught.value) == "Cannot forward sequence of length 17, block size is only 16"


@pytest.mark.parametrize(
    ("idx", "targets", "error", "message"),
    [
        (tokens(2, 0), None, ValueError, r"idx must have shape \(B, T\).*got \(2, 0\)"),
        (tokens()[0], None, ValueError, r"idx must have shape \(B, T\).*got \(16,\)"),
        (tokens().float(), None, TypeError, r"idx must be torch.int64 .*got torch.float32"),
        (tokens().short(), None, TypeError, r"idx must be torch.int64 .*got torch.int16"),
        ([[1, 2]], None, TypeError, r"idx must be a torch.Tensor, got list"),
        (tokens().to("meta"), None, ValueError, r"idx must be on .*\(cpu\), got meta"),
        (tokens(), tokens().float(), TypeError, r"targets must be torch.int64 .*float32"),
        (tokens(), tokens()[:, 1:], ValueError, r"targets must .*\(3, 16\), got \(3, 15\)"),
        (tokens(), tokens().to("meta"), ValueError, r"targets must be on .*\(cpu\), got meta"),
    ],
)
def test_forward_refuses(idx, targets, error, message):
    with pytest.raises(error, match=message):
        small_model()(idx, targets)


def test_dropout_acts_in_training_only_and_follows_the_seed():
    model, x = small_model(dropout=0.3), tokens()

    def loss(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(x, x)[1]

    assert torch.equal(loss(1), loss(1)) and not torch.equal(loss(1), loss(2))
    model.eval()
    assert torch.equal(loss(1), loss(2))


def test_dropout_draws_in_the_order_of_the_plain_model():
    """Embedding, then per layer probabilities, projection, MLP: each mask at its place."""
    losses = []
    for ops in (reference, portable):
        torch.manual_seed(0)
        model = GPT(small_config(dropout=0.3), ops=ops)
        losses.append(model(tokens(), tokens())[1])
        losses.append(torch.rand(1)[0])  # as many random numbers used
    assert abs(losses[0] - losses[2]) <= 1e-5 and losses[1] == losses[3]


def test_gelu_choice():
    x = torch.linspace(-4, 4, 64)
    for form in ("none", "tanh"):
        model = GPT(small_config(), gelu=form)
        assert model.gelu_approximate == form
        assert torch.equal(model.transformer.h[1].mlp.gelu(x), F.gelu(x, approximate=form))
    with pytest.raises(ValueError, match="gelu must be 'none' or 'tanh', got 'erf'"):
        GPT(small_config(), gelu="erf")


# -- crop_block_size, configure_optimizers, estimate_mfu


def test_crop_block_size():
    model, x = small_model(), tokens(2, 6)
    before = model(x)[0]
    model.crop_block_size(6)
    assert model.config.block_size == 6 == model.transformer.wpe.num_embeddings
    assert model.transformer.wpe.weight.shape == (6, 32)
    assert model.transformer.wpe.weight.untyped_storage().nbytes() == 6 * 32 * 4
    assert torch.equal(model(x)[0], before)
    model(x, x)[1].backward()
    assert model.transformer.wpe.weight.grad.shape == (6, 32)
    with pytest.raises(AssertionError, match="length 7, block size is only 6"):
        model(tokens(2, 7))
    for refused in (0, 7):
        with pytest.raises(ValueError, match=f"block_size must .* present 6, got {refused}"):
            model.crop_block_size(refused)


def test_optimizer_groups():
    model = small_model()
    model.transformer.wpe.weight.requires_grad_(False)
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), "cpu")
    assert type(optimizer) is torch.optim.AdamW
    trained = [(n, p) for n, p in model.named_parameters() if n != "transformer.wpe.weight"]
    for group, decay, keep in (
        (optimizer.param_groups[0], 0.1, lambda p: p.dim() >= 2),
        (optimizer.param_groups[1], 0.0, lambda p: p.dim() < 2),
    ):
        expected = [p for _, p in trained if keep(p)]
        assert len(group["params"]) == len(expected) > 0
        assert all(a is b for a, b in zip(group["params"], expected, strict=True))
        assert (group["weight_decay"], group["lr"]) == (decay, 3e-4)
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8)
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(("device", "fused"), [("cpu", None), ("mps", None), ("cuda", True)])
def test_optimizer_is_fused_on_cuda(device, fused):
    optimizer = small_model().configure_optimizers(0.1, 3e-4, (0.9, 0.95), device)
    assert optimizer.defaults["fused"] is fused


def test_estimate_mfu():
    model = small_model()
    flops_per_token = 6 * model.get_num_params() + 12 * 2 * 2 * 16 * BLOCK
    expected = flops_per_token * BLOCK * 40 / 0.25 / 312e12
    assert model.estimate_mfu(40, 0.25) == pytest.approx(expected, rel=1e-12)


# -- generate


def plain_generate(model, idx, max_new_tokens, temperature=1.0, top_k=None):
    """nanoGPT's sampling, step by step, by its description."""
    for _ in range(max_new_tokens):
        window = idx if idx.shape[1] <= BLOCK else idx[:, -BLOCK:]
        with torch.no_grad():
            scores = model(window)[0][:, -1, :] / temperature
        if top_k is not None:
            worst = torch.topk(scores, min(top_k, V))[0][:, [-1]]
            scores[scores < worst] = -float("inf")
        drawn = torch.multinomial(F.softmax(scores, dim=-1), num_samples=1)
        idx = torch.cat((idx, drawn), dim=1)
    return idx


def sharp_model() -> GPT:
    """Logits far apart, so that a wrong temperature or cut changes the draws."""
    model = small_model().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
def test_generate_draws_nanogpts_tokens(temperature, top_k):
    model, prompt = sharp_model(), tokens(2, 3)
    torch.manual_seed(7)
    expected = plain_generate(model, prompt, 20, temperature, top_k)  # past the window
    torch.manual_seed(7)
    assert torch.equal(model.generate(prompt, 20, temperature, top_k), expected)


def test_generate_greedy_takes_the_likeliest():
    model, prompt = sharp_model(), tokens(2, 3)
    state = torch.get_rng_state()
    greedy = model.generate(prompt, 20, temperature=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(greedy, plain_generate(model, prompt, 20, top_k=1))
    assert torch.equal(model.generate(prompt, 20, temperature=0.0, top_k=3), greedy)


def test_generate_sees_the_last_block_only():
    model = sharp_model()
    x = tokens(1, BLOCK + 5)
    y = x.clone()
    y[:, :5] = 0
    new = [model.generate(prompt, 8, temperature=0)[:, BLOCK + 5 :] for prompt in (x, y)]
    assert torch.equal(*new)


def test_generate_leaves_mode_prompt_and_gradients_alone():
    model, prompt = small_model(dropout=0.5), tokens(1, 2)
    kept = prompt.clone()
    out = model.generate(prompt, 3)
    assert model.training and torch.equal(prompt, kept) and not out.requires_grad
    assert not model.eval().generate(prompt, 3).requires_grad and not model.training
    assert torch.equal(model.generate(prompt, 0), prompt)
    assert torch.equal(model.generate(prompt.int(), 3, 0), model.generate(prompt, 3, 0))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("prompt", "arguments", "error", "message"),
    [
        (tokens(1, 0), {}, ValueError, r"idx must have shape .* T of at least 1, got \(1, 0\)"),
        (torch.tensor([[1, V]]), {}, ValueError, r"idx must .* 0 to 64 .*got 65"),
        (torch.tensor([[-1, 2]]), {}, ValueError, r"idx must .* 0 to 64 .*got -1"),
        (tokens().float(), {}, TypeError, r"idx must be torch.int64 .*float32"),
        (tokens(), {"temperature": -0.5}, ValueError, r"temperature must .*got -0.5"),
        (tokens(), {"temperature": math.nan}, ValueError, r"temperature must .*got nan"),
        (tokens(), {"top_k": 0}, ValueError, r"top_k must .*got 0"),
        (tokens(), {"top_k": -3}, ValueError, r"top_k must .*got -3"),
        (tokens(), {"max_new_tokens": -1}, ValueError, r"max_new_tokens must .*got -1"),
    ],
)
def test_generate_refuses(prompt, arguments, error, message):
    with pytest.raises(error, match=message):
        small_model().generate(prompt, **{"max_new_tokens": 1, **arguments})


# -- from_pretrained: no network, small shapes, transformers' own model as the truth


@pytest.fixture
def published(monkeypatch):
    """A random Hugging Face GPT-2 that ``from_pretrained("gpt2")`` will find."""
    import transformers

    monkeypatch.setitem(fastgpt.model._PRETRAINED_SHAPES, "gpt2", (2, 2, 32))
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)  # biases and gains too
    asked = []
    monkeypatch.setattr(
        transformers.GPT2LMHeadModel,
        "from_pretrained",
        lambda name: asked.append(name) or model.eval(),
    )
    yield model
    assert asked == ["gpt2"]


def test_from_pretrained_equals_transformers(published):
    model = GPT.from_pretrained("gpt2", {"dropout": 0.1}).eval()
    assert model.config == GPTConfig(1024, 50257, 2, 2, 32, dropout=0.1, bias=True)
    assert model.gelu_approximate == "tanh"
    assert model.lm_head.weight is model.transformer.wte.weight
    x = torch.randint(50257, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, _ = model(x, x)
        expected = published(x).logits
    assert (logits - expected).abs().max() <= 1e-4
    assert expected.std() > 0.5  # the comparison is not one of zeros


def test_from_pretrained_without_dropout(published):
    assert GPT.from_pretrained("gpt2").config.dropout == 0.0


def test_pretrained_shapes():
    assert fastgpt.model._PRETRAINED_SHAPES == {
        "gpt2": (12, 12, 768),
        "gpt2-medium": (24, 16, 1024),
        "gpt2-large": (36, 20, 1280),
        "gpt2-xl": (48, 25, 1600),
    }


def test_from_pretrained_refuses():
    with pytest.raises(ValueError, match="model_type must be one of gpt2, .*got 'gpt3'"):
        GPT.from_pretrained("gpt3")
    with pytest.raises(ValueError, match="override_args may hold 'dropout' only, got block_size"):
        GPT.from_pretrained("gpt2", {"dropout": 0.0, "block_size": 64})


def test_from_pretrained_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "fastgpt-triton\[hf\]"'):
        GPT.from_pretrained("gpt2")
