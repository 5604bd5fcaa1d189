"""Read and write GPT-2 in the file formats of Hugging Face's transformers and safetensors.

transformers stores the four matrices of a block transposed, as (in, out), always has biases, names
the GELU in ``config.json`` (``gelu`` is exact, ``gelu_new`` uses tanh), and omits the head, which
is tied to the token embedding. The functions here convert between that and the state dict of
``GPT``. Needs safetensors, and huggingface_hub for downloads, but not transformers.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt._files import parsed_json, reading_checkpoint
from fastgpt._optional import optional
from fastgpt.language_model import GPTConfig

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_WEIGHTS_FILES = (WEIGHTS_FILE, "model.safetensors.index.json", "pytorch_model.bin")

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_TOKEN_TABLE, _HEAD = "transformer.wte.weight", "lm_head.weight"
_GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
_METADATA = "fastgpt"  # key of our config and GELU in a safetensors header

# GPTConfig's field → name in config.json and transformers' default
_SHAPE = {
    "block_size": ("n_positions", 1024),
    "vocab_size": ("vocab_size", 50257),
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
}
# Options of transformers that change the model, and the values that ``GPT`` implements.
_FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


class Weights(NamedTuple):
    """The data of a model, for ``GPT(config, gelu=gelu).load_state_dict(state)``."""

    config: GPTConfig
    gelu: str
    state: dict[str, Tensor]


def read(source: str | Path) -> Weights:
    """Read the weights from a folder written by transformers (``config.json`` with
    ``model.safetensors``, its shards, or ``pytorch_model.bin``), a ``.safetensors`` file in such a
    folder, or one written by ``write_safetensors``. Dropout is 0.

    Raises:
        FileNotFoundError: the folder or file, or one that it needs, is missing.
        ValueError: a file is damaged, or ``GPT`` cannot represent the model.
        ImportError: safetensors is not installed.
    """
    source = Path(source)
    if source.is_dir():
        return _in_folder(source, _weights_file(source))
    if not source.is_file():
        raise FileNotFoundError(f"there is no folder or file {source}")
    header = _read_header(source)
    if _METADATA not in header:
        return _in_folder(source.parent, source)
    state = _read_tensors(source)
    try:
        saved = parsed_json(header[_METADATA])
        config, gelu = GPTConfig(**saved["config"]), saved["gelu"]
        state[_HEAD] = state[_TOKEN_TABLE]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{source} holds no model that fastgpt can build: {error!r}") from error
    return Weights(config, gelu, state)


def download(name: str) -> Path:
    """The folder of the published model ``name`` in Hugging Face's cache, downloaded if needed.

    Raises ConnectionError if it is not in the cache and cannot be downloaded, ImportError without
    huggingface_hub.
    """
    hub = optional("huggingface_hub", f"the download of {name!r}", "hf")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except OSError as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConnectionError(
            f"{name!r} is not in Hugging Face's cache and could not be downloaded ({reason}); "
            "from_pretrained also takes a folder"
        ) from error


def write(weights: Weights, folder: Path, end_of_text: int | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` for transformers' GPT2LMHeadModel, which
    computes the same logits. ``folder`` must exist. Missing biases are written as zeros, because
    transformers requires biases. ``end_of_text``: the id at which its ``generate`` stops.
    """
    config, gelu, state = weights
    activation = {kind: name for name, kind in reversed(_GELUS.items())}[gelu]
    shape = {theirs: getattr(config, ours) for ours, (theirs, _) in _SHAPE.items()}
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    facts = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": activation,
        **shape,
        **dropout,
        **_FIXED,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }
    _write_tensors(_theirs(state), folder / WEIGHTS_FILE, {"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def write_safetensors(weights: Weights, path: Path) -> None:
    """Write a file for ``read``: the tensors of ``GPT.state_dict()`` without the tied head, with
    config and GELU in the header.
    """
    header = json.dumps({"config": asdict(weights.config), "gelu": weights.gelu})
    state = {name: tensor for name, tensor in weights.state.items() if name != _HEAD}
    _write_tensors(state, path, {"format": "pt", _METADATA: header})


def _in_folder(folder: Path, weights_file: Path) -> Weights:
    facts = _read_json(folder / CONFIG_FILE)
    try:
        config, gelu = _shape_and_gelu(facts)
        state = _ours(_read_all_tensors(weights_file))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder} holds no model that fastgpt can build: {reason}") from error
    return Weights(config, gelu, state)


def _weights_file(folder: Path) -> Path:
    for name in _WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has none of the files {', '.join(_WEIGHTS_FILES)}")


def _shape_and_gelu(facts: Mapping[str, Any]) -> tuple[GPTConfig, str]:
    if facts.get("model_type") != "gpt2":
        raise ValueError(f"model_type must be 'gpt2', got {facts.get('model_type')!r}")
    shape = {ours: facts.get(theirs, default) for ours, (theirs, default) in _SHAPE.items()}
    config = GPTConfig(bias=True, **shape)
    for name, value in _FIXED.items():
        if facts.get(name, value) != value:
            raise ValueError(f"{name} must be {value}, got {facts[name]!r}")
    if facts.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"n_inner must be null or 4 * n_embd, got {facts['n_inner']!r}")
    activation = facts.get("activation_function", "gelu_new")
    if activation not in _GELUS:
        raise ValueError(
            f"activation_function must be one of {', '.join(_GELUS)}, got {activation!r}"
        )
    return config, _GELUS[activation]


def _ours(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert to ``GPT``'s state dict. Some files omit ``transformer.`` from the names."""
    state = {}
    for name, tensor in published.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if name.endswith(_TRANSPOSED) and tensor.dim() != 2:
            raise ValueError(f"{name} must be a matrix, got the shape {tuple(tensor.shape)}")
        state[name] = tensor.t() if name.endswith(_TRANSPOSED) else tensor
    head = state.setdefault(_HEAD, state[_TOKEN_TABLE])
    if not torch.equal(head, state[_TOKEN_TABLE]):
        raise ValueError("lm_head.weight must equal transformer.wte.weight, as GPT ties them")
    return state


def _theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {
        name: tensor.t() if name.endswith(_TRANSPOSED) else tensor
        for name, tensor in state.items()
        if name != _HEAD
    }
    for name in [name for name in found if name.startswith(("transformer.h.", "transformer.ln_f"))]:
        bias = name.removesuffix("weight") + "bias"
        if name.endswith(".weight") and bias not in found:
            found[bias] = torch.zeros(found[name].shape[-1], dtype=found[name].dtype)
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        facts = parsed_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(facts).__name__}")
    return facts


def _read_all_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".json":
        places = _read_json(path)["weight_map"]
        if not isinstance(places, dict):
            raise ValueError(f"weight_map must be a JSON object, got {type(places).__name__}")
        shards = sorted(set(places.values()))
        return {k: v for shard in shards for k, v in _read_tensors(path.parent / shard).items()}
    if path.suffix == ".bin":
        with reading_checkpoint(path):
            found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
            raise ValueError(f"{path.name} must hold tensors by name, got {type(found).__name__}")
        return found
    return _read_tensors(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_header(path: Path) -> dict[str, str]:
    with _opened(path) as file:
        return file.metadata() or {}


def _opened(path: Path) -> Any:
    safetensors = optional("safetensors", "a safetensors file", "hf")
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error


def _write_tensors(state: Mapping[str, Tensor], path: Path, header: dict[str, str]) -> None:
    safetensors = optional("safetensors", "a safetensors file", "hf")
    safetensors_torch = optional("safetensors.torch", "a safetensors file", "hf")
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    try:
        safetensors_torch.save_file(tensors, path, header)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
