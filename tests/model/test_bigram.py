"""The bigram table: ``GPT``'s interface, and the loss by its definition."""

import math

import pytest
import torch

from fastgpt import Bigram, GPTConfig
from tests.tools.small_models import V, small_config, tokens


@pytest.fixture
def model() -> Bigram:
    torch.manual_seed(0)
    return Bigram(small_config())


def test_parameters_and_config(model):
    assert [(name, tuple(t.shape)) for name, t in model.state_dict().items()] == [
        ("table.weight", (V, V))
    ]
    assert model.config == small_config()
    assert model.get_num_params() == model.get_num_params(non_embedding=False) == V * V


def test_logits_are_rows_of_the_table(model):
    x = tokens()
    logits, loss = model(x, x, return_logits=True)
    assert loss.item() == pytest.approx(math.log(V), abs=0.01)  # nearly uniform at first
    assert torch.equal(logits, model.table.weight[x])
    assert torch.equal(model(x)[0], model.table.weight[x[:, -1:]])
    assert model(x, x)[0] is None
    assert torch.equal(model.eval()(x, x)[0], logits)


def test_loss_and_gradient_are_those_of_the_table(model):
    x, y = tokens(), tokens(seed=2)
    y[0] = -1
    loss = model(x, y)[1]
    loss.backward()
    kept = y != -1
    log_probs = model.table.weight.detach().double().log_softmax(1)
    assert loss.item() == pytest.approx(-log_probs[x[kept], y[kept]].mean().item(), abs=1e-6)
    expected = torch.zeros(V, V, dtype=torch.float64)
    for i, j in zip(x[kept], y[kept], strict=True):  # softmax minus one-hot, averaged
        expected[i] += log_probs[i].exp() / kept.sum()
        expected[i, j] -= 1 / kept.sum()
    torch.testing.assert_close(model.table.weight.grad.double(), expected, atol=1e-7, rtol=0)


def test_training_reaches_the_bigram_entropy():
    """Token t is followed by 3t + 1 or 3t + 2 (mod V) with equal probability: entropy ln 2."""
    torch.manual_seed(0)
    model = Bigram(small_config(block_size=64))
    optimizer = model.configure_optimizers(0.0, 0.3, (0.9, 0.99), "cpu")
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    for _ in range(100):
        x = torch.randint(V, (32, 64))
        y = (3 * x + torch.randint(1, 3, x.shape)) % V
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(loss.item() - math.log(2)) < 0.02
    path = model.generate(torch.zeros(4, 1, dtype=torch.int64), 50, top_k=2)
    assert (((path[:, 1:] - 3 * path[:, :-1]) % V - 1) <= 1).all()


def test_compiles_and_runs_in_bfloat16(model):
    x = tokens()
    expected = model(x, x)[1]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x)[1], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, x)[1].item() == pytest.approx(expected.item(), abs=0.01)
    loss = Bigram(GPTConfig(16, V)).bfloat16()(x, x)[1]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log(V), abs=0.02)
