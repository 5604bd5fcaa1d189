"""``GPT``'s weights: tying, copying, saving, loading from compiled models and from old files."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastgpt import GPT
from tests.tools.small_models import BLOCK, small_model, tokens


def saved(model: GPT) -> GPT:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(model: GPT, device: str = "cpu", assign: bool = False) -> GPT:
    with torch.device(device):
        other = GPT(model.config)
    other.load_state_dict(model.state_dict(), assign=assign)
    return other


WAYS: dict[str, Callable[[GPT], GPT]] = {
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "saved": saved,
    "loaded": loaded,
    "assigned": lambda model: loaded(model, "meta", assign=True),
    "float": GPT.float,
    "cpu": GPT.cpu,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_copy_keeps_weights_and_tie(way):
    model = small_model()
    before = model(tokens())[0]
    other = way(model)
    assert other.transformer.wte.weight is other.lm_head.weight
    assert torch.equal(other(tokens())[0], before)
    assert other.gelu_approximate == "none"
    other(tokens(), tokens())[1].backward()


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
    assert list(state) == names  # the caller's dict is unchanged
    assert torch.equal(other(tokens())[0], model(tokens())[0])


def test_loads_an_attention_with_a_bias_of_its_own():
    """A parameter, or nanoGPT's mask, under the names that old files have for masks."""

    def model_of_the_users():
        model = small_model()
        model.transformer.h[0].attn = nn.Linear(32, 32)
        model.transformer.h[1].attn.register_buffer("bias", torch.ones(1, 1, BLOCK, BLOCK).tril())
        return model

    model, other = model_of_the_users(), model_of_the_users()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens())[0], model(tokens())[0])


def test_loading_refuses_missing_unknown_and_misshapen():
    state = small_model().state_dict()
    with pytest.raises(RuntimeError, match="Missing key.*ln_f.weight"):
        small_model().load_state_dict({k: v for k, v in state.items() if "ln_f.weight" not in k})
    with pytest.raises(RuntimeError, match="Unexpected key.*stranger"):
        small_model().load_state_dict({**state, "stranger": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch for transformer.wpe.weight"):
        small_model(block_size=8).load_state_dict(state)
