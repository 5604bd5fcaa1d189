"""``GPT.from_pretrained``: no network, small shapes, transformers' own model as the truth."""

import sys

import pytest
import torch

import fastgpt
from fastgpt import GPT, GPTConfig


@pytest.fixture
def published(monkeypatch):
    """A random Hugging Face GPT-2 that ``from_pretrained("gpt2")`` will find."""
    import transformers

    monkeypatch.setitem(fastgpt.model.PRETRAINED_SHAPES, "gpt2", (2, 2, 32))
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
    assert fastgpt.model.PRETRAINED_SHAPES == {
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
