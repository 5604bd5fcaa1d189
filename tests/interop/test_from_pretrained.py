"""``GPT.from_pretrained`` against transformers' own model, with few layers and no network."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig
from fastgpt.interop import huggingface
from fastgpt.model import PRETRAINED_SHAPES

safetensors_torch = pytest.importorskip("safetensors.torch", reason="needs the extra hf")
transformers = pytest.importorskip("transformers", reason="needs the extra hf")


def theirs(**changes: Any) -> Any:
    """transformers' GPT-2 with random weights, including biases and gains."""
    keys = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 48, "vocab_size": 300}
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**keys, **changes}))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    theirs().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def ids(vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_same_logits(model: GPT, published: Any) -> None:
    x = ids(model.config.vocab_size)
    logits, _ = model.eval()(x, x)
    expected = published(x).logits
    assert expected.std() > 0.5  # not all near zero
    assert logits is not None and (logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
def test_published_shapes_have_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    """The smallest and the largest width, one layer; the full vocabulary only for the former."""
    _, n_head, n_embd = PRETRAINED_SHAPES[name]
    vocab_size = 50257 if name == "gpt2" else 1000
    gelu = "gelu" if name == "gpt2" else "gelu_new"
    published = theirs(
        n_layer=1, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size, activation_function=gelu
    )
    published.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    assert model.gelu_approximate == ("none" if name == "gpt2" else "tanh")
    assert model.config == GPTConfig(48, vocab_size, 1, n_head, n_embd, dropout=0.0, bias=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_same_logits(model, published)


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "openai-community/gpt2",
        "openai-community/gpt2-xl",
        "distilgpt2",
        "distilbert/distilgpt2",
    ],
)
def test_a_name_is_looked_up_on_the_hub(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published files name weights without ``transformer.`` and contain masks."""
    path = folder / "model.safetensors"
    state = {
        name.removeprefix("transformer."): tensor
        for name, tensor in safetensors_torch.load_file(path).items()
    }
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 48, 48).tril() for i in range(2)}
    safetensors_torch.save_file(state | masks, path)
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    model = GPT.from_pretrained(name, {"dropout": 0.1})
    assert asked == [(name, ["config.json", "model.safetensors"])]
    assert model.config.dropout == 0.1 and model.transformer.drop.p == 0.1
    assert model.gelu_approximate == "tanh"
    assert_same_logits(model, theirs())


def test_a_subclass_that_takes_the_config_alone(folder: Path) -> None:
    class Own(GPT):
        def __init__(self, config: Any) -> None:
            super().__init__(config)

    model = Own.from_pretrained(folder)
    assert type(model) is Own and model.gelu_approximate == "tanh"
    assert_same_logits(model, theirs())


def test_a_folder_named_like_a_published_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openai-community").mkdir()
    folder.rename(tmp_path / "openai-community" / "gpt2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface, "download", lambda name: pytest.fail(f"{name} is here"))
    assert_same_logits(GPT.from_pretrained("openai-community/gpt2"), theirs())
    for owner in ("distilbert", "someone", ""):  # "": a path in the root of the file system
        with pytest.raises(FileNotFoundError, match=f"no folder or file {owner}/gpt2"):
            GPT.from_pretrained(f"{owner}/gpt2")


def test_a_name_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ConnectionError, match=r"'gpt2-xl' .* \(Name or service not known\); from_"):
        GPT.from_pretrained("gpt2-xl")


def sharded(folder: Path) -> None:
    theirs().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def pickled(folder: Path) -> None:
    torch.save(theirs().state_dict(), folder / "pytorch_model.bin")


def of_half_precision(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = {name: tensor.bfloat16() for name, tensor in theirs().state_dict().items()}
    state.pop("lm_head.weight")
    safetensors_torch.save_file(state, path)


@pytest.mark.parametrize("form", [sharded, pickled, of_half_precision])
def test_the_forms_of_a_folder(form: Callable[[Path], None], folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    form(folder)
    model = GPT.from_pretrained(str(folder))
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    published = theirs()
    if form is of_half_precision:
        published = published.bfloat16().float()
    assert_same_logits(model, published)


def test_a_safetensors_file_takes_the_config_beside_it(folder: Path) -> None:
    path = folder / "other.safetensors"
    (folder / "model.safetensors").rename(path)
    assert_same_logits(GPT.from_pretrained(path), theirs())
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*config.json"):
        GPT.from_pretrained(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type must be 'gpt2', got 'llama'"),
        ({"activation_function": "relu"}, "activation_function must be one of gelu, .*got 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon must be 1e-05, got 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx must be False, got True"),
        ({"n_inner": 100}, "n_inner must be null or 4 [*] n_embd, got 100"),
        ({"n_head": 5}, "n_embd must be a multiple of n_head"),
        ({"n_layer": "two"}, "n_layer must be an int of at least 1, got 'two'"),
        ({"n_layer": 3}, r"does not hold the weights .*\s+Missing key"),
        ({"vocab_size": 400}, r"does not hold the weights .*\s+size mismatch"),
    ],
)
def test_another_model_is_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=f"saved (holds no model .*)?{message}"):
        GPT.from_pretrained(str(folder))


def test_a_head_of_its_own_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = safetensors_torch.load_file(path)
    safetensors_torch.save_file({**state, "lm_head.weight": torch.zeros(300, 32)}, path)
    with pytest.raises(ValueError, match="lm_head.weight must equal transformer.wte.weight"):
        GPT.from_pretrained(str(folder))


def test_damaged_and_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors is not a safetensors file"):
        GPT.from_pretrained(str(folder))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="has none of the files model.safetensors, "):
        GPT.from_pretrained(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ValueError, match="pytorch_model.bin is not a checkpoint .* damaged"):
        GPT.from_pretrained(str(folder))
    torch.save({"a": argparse.Namespace(b=1)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin holds objects of argparse.Namespace, "):
        GPT.from_pretrained(str(folder))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "absent"}}')
    with pytest.raises(FileNotFoundError, match="there is no .*absent"):
        GPT.from_pretrained(str(folder))
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="it lacks 'weight_map'"):
        GPT.from_pretrained(str(folder))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(ValueError, match="weight_map must be a JSON object, got list"):
        GPT.from_pretrained(str(folder))
    for text, message in (("{", "is not JSON"), ("[]", "must hold a JSON object, got list")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json {message}"):
            GPT.from_pretrained(str(folder))
    for absent in (tmp_path / "absent", tmp_path / "absent.safetensors"):
        with pytest.raises(FileNotFoundError, match="there is no folder or file .*absent"):
            GPT.from_pretrained(str(absent))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (["a"], "must hold tensors by name, got list"),
        ({"wte.weight": 3}, "must hold tensors by name, got dict"),
        ({"h.0.attn.c_attn.weight": torch.zeros(2, 3, 4)}, r"c_attn.weight must be a matrix.*2, 3"),
    ],
)
def test_a_pickle_of_something_else(contents: Any, message: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(contents, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(str(folder))


def test_what_from_pretrained_refuses() -> None:
    with pytest.raises(ValueError, match="model_type must be one of gpt2, .*got 'gpt3'"):
        GPT.from_pretrained("gpt3")
    with pytest.raises(ValueError, match="override_args may only .* got block_size"):
        GPT.from_pretrained("gpt2", {"dropout": 0.0, "block_size": 64})
    with pytest.raises(TypeError, match="expected str, bytes or os.PathLike object, not int"):
        GPT.from_pretrained(2)  # type: ignore[arg-type]


# -- our own files


@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_what_we_write_has_the_same_logits_there_and_back(
    bias: bool, gelu: str, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    model = GPT(GPTConfig(48, 300, 2, 2, 32, dropout=0.1, bias=bias), gelu=gelu)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    weights = huggingface.Weights(model.config, gelu, model.state_dict())
    huggingface.write(weights, tmp_path)
    published = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    published.eval()
    assert type(published).__name__ == "GPT2LMHeadModel"
    assert published.config.resid_pdrop == 0.1
    assert published.lm_head.weight is published.transformer.wte.weight
    assert_same_logits(model, published)

    again = GPT.from_pretrained(str(tmp_path), {"dropout": 0.1})
    assert again.config == GPTConfig(48, 300, 2, 2, 32, dropout=0.1, bias=True)
    assert_same_logits(again, published)

    huggingface.write_safetensors(weights, tmp_path / "ours.safetensors")
    shutil.copy(tmp_path / "ours.safetensors", tmp_path / "alone.safetensors")
    ours = GPT.from_pretrained(str(tmp_path / "alone.safetensors"), {"dropout": 0.1})
    assert ours.config == model.config and ours.gelu_approximate == gelu
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


def test_a_disk_that_refuses_is_an_os_error(tmp_path: Path) -> None:
    """safetensors raises its own error type."""
    model = GPT(GPTConfig(8, 16, 1, 1, 8))
    weights = huggingface.Weights(model.config, "none", model.state_dict())
    with pytest.raises(OSError, match="cannot be written: .*directory"):
        huggingface.write_safetensors(weights, tmp_path)


def test_a_safetensors_file_of_ours_with_wrong_contents(tmp_path: Path) -> None:
    path = tmp_path / "ours.safetensors"
    for header in ("{", "{}", '{"config": {"colour": 1}, "gelu": "none"}'):
        safetensors_torch.save_file({"a": torch.ones(1)}, path, {"fastgpt": header})
        with pytest.raises(ValueError, match="ours.safetensors holds no model that fastgpt can"):
            GPT.from_pretrained(str(path))
