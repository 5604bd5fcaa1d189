"""The drop-in contract of ``fastgpt.GPT``: what code written for nanoGPT relies on."""

import dataclasses
import hashlib
import importlib
import inspect
import math
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.kernels import reference, torch_ops
from fastgpt.model import MLP, Block, CausalSelfAttention, LayerNorm
from tests.tools.small_models import BLOCK, V, model_with, small_config, small_model, tokens

# -- the package


def test_the_version_of_an_installation_and_of_a_clone(monkeypatch):
    def version(name: str) -> str:
        assert name == "fastgpt-triton"
        if not found:
            raise metadata.PackageNotFoundError(name)
        return found.pop()

    found = ["1.2"]
    monkeypatch.setattr(metadata, "version", version)
    try:
        assert importlib.reload(fastgpt).__version__ == "1.2"
        assert importlib.reload(fastgpt).__version__ == "0+unknown"
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


# -- structure


def expected_state_dict(config: GPTConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in nanoGPT's checkpoints, in order."""
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


@pytest.mark.parametrize(
    "method, names",
    [
        ("get_num_params", "non_embedding"),
        ("crop_block_size", "block_size"),
        ("from_pretrained", "model_type override_args"),
        ("configure_optimizers", "weight_decay learning_rate betas device_type"),
        ("estimate_mfu", "fwdbwd_per_iter dt"),
        ("generate", "idx max_new_tokens temperature top_k"),
    ],
)
def test_method_signatures(method, names):
    assert list(inspect.signature(getattr(small_model(), method)).parameters) == names.split()
    assert list(inspect.signature(GPT.forward).parameters)[1:3] == ["idx", "targets"]


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
    """Bit for bit if the CPU has vector instructions (AVX2): without them PyTorch's normal
    random numbers differ in the last bit."""
    torch.manual_seed(1337)
    model = GPT(GPTConfig(64, 65, 2, 2, 32, dropout=0.0, bias=False))
    assert torch.randint(1000, (3,)).tolist() == [172, 573, 110]
    for table, last, digest in (
        (model.transformer.wte, [-0.0291338395, -0.0236783624, -0.0041135498], "158a55ef019f"),
        (model.transformer.wpe, [0.0110878581, 0.0107081039, 0.0032552560], "7879d8efb54a"),
    ):
        weight = table.weight.detach()
        assert weight[-1, -3:].tolist() == pytest.approx(last, rel=1e-6)
        if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
            assert hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:12] == digest


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


# -- forward


def test_forward_returns_by_mode():
    model, x = small_model(), tokens()
    logits, loss = model(x, x)
    assert logits is None and loss.shape == ()
    full, same_loss = model(x, x, return_logits=True)
    assert full.shape == (3, BLOCK, V)
    torch.testing.assert_close(loss, same_loss)  # two orders of the same sum
    last, none = model(x)
    assert last.shape == (3, 1, V) and none is None
    torch.testing.assert_close(last, full[:, -1:])
    with torch.no_grad():
        assert torch.equal(model(x, x)[0], full)  # as in nanoGPT's evaluation
    assert torch.equal(model.eval()(x, x)[0], full)


def test_no_rows(ops):
    """Like nanoGPT's model: empty logits, the mean of nothing (NaN), zero gradients."""
    model, x = model_with(ops, small_config(n_head=1, n_embd=24, dropout=0.1)), tokens(0)
    assert model(x)[0].shape == (0, 1, V)
    logits, loss = model(x, x, return_logits=True)
    assert logits.shape == (0, BLOCK, V) and loss.isnan()
    loss.backward()
    assert not any(p.grad.any() for p in model.parameters())
    assert model.eval().generate(x[:, :3], 4).shape == (0, 7)


def test_loss_is_mean_cross_entropy_without_ignored_targets():
    model, x, y = small_model(), tokens(), tokens(seed=2)
    y[:, ::3] = -1
    logits, loss = model(x, y, return_logits=True)
    log_probs = logits.double().log_softmax(-1)
    expected = -log_probs.gather(2, y.clamp(min=0)[..., None])[..., 0][y >= 0].mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


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


@pytest.mark.parametrize("place", ["embedding", "probabilities", "projection", "mlp"])
def test_each_dropout_acts_alone(place):
    model, x = small_model(n_layer=1), tokens()
    without = model(x, x)[1]
    block = model.transformer.h[0]
    if place == "probabilities":
        block.attn.dropout = 0.5
    else:
        module = {
            "embedding": model.transformer.drop,
            "projection": block.attn.resid_dropout,
            "mlp": block.mlp.dropout,
        }[place]
        module.p = 0.5
    assert not torch.equal(model(x, x)[1], without)


def test_dropout_draws_in_the_order_of_the_plain_model():
    """Embedding, then in each layer probabilities, projection, MLP."""
    losses = []
    for ops in (reference, torch_ops):
        torch.manual_seed(0)
        model = GPT(small_config(dropout=0.3), ops=ops)
        losses.append(model(tokens(), tokens())[1])
        losses.append(torch.rand(1)[0])  # equal if as many random numbers were used
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
        with pytest.raises(ValueError, match=f"block_size must .* current 6, got {refused}"):
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


@pytest.mark.parametrize(("device", "fused"), [("cpu", True), ("mps", None), ("cuda", True)])
def test_where_the_optimizer_is_fused(device, fused):
    optimizer = small_model().configure_optimizers(0.1, 3e-4, (0.9, 0.95), device)
    assert optimizer.defaults["fused"] is fused


def test_estimate_mfu():
    model = small_model()
    flops_per_token = 6 * model.get_num_params() + 12 * 2 * 2 * 16 * BLOCK
    expected = flops_per_token * BLOCK * 40 / 0.25 / 312e12
    assert model.estimate_mfu(40, 0.25) == pytest.approx(expected, rel=1e-12)
